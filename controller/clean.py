"""`spiderpool-controller clean`: everything of Spiderpool goes out of the API, as the chart's pre-delete hook wants it.

What goes wrong is told at the end; the rest is removed all the same. Source: upstream, the sub-command `clean`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Collection, Iterable
from contextlib import suppress
from typing import Any, Final

from msgspec.structs import replace

from api.apiextensions import Definition
from api.apps import Job
from api.core import Pod
from api.kinds import OWN
from api.meta import GROUP, Resource
from api.webhook import MutatingWebhookConfiguration, ValidatingWebhookConfiguration
from controller.election import depose
from store.errors import ConflictError, NotFoundError, StoreError, UnavailableError
from store.port import Query, Store

SRIOV_GROUP: Final = "sriovnetwork.openshift.io"
_SRIOV_WEBHOOKS: Final = ("network-resources-injector-config", "sriov-operator-webhook-config")
_KEPT: Final = "sriovoperatorconfigs.sriovnetwork.openshift.io"
"""The SR-IOV operator makes its own default object of this kind, and stumbles over its absence."""
_IDENTITY: Final = "spiderpool-controller-clean"
_REIGN: Final = 600
"""Seconds for which nobody leads while we clean; thousands of objects take a minute or two."""
_INTERREGNUM: Final = 30
"""Seconds for which nobody leads afterwards, until all definitions are gone, without which none leads; who installs
anew does not wait for long."""
_PATIENCE: Final = 30.0
"""Seconds for the API server to remove definitions."""
_PAUSE: Final = 0.25
"""Seconds between two looks."""
_AT_A_TIME: Final = 16
_ATTEMPTS: Final = 4

_log = logging.getLogger(__name__)


async def remove_webhooks(store: Store, validating: Iterable[str], mutating: Iterable[str]) -> None:
    """Delete webhook configurations; what is not there is none. Raises StoreError."""
    for name in validating:
        with suppress(NotFoundError):
            await store.delete(ValidatingWebhookConfiguration, name)
    for name in mutating:
        with suppress(NotFoundError):
            await store.delete(MutatingWebhookConfiguration, name)


async def clean(
    store: Store, *, validating: str, mutating: str, lease: str, namespace: str, job: str = ""
) -> list[str]:
    """Remove everything; returns what went wrong.

    The chart's hook runs while controllers still do. Their leader would put the webhook configurations back at once,
    and with the controllers gone nobody could create a pod any more: so it is deposed first, by its Lease `lease` in
    the installation's `namespace`.

    `validating` and `mutating` are names of our webhook configurations, which go next: without them nobody asks for
    admission that nobody gives. `job` is the name of the initialising Job in `namespace`; empty: there is none.
    """
    attempt = _Attempts()
    what = f"Lease {namespace}/{lease}"
    patience = await attempt(what, depose(store, namespace, lease, _IDENTITY, _REIGN))
    if patience:
        _log.info("waiting %.0f s until the leading controller has stopped", patience)
        await asyncio.sleep(patience)
    for names in (((validating,), (mutating,)), *(((name,), (name,)) for name in _SRIOV_WEBHOOKS)):
        present = [tuple(filter(None, each)) for each in names]
        await attempt(f"webhook configurations {names}", remove_webhooks(store, *present))
    definitions = await attempt("customresourcedefinitions", store.list(Definition))
    defined = {each.metadata.name: each for each in definitions.items} if definitions is not None else {}
    for kind in OWN:
        if f"{kind.TYPE.plural}.{GROUP}" not in defined:
            continue
        listing = await attempt(kind.TYPE.plural, store.list(kind))
        gate = asyncio.Semaphore(_AT_A_TIME)

        async def one(item: Resource, gate: asyncio.Semaphore = gate) -> None:
            meta = item.metadata
            async with gate:
                await attempt(f"{item.TYPE.kind} {meta.namespace}/{meta.name}".replace(" /", " "), _remove(store, item))

        if listing is not None:
            await asyncio.gather(*(one(item) for item in listing.items))
            _log.info("%d %s are removed", len(listing.items), kind.TYPE.plural)
    ours = [name for name, each in defined.items() if each.spec.group in (GROUP, SRIOV_GROUP) and name != _KEPT]
    for name in ours:
        await attempt(f"CustomResourceDefinition {name}", store.delete(Definition, name))
    await attempt("customresourcedefinitions", _gone(store, ours))
    if job:
        await _remove_job(store, attempt, namespace, job)
    if patience is not None:
        await attempt(what, depose(store, namespace, lease, _IDENTITY, _INTERREGNUM))
    return attempt.problems


class _Attempts:
    """Goes on when something fails, and remembers it."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    async def __call__(self, what: str, work: Awaitable[Any]) -> Any:
        """The result, or None."""
        try:
            return await work
        except NotFoundError:
            return None
        except StoreError as error:
            self.problems.append(f"{what}: {error}")
            return None


async def _gone(store: Store, definitions: Collection[str]) -> None:
    """Return when the definitions are gone, which takes the API server a moment. Raises StoreError."""
    left: list[str] = []
    for _ in range(round(_PATIENCE / _PAUSE)):
        there = {each.metadata.name for each in (await store.list(Definition)).items}
        if not (left := sorted(there.intersection(definitions))):
            return
        await asyncio.sleep(_PAUSE)
    raise UnavailableError(f"still there after {_PATIENCE:g} s: {', '.join(left)}")


async def _remove_job(store: Store, attempt: _Attempts, namespace: str, job: str) -> None:
    """The Job and its pods, which its deletion leaves (the default of batch/v1's own API)."""
    await attempt(f"Job {namespace}/{job}", store.delete(Job, job, namespace))
    pods = await attempt("pods", store.list(Pod, Query(namespace=namespace, labels={"job-name": job})))
    for pod in pods.items if pods is not None else ():
        await attempt(f"Pod {namespace}/{pod.metadata.name}", store.delete(Pod, pod.metadata.name, namespace))


async def _remove(store: Store, item: Resource) -> None:
    """Delete an object that nobody will take the finalizers off any more. Raises StoreError."""
    meta = item.metadata
    for _ in range(_ATTEMPTS):
        try:
            item = await store.get(type(item), meta.name, meta.namespace)
            if item.metadata.finalizers:
                item = await store.update(replace(item, metadata=replace(item.metadata, finalizers=[])))
            if item.metadata.deletion_timestamp is None:
                await store.delete(type(item), meta.name, meta.namespace, uid=item.metadata.uid)
        except NotFoundError:
            return
        except ConflictError:
            continue
        return
    raise ConflictError("it keeps changing")
