"""Asking again about addresses in use: does somebody else use an address that a pod of this node has?

A probe before the ADD finds who is there at that time. A host that was off, or gets the address later, is found by
asking again from the pod's own NIC. One NIC after another is asked, at a bounded rate, in a form that changes nobody's
cache; a stranger is told by a metric, a line in the log and an event on the pod. Nothing is taken from the pod: it
would lose its connections for certain, and the stranger may be the mistake.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from agent import metrics
from api.apps import VirtualMachineInstance
from api.claim import Claim
from api.core import Pod
from api.meta import ObjectMeta
from api.ranges import Address
from api.workloads import is_virtual_machine
from daemon.limits import at_least
from plugins.coordinator.probe import NicProbe, Prober, ProbeUnknownError
from plugins.errors import InvalidEnvironmentError
from plugins.ipam.concurrency import together
from plugins.ipam.held import SetKey, set_key
from plugins.ipam.nic import namespace_lives
from plugins.net.netns import require_netns
from store.errors import NotFoundError, StoreError
from store.port import Store
from store.recorder import Recorder

_log = logging.getLogger(__name__)

CONFIRM_PAUSE = 1.0
"""Seconds between an answer and the second question: an earlier holder on its way out is gone by then, or nearly."""
IDLE = 1.0
"""Seconds until a node without such addresses looks again whether it has any."""
TELL_AGAIN = 600.0
"""Seconds after which a conflict that lasts raises its event again; Kubernetes forgets events after an hour."""


@dataclass(frozen=True)
class RecheckSettings:
    """Times are in seconds."""

    enabled: bool = False
    """Ask again about the addresses that this node's pods have, in pools with conflict detection. It finds hosts that
    take a pod's address while the pod runs; on the segment it is two small broadcasts for each look at an address."""
    interval: float = 60.0
    """Time between two looks at one NIC at least; on a node with many it is more, by `per_second`."""
    per_second: float = 2.0
    """Addresses asked about in one second at most. A look costs the agent 2 ms of CPU, and the segment up to three
    frames to all."""
    deadline: float = 10.0
    """How long the look at one NIC may take, with all that it waits for."""

    def __post_init__(self) -> None:
        at_least(0.001, interval=self.interval, per_second=self.per_second)
        at_least(0.1, deadline=self.deadline)


@dataclass(frozen=True, slots=True)
class InUse:
    """An address of a pod of this node."""

    claim: Claim
    gateway: str
    """Of the pool; empty: none."""


@dataclass(slots=True)
class Conflict:
    """Somebody else uses an address of ours."""

    mac: str
    family: str
    told: float
    """Loop time of the last event."""


