"""Addresses in use that are asked about again, on real segments: who is told of, who is not, what stays as it was."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from agent.recheck import InUse, Recheck, RecheckSettings, open_netns
from api.apps import VirtualMachineInstance, VirtualMachineInstanceStatus
from api.claim import Claim, ClaimSpec, Controller, Workload, claim_name
from api.event import Event
from api.meta import ObjectMeta
from plugins.coordinator.probe import NicProbe, Prober, ProbeSettings
from store.port import Store
from store.recorder import Recorder
from store.sqlite import SqliteStore
from tests.integration.probe_segment import Answering, Host, Segment, ip, segment
from tests.integration.test_probe import neighbours, until

BOTH = ("10.9.0.5", "fd00:9::5")
QUICK = RecheckSettings(enabled=True, interval=0.05, per_second=100)
PROBE = ProbeSettings(wait=0.05)


@pytest.fixture
def lan() -> Iterator[Segment]:
    with segment() as made:
        yield made


def cidr(address: str) -> str:
    return f"{address}/{64 if ':' in address else 16}"


def in_use(host: Host, address: str, *, pod: str = "web-1", gateway: str = "", virtual: bool = False) -> InUse:
    """The claim of a pod in `host` for an address on its eth0."""
    controller = Controller(api_version="kubevirt.io/v1", kind="VirtualMachineInstance", name="vm", uid="u")
    spec = ClaimSpec(
        address=address,
        ip_version=6 if ":" in address else 4,
        pool="p",
        pod_uid=f"uid-{pod}",
        container_id=f"sandbox-{pod}",
        nic="eth0",
        node="node1",
        netns=f"/run/netns/{host.netns}",
        netns_inode=os.fstat(host.fd).st_ino,
        workload=Workload(
            namespace="ns",
            name="vm" if virtual else pod,
            pod=pod if virtual else "",
            controller=controller if virtual else None,
        ),
    )
    name = claim_name(ip_address(address))
    return InUse(Claim(metadata=ObjectMeta(name=name, uid=f"claim-{name}"), spec=spec), gateway)


@asynccontextmanager
async def checking(
    directory: Path, uses: Callable[[], list[InUse]], settings: RecheckSettings = QUICK, prober: Prober | None = None
) -> AsyncIterator[Store]:
    """A running re-check of the addresses that `uses` tells, and the store that it writes events to."""
    store = await SqliteStore.open(f"{directory}/store.db")
    prober = prober or Prober(PROBE)
    work = Recheck(
        store=store, in_use=uses, prober=prober, recorder=Recorder(store, "test", "node1"), settings=settings
    )
    task = asyncio.create_task(work.run())
    try:
        yield store
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])
        await prober.close()
        await store.close()


def conflicts(version: int) -> float:
    value = REGISTRY.get_sample_value("spiderpool_agent_addresses_in_conflict", {"ip_version": str(version)})
    assert value is not None
    return value


def looks(outcome: str) -> float:
    return REGISTRY.get_sample_value("spiderpool_agent_rechecks_total", {"outcome": outcome}) or 0.0


async def more(outcome: str, count: int = 1) -> None:
    """Return after `count` more looks with that outcome."""
    before = looks(outcome)
    await until(lambda: looks(outcome) >= before + count)


async def event(store: Store, reason: str) -> Event:
    """The event with that reason, once it is there."""
    async with asyncio.timeout(5):
        while True:
            for found in (await store.list(Event)).items:
                if found.reason == reason:
                    return found
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("address", BOTH)
def test_a_thief_is_told_of_until_it_goes_and_neighbours_are_put_right(
    tmp_path: Path, lan: Segment, address: str
) -> None:
    pod = lan.add_host(cidr(address))
    neighbour = lan.add_host("10.9.0.7/16", "fd00:9::7/64")
    use = in_use(pod, address)
    version = ip_address(address).version
    before = conflicts(version)

    async def main() -> None:
        async with checking(tmp_path, lambda: [use]) as store:
            await more("alone", 2)
            assert conflicts(version) == before
            thief = lan.add_host(cidr(address))
            neighbour.ip("neigh", "add", address, "lladdr", thief.mac, "dev", "eth0", "nud", "stale")
            told = await event(store, "AddressInUseTwice")
            assert (told.type, told.involved_object.kind, told.involved_object.name) == ("Warning", "Pod", "web-1")
            assert (told.involved_object.namespace, told.involved_object.uid) == ("ns", "uid-web-1")
            assert told.message == f"{address} on NIC eth0 of pod ns/web-1 is also used by {thief.mac}"
            assert conflicts(version) == before + 1
            thief.ip("address", "delete", cidr(address), "dev", "eth0")
            over = await event(store, "AddressAloneAgain")
            assert (over.type, thief.mac in over.message) == ("Normal", True)
            assert conflicts(version) == before
            await until(lambda: neighbours(neighbour)[address] == pod.mac)

    asyncio.run(main())


@pytest.mark.parametrize("address", BOTH)
def test_asking_changes_nobodys_cache(tmp_path: Path, lan: Segment, address: str) -> None:
    """Neither in the pod's favour nor, by an answer to all, in the thief's."""
    pod, thief = lan.add_host(cidr(address)), lan.add_host(cidr(address))
    witness = lan.add_host("10.9.0.7/16", "fd00:9::7/64")
    witness.ip("neigh", "add", address, "lladdr", "02:5b:00:00:00:99", "dev", "eth0", "nud", "stale")
    known = neighbours(witness)

    async def main() -> None:
        async with checking(tmp_path, lambda: [in_use(pod, address)]):
            await more("conflict", 2)

    asyncio.run(main())
    assert neighbours(witness)[address] == known[address] == "02:5b:00:00:00:99"
    assert address not in neighbours(thief)


def test_the_pods_other_nic_on_the_segment_is_no_thief(tmp_path: Path, lan: Segment) -> None:
    pod, other = lan.add_host(*map(cidr, BOTH)), lan.add_host()
    other.ip("link", "set", "eth0", "down")
    ip("-n", other.netns, "link", "set", "eth0", "name", "net1", "netns", pod.netns)
    pod.ip("link", "set", "net1", "up")

    async def main() -> None:
        async with checking(tmp_path, lambda: [in_use(pod, address) for address in BOTH]):
            before = looks("conflict")
            await more("alone", 6)
            assert looks("conflict") == before

    asyncio.run(main())


def test_a_router_that_answers_for_all_is_named(tmp_path: Path, lan: Segment) -> None:
    pod, router = lan.add_host(cidr("10.9.0.5")), lan.add_host()
    mac = bytes.fromhex(router.mac.replace(":", ""))

    def answer(frame: bytes) -> list[tuple[float, bytes]]:
        if frame[12:14] != b"\x08\x06" or frame[20:22] != b"\0\1":
            return []
        asker, target = frame[22:28], frame[38:42]
        return [(0.0, asker + mac + frame[12:20] + b"\0\2" + mac + target + asker + bytes(4))]

    async def main() -> None:
        async with checking(tmp_path, lambda: [in_use(pod, "10.9.0.5", gateway="10.9.0.1")]) as store:
            told = await event(store, "AddressInUseTwice")
            assert f"{router.mac}, which is gateway 10.9.0.1" in told.message

    with Answering(router, answer):
        asyncio.run(main())


def test_pods_that_vanish_disturb_nobody(tmp_path: Path, lan: Segment) -> None:
    stays, goes, reused = lan.add_host(cidr("10.9.0.5")), lan.add_host(), lan.add_host()
    lan.add_host(cidr("10.9.0.6"), cidr("10.9.0.8"))  # somebody has what the others had
    uses = [
        in_use(goes, "10.9.0.6", pod="web-2"),
        in_use(stays, "10.9.0.5"),
        in_use(reused, "10.9.0.8", pod="web-3"),
    ]
    spec = uses[2].claim.spec
    with pytest.raises(FileNotFoundError):
        open_netns(spec.netns, spec.netns_inode + 1)
    with pytest.raises(FileNotFoundError):
        open_netns("/run/netns/none", 1)

    async def main() -> None:
        before = conflicts(4)
        async with checking(tmp_path, lambda: list(uses)):
            await until(lambda: conflicts(4) == before + 2)
            lan.hosts.remove(goes)
            os.close(goes.fd)
            ip("netns", "delete", goes.netns)
            await more("unknown", 2)
            assert conflicts(4) == before + 2, "what cannot be asked changes nothing"
            await more("alone", 2)
            del uses[2], uses[0]  # the claims are released
            await until(lambda: conflicts(4) == before)

    asyncio.run(main())


def test_a_nic_that_is_down_stays_down(tmp_path: Path, lan: Segment) -> None:
    pod = lan.add_host(cidr("10.9.0.5"), up=False)

    async def main() -> None:
        async with checking(tmp_path, lambda: [in_use(pod, "10.9.0.5")], prober=Prober(ProbeSettings(up_wait=0.1))):
            await more("unknown", 2)

    asyncio.run(main())
    with pytest.raises(Exception, match="non-zero"):
        pod.ip("route", "add", "10.99.0.0/16", "via", "10.9.0.1")  # nothing is reachable by a NIC that is down


def test_the_source_of_a_live_migration_is_no_thief(tmp_path: Path, lan: Segment) -> None:
    """As long as the machine runs there; if it still answers after that, it is one."""
    target, source = lan.add_host(cidr("10.9.0.5")), lan.add_host(cidr("10.9.0.5"))
    use = in_use(target, "10.9.0.5", pod="virt-launcher-vm-b", virtual=True)
    before = conflicts(4)

    async def main() -> None:
        async with checking(tmp_path, lambda: [use]) as store:
            instance = await store.create(
                VirtualMachineInstance(
                    metadata=ObjectMeta(name="vm", namespace="ns"),
                    status=VirtualMachineInstanceStatus(node_name="node0", phase="Running"),
                )
            )
            await more("elsewhere", 3)
            assert conflicts(4) == before
            await store.delete(VirtualMachineInstance, "vm", "ns", uid=instance.metadata.uid)
            await store.create(
                VirtualMachineInstance(
                    metadata=ObjectMeta(name="vm", namespace="ns"),
                    status=VirtualMachineInstanceStatus(node_name="node1", phase="Running"),
                )
            )
            told = await event(store, "AddressInUseTwice")
            assert source.mac in told.message
            assert told.involved_object.name == "virt-launcher-vm-b"

    asyncio.run(main())


class Watched(Prober):
    """A prober that notes when which address was asked about."""

    def __init__(self) -> None:
        super().__init__(PROBE)
        self.opened: list[float] = []

    async def open_used(self, netns_fd: int, ifname: str) -> NicProbe:
        self.opened.append(time.monotonic())
        return await super().open_used(netns_fd, ifname)


def test_no_more_than_so_many_in_a_second_and_everybody_in_turn(tmp_path: Path, lan: Segment) -> None:
    pods = [lan.add_host(cidr(f"10.9.1.{n}"), cidr(f"fd00:9::1:{n}")) for n in (1, 2, 3)]
    uses = [
        in_use(pod, address, pod=f"web-{n}")
        for n, pod in enumerate(pods, 1)
        for address in (f"10.9.1.{n}", f"fd00:9::1:{n}")
    ]
    settings = RecheckSettings(enabled=True, interval=0.01, per_second=10)

    async def main() -> list[float]:
        prober = Watched()
        async with checking(tmp_path, lambda: uses, settings, prober):
            await more("alone", 12)
        return prober.opened

    opened = asyncio.run(main())
    assert len(opened) >= 6
    # Two addresses for each NIC, ten addresses in a second.
    assert opened[-1] - opened[0] >= 0.2 * (len(opened) - 1) - 0.1


def test_refused_settings() -> None:
    with pytest.raises(ValueError, match="per_second"):
        RecheckSettings(per_second=0)
    with pytest.raises(ValueError, match="interval"):
        RecheckSettings(interval=-1)
    with pytest.raises(ValueError, match="deadline"):
        RecheckSettings(deadline=0)
