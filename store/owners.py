"""Whose pod it is: the controller at the top, such as the Deployment above the ReplicaSet, read over the port."""

from __future__ import annotations

from collections import OrderedDict

from api.apps import CronJob, Deployment, Job, ReplicaSet, controller_of
from api.claim import Controller
from api.core import Pod
from api.meta import OwnerReference, Resource
from store.errors import NotFoundError
from store.port import Store

_REMEMBERED = 1024
"""Controllers whose own controller is remembered; the oldest go first. A node runs pods of far fewer."""

_MIDDLE: dict[tuple[str, str], tuple[type[Resource], type[Resource]]] = {
    (ReplicaSet.TYPE.api_version, ReplicaSet.TYPE.kind): (ReplicaSet, Deployment),
    (Job.TYPE.api_version, Job.TYPE.kind): (Job, CronJob),
}
"""Controllers that may have one above them, and the only kind that counts as such."""


class Owners:
    """Finds top controllers, and remembers by UID what is above a ReplicaSet or Job."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[str, Controller] = OrderedDict()

    async def top_controller(self, pod: Pod) -> Controller:
        """The pod's top controller; the pod itself if it has none.

        ReplicaSet and Job are climbed one level, to a Deployment or CronJob alone; any other controller, third
        parties' included, is given as it is, and so is a ReplicaSet or Job that is gone. Raises StoreError.
        """
        meta = pod.metadata
        owner = controller_of(meta)
        if owner is None:
            return Controller(api_version=Pod.TYPE.api_version, kind=Pod.TYPE.kind, name=meta.name, uid=meta.uid)
        if (owner.api_version, owner.kind) not in _MIDDLE:
            return _controller(owner)
        known = self._known.get(owner.uid)
        if known is not None:
            self._known.move_to_end(owner.uid)
            return known
        parent = await self._above(owner, meta.namespace)
        if parent is None:
            return _controller(owner)  # not remembered: it may yet be adopted
        top = self._known[owner.uid] = _controller(parent)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return top

    async def _above(self, owner: OwnerReference, namespace: str) -> OwnerReference | None:
        """The Deployment or CronJob above a ReplicaSet or Job, if that exists and has one. Raises StoreError."""
        kind, above = _MIDDLE[owner.api_version, owner.kind]
        try:
            found = await self._store.get(kind, owner.name, namespace)
        except NotFoundError:
            return None
        parent = controller_of(found.metadata)
        if parent is None or found.metadata.uid != owner.uid:
            return None
        is_above = (parent.api_version, parent.kind) == (above.TYPE.api_version, above.TYPE.kind)
        return parent if is_above else None


async def top_controller(store: Store, pod: Pod) -> Controller:
    """The same for one pod, without a memory. Raises StoreError."""
    return await Owners(store).top_controller(pod)


def _controller(owner: OwnerReference) -> Controller:
    return Controller(api_version=owner.api_version, kind=owner.kind, name=owner.name, uid=owner.uid)
