"""What a kind brings along to be admitted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal

from api.meta import R, Resource
from api.ranges import Family
from api.validate.ranges import BOTH
from api.validate.verdict import Denial, Verdict
from store.port import Store

Operation = Literal["CREATE", "UPDATE", "DELETE"]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Features:
    """What this installation has switched on, as far as admission asks."""

    families: frozenset[Family] = BOTH
    """Enabled address families."""
    subnets: bool = True
    """SpiderSubnet is in use: pools find their subnet and inherit from it."""
    guard_deletion: bool = False
    """Pools and subnets whose addresses are in use cannot be deleted at all (enableValidatingResourcesDeletedWebhook);
    without it a deleted pool waits for its addresses to be given back."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a decision may look at beside the object."""

    store: Store
    """The API server, uncached: no decision reads a view."""
    namespace: str
    """The one that Spiderpool is installed in."""
    features: Features
    user: str = ""
    """Who asks, as the API server knows them."""
    dry_run: bool = False
    """Nothing will be stored."""


@dataclass(frozen=True, slots=True)
class Rules(Generic[R]):
    """How objects of one kind are admitted. The package's docstring tells what the functions do."""

    kind: type[R]
    default: Callable[[R, R | None, Context], Awaitable[R]]
    validate: Callable[[R, R | None, Context], Awaitable[Verdict]]
    validate_deletion: Callable[[R, Context], Awaitable[Verdict]] | None = None


@dataclass(frozen=True, slots=True)
class Injection:
    """How created objects of a kind that is not ours are changed: JSON in, JSON out, for nobody decodes all of it."""

    kind: type[Resource]
    inject: Callable[[Json, str, Context], Awaitable[Json | Denial]]
    """(object, namespace, context) to the object as it shall be; the argument is the callee's to change."""
    namespace_selector: Mapping[str, object] = field(default_factory=dict)
    """metav1.LabelSelector of the namespaces whose objects are asked for; empty: all."""
    object_selector: Mapping[str, object] = field(default_factory=dict)
    """metav1.LabelSelector of these objects; empty: all."""


Entry = Rules[Any] | Injection


def mutate_path(kind: type[Resource]) -> str:
    """Where defaulting is served: `/mutate-spiderpool-spidernet-io-v2beta1-spiderippool`, `/mutate--v1-pod`."""
    return f"/mutate-{_tail(kind)}"


def validate_path(kind: type[Resource]) -> str:
    """Where validation of a kind is served."""
    return f"/validate-{_tail(kind)}"


def _tail(kind: type[Resource]) -> str:
    type_ = kind.TYPE
    return f"{type_.group.replace('.', '-')}-{type_.version}-{type_.kind.lower()}"
