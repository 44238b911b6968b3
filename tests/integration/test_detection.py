"""What pools, the SpiderCoordinator and settings switch on, and gateways of all kinds, on real segments."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Any

import pytest

from api.coordinator import ClusterCoordinatorSpec, Coordinator
from api.meta import ObjectMeta
from plugins.coordinator.probe import ProbeSettings
from plugins.coordinator.probe.frames import ETH_P_ARP, announcement, sighting
from plugins.errors import AddressConflictError, ExhaustedError, GatewayUnreachableError
from plugins.ipam.plugin import Ipam
from plugins.ipam.settings import IpamSettings
from tests.integration.ipam_rig import addresses, call, claims, node, pool
from tests.integration.probe_segment import Answering, Host, Segment, segment
from tests.integration.test_probe import neighbours

CONFLICTS = IpamSettings(enable_ip_conflict_detection=True)
PROBE = ProbeSettings()
GATEWAY = IPv4Address("10.6.0.1")
V6: Any = {"v4": (), "v6": ("v6",)}


@pytest.fixture
def lan() -> Iterator[Segment]:
    with segment() as created:
        yield created


def coordinator(*, conflict: bool | None = None, gateway: bool | None = None) -> Coordinator:
    spec = ClusterCoordinatorSpec(detect_ip_conflict=conflict, detect_gateway=gateway)
    return Coordinator(metadata=ObjectMeta(name="default"), spec=spec)


async def known(ipam: Ipam, *pools: str, cluster: bool) -> None:
    """Return when the agent has heard of the pools, and of a SpiderCoordinator."""
    async with asyncio.timeout(5):
        while not all(map(ipam._catalog.get, pools)) or (cluster and ipam._cluster() is None):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def proxy(router: Host, *spared: str) -> Callable[[bytes], list[tuple[float, bytes]]]:
    """Answers ARP for every address but those, probes included, as some routers do."""
    mac = bytes.fromhex(router.mac.replace(":", ""))
    free = {bytes(map(int, text.split("."))) for text in spared}

    def answer(frame: bytes) -> list[tuple[float, bytes]]:
        if frame[12:14] != b"\x08\x06" or frame[20:22] != b"\0\1" or frame[38:42] in free:
            return []
        asker, target = frame[22:28], frame[38:42]
        return [(0.0, asker + mac + frame[12:20] + b"\0\2" + mac + target + asker + bytes(4))]

    return answer


# Who says what is asked


@pytest.mark.parametrize(
    ("pooled", "cluster", "setting", "asked"),
    [(True, None, False, True), (None, True, False, True), (False, True, True, False), (None, False, True, False)],
)
def test_the_pool_then_the_coordinator_then_the_setting(
    tmp_path: Path, lan: Segment, pooled: bool | None, cluster: bool | None, setting: bool, asked: bool
) -> None:
    lan.add_host("10.6.0.10/16")
    pod = lan.add_host(up=False)

    async def main() -> None:
        async with node(tmp_path, settings=IpamSettings(enable_ip_conflict_detection=setting), probe=PROBE) as (
            ipam,
            store,
        ):
            if cluster is not None:
                await store.create(coordinator(conflict=cluster))
            await pool(store, "v4", "10.6.0.10", detect_ip_conflict=pooled)
            await pool(store, "spare", "10.6.0.11", detect_ip_conflict=pooled)
            await known(ipam, "spare", cluster=cluster is not None)
            given = addresses(await ipam.add(call("a", v4=("v4", "spare"), netns_fd=pod.fd)))
            assert given == (["10.6.0.11"] if asked else ["10.6.0.10"])

    asyncio.run(main())


def test_only_the_pools_that_ask_for_it_pay(tmp_path: Path, lan: Segment) -> None:
    """Dual stack, and each family's pool says otherwise."""
    lan.add_host("10.6.0.10/16", "fd06::10/64")
    pod = lan.add_host(up=False)

    async def main() -> None:
        async with node(tmp_path, probe=PROBE) as (ipam, store):
            await pool(store, "v4", "10.6.0.10", detect_ip_conflict=False)
            await pool(store, "v6", "fd06::10-fd06::11", detect_ip_conflict=True)
            for turn in range(20):
                given = await ipam.add(call("a", container=str(turn), v4=("v4",), v6=("v6",), netns_fd=pod.fd))
                assert addresses(given) == ["10.6.0.10", "fd06::11"]
                await ipam.delete(call("a", "DEL", container=str(turn)))
                if any(claim.spec.state == "Quarantined" for claim in (await claims(store)).values()):
                    return
            pytest.fail("twenty times the free one of two by chance")

    asyncio.run(main())


