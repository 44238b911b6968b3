"""Keeps the SpiderCoordinator's status: the networks that pods reach through their node.

Every source is watched; the kinds of other projects only where the API server has them. A SpiderCoordinator that is
being deleted is let go, whatever its name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from msgspec.structs import replace

from api.clusternet import CalicoIPPool, CiliumPodIPPool, ControllerManager, ServiceCIDR
from api.coordinator import Coordinator, CoordinatorStatus
from api.core import ConfigMap
from api.meta import FINALIZER
from controller.coordinator.cni_directory import first_name
from controller.coordinator.networks import NotReadyError, Sources, found_out, not_ready, type_of_cni
from controller.coordinator.settings import CoordinatorStatusSettings
from controller.room import Desk
from controller.work import WorkQueue
from store.errors import NotFoundError
from store.inotify import IN_ATTRIB, IN_MOVED_TO, DirectoryWatch
from store.port import Query

_log = logging.getLogger(__name__)

TYPE_CHANGED = "PodCIDRTypeChanged"

_IN_CLOSE_WRITE = 0x0008
_IN_MOVED_FROM = 0x0040
_IN_DELETE = 0x0200
_CHANGES = IN_ATTRIB | IN_MOVED_TO | _IN_MOVED_FROM | _IN_CLOSE_WRITE | _IN_DELETE

_SYSTEM = "kube-system"
_MANAGER = {"component": "kube-controller-manager"}
"""Label of kube-controller-manager's pods; only those in kube-system count, where users cannot make any."""


class CoordinatorRoom:
    """The leader's duty."""

    def __init__(self, desk: Desk, settings: CoordinatorStatusSettings) -> None:
        self._store = desk.store
        self._events = desk.events
        self._settings = settings
        caches = desk.caches
        namespace, _, name = settings.cilium_config.partition("/")
        self._coordinators = caches.of(Coordinator)
        self._kubeadm = caches.of(ConfigMap, Query(namespace=_SYSTEM, name="kubeadm-config"))
        self._cilium = caches.of(ConfigMap, Query(namespace=namespace, name=name))
        self._managers = caches.of(ControllerManager, Query(namespace=_SYSTEM, labels=_MANAGER))
        self._service_cidrs = caches.optional(ServiceCIDR)
        self._calico = caches.optional(CalicoIPPool)
        self._cilium_pools = caches.optional(CiliumPodIPPool)

    async def run(self) -> None:
        """Keep the status until cancelled."""
        queue = WorkQueue("coordinator", self._reconcile, workers=1)

        def changed(old: Coordinator | None, new: Coordinator | None) -> None:
            if new is None:
                return
            queue.add(new.metadata.name)
            if old is not None and old.spec.pod_cidr_type != new.spec.pod_cidr_type:
                text = f"podCIDRType changed from {old.spec.pod_cidr_type} to {new.spec.pod_cidr_type}"
                self._events.normal(new, TYPE_CHANGED, text)

        def source_changed(*_: object) -> None:
            queue.add(self._settings.name)

        with ExitStack() as stack:
            stack.callback(self._coordinators.listen(changed))
            stack.callback(self._kubeadm.listen(source_changed))
            stack.callback(self._cilium.listen(source_changed))
            stack.callback(self._managers.listen(source_changed))
            stack.callback(self._service_cidrs.listen(source_changed))
            stack.callback(self._calico.listen(source_changed))
            stack.callback(self._cilium_pools.listen(source_changed))
            stack.enter_context(_watched(self._settings.cni_directory, source_changed))
            await queue.run()

    async def _reconcile(self, name: str) -> float | None:
        coordinator = self._coordinators.get(name)
        if coordinator is None:
            return None
        if coordinator.metadata.deletion_timestamp is not None:
            await self._let_go(coordinator)
            return None
        if name != self._settings.name:
            return None
        status, trouble = self._find_out(coordinator)
        if status != coordinator.status:
            written = await self._store.update_status(replace(coordinator, status=status))
            self._coordinators.informer.learn(written)
            if trouble is not None and trouble.event:
                self._events.warning(coordinator, trouble.event, trouble.message)
        return self._settings.resync

    def _find_out(self, coordinator: Coordinator) -> tuple[CoordinatorStatus, NotReadyError | None]:
        wanted: str = coordinator.spec.pod_cidr_type or "auto"
        sources = Sources(
            kubeadm=next(iter(self._kubeadm.values()), None),
            managers=tuple(self._managers.values()),
            service_cidrs=tuple(self._service_cidrs.values()),
            calico=tuple(self._calico.values()) if self._calico.served else None,
            cilium=next(iter(self._cilium.values()), None),
            cilium_pools=tuple(self._cilium_pools.values()) if self._cilium_pools.served else None,
        )
        try:
            if wanted == "auto":
                wanted = type_of_cni(first_name(self._settings.cni_directory))
            return found_out(wanted, sources), None
        except NotReadyError as error:
            return not_ready(str(error)), error

    async def _let_go(self, coordinator: Coordinator) -> None:
        metadata = coordinator.metadata
        if FINALIZER not in metadata.finalizers:
            return
        left = [each for each in metadata.finalizers if each != FINALIZER]
        try:
            await self._store.update(replace(coordinator, metadata=replace(metadata, finalizers=left)))
        except NotFoundError:
            return


@contextmanager
def _watched(directory: str, changed: Callable[[str], None]) -> Iterator[None]:
    """Have `changed` called when something in the directory changes; without one the resync has to do."""
    try:
        watch = DirectoryWatch(directory, _CHANGES, changed)
    except OSError as error:
        _log.info("%s cannot be watched, looking now and then: %s", directory, error)
        yield
        return
    try:
        yield
    finally:
        watch.close()