class Recheck:
    """Asks until cancelled. One NIC at a time."""

    def __init__(
        self,
        *,
        store: Store,
        in_use: Callable[[], Iterable[InUse]],
        prober: Prober,
        recorder: Recorder | None,
        settings: RecheckSettings,
    ) -> None:
        """`in_use` tells the addresses to ask about, as of now. Without a `recorder` there are no events."""
        self._store = store
        self._in_use = in_use
        self._prober = prober
        self._recorder = recorder
        self._settings = settings
        self._looked: dict[SetKey, float] = {}
        """Loop time of the last look at each NIC, or of when it was first seen: its ADD has asked already."""
        self._conflicts: dict[str, Conflict] = {}
        """By uid of the claim."""

    async def run(self) -> None:
        """Ask, and write events."""
        async with asyncio.TaskGroup() as group:
            if self._recorder is not None:
                group.create_task(self._recorder.run())
            group.create_task(self._go_round())

    async def _go_round(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            nics = self._nics()
            key = min(nics, key=self._looked.__getitem__, default=None)
            wait = IDLE if key is None else self._looked[key] + self._settings.interval - loop.time()
            if key is None or wait > 0:
                await asyncio.sleep(min(wait, IDLE))
                continue
            self._looked[key] = began = loop.time()
            await self._look(nics[key])
            pace = len(nics[key]) / self._settings.per_second
            await asyncio.sleep(max(0.0, began + pace - loop.time()))

    def _nics(self) -> Mapping[SetKey, list[InUse]]:
        """What there is to ask about now, by NIC; forgets what is gone."""
        nics: defaultdict[SetKey, list[InUse]] = defaultdict(list)
        for each in self._in_use():
            if each.claim.spec.netns:
                nics[set_key(each.claim)].append(each)
        now = asyncio.get_running_loop().time()
        self._looked = {key: self._looked.get(key, now) for key in nics}
        present = {each.claim.metadata.uid for claims in nics.values() for each in claims}
        for uid in self._conflicts.keys() - present:
            self._end(uid)
        return nics

    async def _look(self, addresses: list[InUse]) -> None:
        """Ask about the addresses of one NIC. What could not be found out changes nothing."""
        try:
            async with asyncio.timeout(self._settings.deadline):
                if await self._is_elsewhere(addresses[0].claim):
                    metrics.RECHECKS.labels("elsewhere").inc(len(addresses))
                    return
                spec = addresses[0].claim.spec
                fd = open_netns(spec.netns, spec.netns_inode)
                try:
                    nic = await self._prober.open_used(fd, spec.nic)
                finally:
                    os.close(fd)
                async with nic:
                    await together(self._ask(nic, each) for each in addresses)
        except (ProbeUnknownError, OSError, InvalidEnvironmentError, StoreError, TimeoutError) as error:
            metrics.RECHECKS.labels("unknown").inc(len(addresses))
            _log.debug("addresses of NIC %s were not asked about: %s", addresses[0].claim.spec.nic, error)

    async def _is_elsewhere(self, claim: Claim) -> bool:
        """Whether the claim is for the target of a live migration whose source still has the address, rightly."""
        workload = claim.spec.workload
        if workload is None or workload.controller is None or not is_virtual_machine(workload.controller):
            return False
        try:
            instance = await self._store.get(VirtualMachineInstance, workload.name, workload.namespace)
        except NotFoundError:
            return False
        return instance.status.node_name not in ("", claim.spec.node)

    async def _ask(self, nic: NicProbe, each: InUse) -> None:
        address = ip_address(each.claim.spec.address)
        mac = await nic.rival(address)
        if mac is not None:
            await asyncio.sleep(CONFIRM_PAUSE)
            mac = await nic.rival(address)
        if mac is None:
            metrics.RECHECKS.labels("alone").inc()
            await self._recovered(nic, each.claim, address)
            return
        metrics.RECHECKS.labels("conflict").inc()
        router = await nic.gateway(ip_address(each.gateway)) if each.gateway else None
        self._in_conflict(each, address, mac, is_router=mac == router)

    def _in_conflict(self, each: InUse, address: Address, mac: str, *, is_router: bool) -> None:
        claim, now = each.claim, asyncio.get_running_loop().time()
        known = self._conflicts.get(claim.metadata.uid)
        if known is None:
            metrics.STOLEN.labels(str(address.version)).inc()
        elif known.mac == mac and now - known.told < TELL_AGAIN:
            return
        self._conflicts[claim.metadata.uid] = Conflict(mac, str(address.version), now)
        text = f"{address} on NIC {claim.spec.nic} of pod {_who(claim)} is also used by {mac}"
        if is_router:
            text += f", which is gateway {each.gateway}: does it answer for others (proxy ARP, proxy NDP)?"
        _log.warning("%s", text)
        if self._recorder is not None and claim.spec.pod_uid:
            self._recorder.warning(_pod(claim), "AddressInUseTwice", text)

    async def _recovered(self, nic: NicProbe, claim: Claim, address: Address) -> None:
        """Take the conflict back, if there was one, and tell neighbours, who may remember the other MAC, ours."""
        if claim.metadata.uid not in self._conflicts:
            return
        await nic.announce(address)
        mac = self._conflicts[claim.metadata.uid].mac
        self._end(claim.metadata.uid)
        text = f"{address} on NIC {claim.spec.nic} of pod {_who(claim)} is not used by {mac} any more"
        _log.info("%s", text)
        if self._recorder is not None and claim.spec.pod_uid:
            self._recorder.normal(_pod(claim), "AddressAloneAgain", text)

    def _end(self, uid: str) -> None:
        metrics.STOLEN.labels(self._conflicts.pop(uid).family).dec()


def open_netns(path: str, inode: int) -> int:
    """A descriptor of the network namespace that had `inode`, for the caller to close.

    Raises OSError if it is not at the path any more, InvalidEnvironmentError if what is there is none.
    """
    if not namespace_lives(path, inode):
        raise FileNotFoundError(f"{path} is not the pod's network namespace any more")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if require_netns(fd) != inode:
            raise FileNotFoundError(f"{path} is another network namespace by now")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _who(claim: Claim) -> str:
    workload = claim.spec.workload
    return f"{workload.namespace}/{workload.pod_name}" if workload is not None else claim.spec.container_id


def _pod(claim: Claim) -> Pod:
    """The pod as far as an event must name it."""
    workload = claim.spec.workload
    namespace, name = (workload.namespace, workload.pod_name) if workload is not None else ("", "")
    return Pod(metadata=ObjectMeta(name=name, namespace=namespace, uid=claim.spec.pod_uid))