@pytest.mark.upstream("C00009")
@pytest.mark.parametrize("by", ["pool", "coordinator"])
def test_a_gateway_that_is_not_there_refuses_pods_of_that_pool(tmp_path: Path, lan: Segment, by: str) -> None:
    lan.add_host("10.6.0.2/16", "fd06::2/64")
    pod = lan.add_host(up=False)

    async def main() -> None:
        async with node(tmp_path, probe=PROBE) as (ipam, store):
            said = True if by == "pool" else None
            if by == "coordinator":
                await store.create(coordinator(gateway=True))
                await known(ipam, cluster=True)
            await pool(store, "v4", "10.6.0.10-10.6.0.20", gateway="10.6.0.1", detect_gateway=said)
            await pool(store, "v6", "fd06::10-fd06::20", gateway="fd06::1", detect_gateway=said)
            await pool(store, "there4", "10.6.0.30-10.6.0.40", gateway="10.6.0.2", detect_gateway=said)
            await pool(store, "there6", "fd06::30-fd06::40", gateway="fd06::2", detect_gateway=said)
            for families in ({"v4": ("v4",)}, V6):
                with pytest.raises(GatewayUnreachableError, match=r"gateway (10\.6\.0\.1|fd06::1) of pool"):
                    await ipam.add(call("a", **families, netns_fd=pod.fd))
            assert not await claims(store)
            assert len(addresses(await ipam.add(call("a", v4=("there4",), v6=("there6",), netns_fd=pod.fd)))) == 2

    asyncio.run(main())


def test_what_is_asked_about_again_are_the_claims_of_such_pools(tmp_path: Path, lan: Segment) -> None:
    pod = lan.add_host(up=False)

    async def main() -> None:
        async with node(tmp_path, probe=PROBE) as (ipam, store):
            await pool(store, "v4", "10.6.0.10", gateway="10.6.0.1", detect_ip_conflict=True)
            await pool(store, "v6", "fd06::10")
            await ipam.add(call("a", v4=("v4",), v6=("v6",), netns_fd=pod.fd))
            ((claim, gateway),) = ipam.asked_about()
            assert (claim.spec.address, gateway) == ("10.6.0.10", "10.6.0.1")
            assert claim.spec.netns_inode == os.fstat(pod.fd).st_ino
            await ipam.delete(call("a", "DEL"))
            assert not ipam.asked_about()

    asyncio.run(main())


# Gateways


@pytest.mark.parametrize("families", [{"v4": ("v4",)}, V6], ids=["v4", "v6"])
def test_asking_for_the_gateway_alone_announces_no_stolen_address(tmp_path: Path, lan: Segment, families: Any) -> None:
    """Without conflict detection nobody knows whether the address is free, so it is not named."""
    owner = lan.add_host("10.6.0.10/16", "fd06::10/64")
    router = lan.add_host("10.6.0.1/16", "fd06::1/64")
    for address in ("10.6.0.10", "fd06::10"):
        router.ip("neigh", "add", address, "lladdr", owner.mac, "dev", "eth0", "nud", "stale")
    pod = lan.add_host(up=False)

    async def main() -> None:
        async with node(tmp_path, settings=IpamSettings(enable_gateway_detection=True), probe=PROBE) as (ipam, store):
            await pool(store, "v4", "10.6.0.10", gateway="10.6.0.1")
            await pool(store, "v6", "fd06::10", gateway="fd06::1")
            assert addresses(await ipam.add(call("a", **families, netns_fd=pod.fd)))

    asyncio.run(main())
    assert {neighbours(router)[address] for address in ("10.6.0.10", "fd06::10")} == {owner.mac}


def test_a_gateway_that_answers_only_its_own_subnet_is_there(tmp_path: Path, lan: Segment) -> None:
    """It does not answer a probe, and so is asked again in the name of the address, if that is free."""
    router = lan.add_host()
    first, second = lan.add_host(up=False), lan.add_host(up=False)

    def answer(frame: bytes) -> list[tuple[float, bytes]]:
        is_request = frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\1"
        return [(0.0, announcement(router.mac, GATEWAY))] if is_request and frame[28:30] == b"\x0a\x06" else []

    async def main() -> None:
        async with node(tmp_path, settings=IpamSettings(enable_gateway_detection=True), probe=PROBE) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.20", gateway="10.6.0.1")
            (address,) = addresses(await ipam.add(call("a", netns_fd=first.fd)))
            await ipam.delete(call("a", "DEL"))
            await pool(store, "stolen", address, gateway="10.6.0.1")
            thief = lan.add_host(f"{address}/16")
            with pytest.raises(GatewayUnreachableError, match=f"in use by {thief.mac}"):
                await ipam.add(call("b", v4=("stolen",), netns_fd=second.fd))

    with Answering(router, answer):
        asyncio.run(main())


