"""The store's port: what the rest of the code knows about persistence.

The semantics are those of the Kubernetes API and every adapter keeps all of them, names' and labels' rules
included, so that nothing else in the code knows which adapter it has:

* `metadata.uid` and `creationTimestamp` are set at creation; `resourceVersion` is an opaque string that changes with
  every write and orders all writes of the store; `generation` counts changes of anything but metadata and status.
* For a kind with `status_subresource`, `create` and `update` ignore `status`, and `update_status` ignores the rest
  (labels and annotations of the metadata included).
* `delete` of an object with finalizers only sets `deletionTimestamp`; the update that removes the last finalizer
  removes the object. A terminating object takes no new finalizers.
* Writes that change nothing keep their resourceVersion and send no event.

Source: Kubernetes API concepts, "Resource versions", "Efficient detection of changes"; API conventions.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol

from api.meta import ObjectMeta, R
from store.errors import InvalidError


@dataclass(frozen=True, slots=True)
class Query:
    """Which objects of a kind: all conditions must hold; the default is all of them."""

    namespace: str = ""
    """Empty: every namespace (and the only choice for cluster-scoped kinds)."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Equality conditions on labels."""
    name: str = ""
    """`metadata.name` equals this; empty: any."""
    node: str = ""
    """Pods alone: `spec.nodeName` equals this; empty: any. The Kubernetes adapter alone knows this condition."""

    def selects(self, metadata: ObjectMeta, labels: Mapping[str, str] | None = None) -> bool:
        """Whether an object with this metadata is asked for; `labels` stand for its own if given."""
        if self.name and self.name != metadata.name:
            return False
        if self.namespace and self.namespace != metadata.namespace:
            return False
        have = metadata.labels if labels is None else labels
        return all(have.get(key) == value for key, value in self.labels.items())


EVERYTHING = Query()


@dataclass(frozen=True, slots=True)
class Listing(Generic[R]):
    """A consistent snapshot."""

    items: list[R]
    resource_version: str
    """Watch from here to see what happened after the snapshot."""
    unreadable: tuple[str, ...] = ()
    """What is stored and breaks the kind's schema, by `namespace/name`: `items` does not have it."""

    def whole(self) -> list[R]:
        """The items, for a caller to whom it matters what is not among them.

        Raises InvalidError if something was left out: it must not pass for absent.
        """
        if self.unreadable:
            raise InvalidError(f"cannot be read, and may not be taken for absent: {', '.join(self.unreadable[:8])}")
        return self.items


@dataclass(frozen=True, slots=True)
class Event(Generic[R]):
    """One change. An object that stops matching a query's labels arrives as DELETED, as in Kubernetes."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    object: R | None
    """None for a BOOKMARK. For DELETED: the object's last state, with the deletion's resourceVersion."""
    resource_version: str


class Store(Protocol):
    """One store. All methods may raise UnavailableError; writes may raise UncertainError and InvalidError."""

    async def get(self, kind: type[R], name: str, namespace: str = "") -> R:
        """The object, read from the authority and no cache. Raises NotFoundError."""

    async def list(self, kind: type[R], query: Query = EVERYTHING) -> Listing[R]:
        """The matching objects in order of namespace and name, read from the authority and no cache."""

    def watch(self, kind: type[R], query: Query, since: str) -> AsyncGenerator[Event[R], None]:
        """Changes after resourceVersion `since`, in order, without end; close the iterator to stop.

        Raises ExpiredError, at once or later, when `since` is older than what the store remembers.
        """

    async def create(self, resource: R) -> R:
        """Create it; `metadata.resourceVersion` must be empty. Raises AlreadyExistsError."""

    async def update(self, resource: R) -> R:
        """Replace it. A non-empty `resourceVersion` or `uid` must be the stored one, else ConflictError.

        Raises NotFoundError.
        """

    async def update_status(self, resource: R) -> R:
        """Replace only its status. Raises as `update`."""

    async def delete(
        self, kind: type[R], name: str, namespace: str = "", *, uid: str = "", resource_version: str = ""
    ) -> None:
        """Delete it if the preconditions given hold. Raises NotFoundError, ConflictError."""

    async def close(self) -> None:
        """Give back connections and threads; ends all watches."""