@pytest.mark.parametrize("gateway", ["10.6.0.1", "fd06::1"])
def test_a_gateway_that_takes_its_time_and_one_whose_mac_changes(tmp_path: Path, lan: Segment, gateway: str) -> None:
    """Two routers share the address (VRRP, anycast), and both are slow. Any answer within the wait will do."""
    one, other = lan.add_host(), lan.add_host()
    pod = lan.add_host(up=False)

    def slowly(host: Host, delay: float) -> Callable[[bytes], list[tuple[float, bytes]]]:
        wanted = ip_address(gateway)
        return lambda frame: [(delay, announcement(host.mac, wanted))] if asks(frame, gateway) else []

    async def main() -> None:
        settings = IpamSettings(enable_ip_conflict_detection=True, enable_gateway_detection=True)
        async with node(tmp_path, settings=settings, probe=ProbeSettings(gateway_wait=3.0)) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.20", gateway="10.6.0.1")
            await pool(store, "v6", "fd06::10-fd06::20", gateway="fd06::1")
            families: Any = V6 if ":" in gateway else {"v4": ("v4",)}
            for turn in range(2):
                assert addresses(await ipam.add(call("a", container=str(turn), **families, netns_fd=pod.fd)))
                await ipam.delete(call("a", "DEL", container=str(turn)))

    with Answering(one, slowly(one, 0.4)), Answering(other, slowly(other, 0.4)):
        asyncio.run(main())


def asks(frame: bytes, target: str) -> bool:
    """Whether the frame asks for that address."""
    packed = ip_address(target).packed
    is_arp = int.from_bytes(frame[12:14], "big") == ETH_P_ARP
    return frame[38:42] == packed if is_arp else frame[54:55] == b"\x87" and frame[62:78] == packed


# Routers that answer for others


def test_a_gateway_with_proxy_arp_is_named_and_nothing_is_quarantined(tmp_path: Path, lan: Segment) -> None:
    router, pod = lan.add_host(), lan.add_host(up=False)

    async def main() -> None:
        async with node(tmp_path, settings=CONFLICTS, probe=PROBE) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.60", gateway="10.6.0.1")
            for _ in range(2):
                with pytest.raises(AddressConflictError) as raised:
                    await ipam.add(call("a", netns_fd=pod.fd))
                assert (
                    f"{router.mac} answers for 4 of them: it is the pool's gateway, with proxy" in raised.value.details
                )
                assert "spec.detectIPConflict: false" in raised.value.details
            assert not await claims(store)
            await pool(store, "spared", "10.6.0.70-10.6.0.80", gateway="10.6.0.1", detect_ip_conflict=False)
            assert addresses(await ipam.add(call("a", v4=("spared",), netns_fd=pod.fd)))

    with Answering(router, proxy(router)):
        asyncio.run(main())


def test_an_address_of_the_gateways_own_is_quarantined(tmp_path: Path, lan: Segment) -> None:
    router = lan.add_host("10.6.0.1/16", "10.6.0.10/16")
    pod = lan.add_host(up=False)

    async def main() -> None:
        async with node(tmp_path, settings=CONFLICTS, probe=PROBE) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.11", gateway="10.6.0.1")
            for turn in range(30):
                assert addresses(await ipam.add(call("a", container=str(turn), netns_fd=pod.fd))) == ["10.6.0.11"]
                await ipam.delete(call("a", "DEL", container=str(turn)))
                held = await claims(store)
                if held:
                    (claim,) = held.values()
                    assert (claim.spec.address, claim.spec.state) == ("10.6.0.10", "Quarantined")
                    assert claim.spec.quarantine is not None
                    assert claim.spec.quarantine.mac == router.mac
                    return
            pytest.fail("thirty times the free one of two by chance")

    asyncio.run(main())


def test_the_neighbours_of_a_stolen_address_learn_nothing(tmp_path: Path, lan: Segment) -> None:
    """Conflict before gateway: an address that is in use is never named as anybody's sender."""
    owner = lan.add_host("10.6.0.10/16", "fd06::10/64")
    router = lan.add_host("10.6.0.1/16", "fd06::1/64")
    for address in ("10.6.0.10", "fd06::10"):
        router.ip("neigh", "add", address, "lladdr", owner.mac, "dev", "eth0", "nud", "stale")
    pod = lan.add_host(up=False)
    named: list[bytes] = []

    def listen(frame: bytes) -> list[tuple[float, bytes]]:
        seen = sighting(frame)
        if seen is not None and seen.mac == pod.mac and not seen.asking:
            named.append(frame)
        return []

    async def main() -> None:
        settings = IpamSettings(enable_ip_conflict_detection=True, enable_gateway_detection=True)
        async with node(tmp_path, settings=settings, probe=PROBE) as (ipam, store):
            await pool(store, "v4", "10.6.0.10", gateway="10.6.0.1")
            await pool(store, "v6", "fd06::10", gateway="fd06::1")
            for families in ({"v4": ("v4",)}, V6):
                with pytest.raises((AddressConflictError, ExhaustedError)):
                    await ipam.add(call("a", **families, netns_fd=pod.fd))

    witness = lan.add_host()
    with Answering(witness, listen):
        asyncio.run(main())
    assert not named
    assert {neighbours(router)[address] for address in ("10.6.0.10", "fd06::10")} == {owner.mac}
