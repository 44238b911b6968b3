"""Conflict and gateway detection, and CHECK, on real segments with real strangers."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.claim import Claim
from plugins.coordinator.probe import ProbeSettings
from plugins.errors import (
    AddressConflictError,
    CheckFailedError,
    GatewayUnreachableError,
    InvalidConfigError,
    TryAgainLaterError,
)
from plugins.ipam.settings import IpamSettings
from tests.integration.ipam_rig import addresses, call, claims, node, pool
from tests.integration.probe_segment import Answering, Host, Segment, segment

DETECT = IpamSettings(enable_ip_conflict_detection=True, enable_gateway_detection=True)
PROBE = ProbeSettings()
DUAL: Any = {"v4": ("v4",), "v6": ("v6",)}


@pytest.fixture
def lan() -> Iterator[Segment]:
    with segment() as created:
        yield created


def pod_nic(lan: Segment) -> Host:
    """A pod's netns whose NIC is there, down and without addresses, as a chain calls IPAM."""
    return lan.add_host(up=False)


def quarantined(held: dict[str, Claim]) -> dict[str, Claim]:
    return {address: claim for address, claim in held.items() if claim.spec.state == "Quarantined"}


@pytest.mark.upstream("C00007", "C00018")
def test_strangers_are_avoided_and_quarantined_in_both_families(tmp_path: Path, lan: Segment) -> None:
    lan.add_host("10.6.0.1/16", "fd06::1/64")
    thief = lan.add_host("10.6.0.10/16", "fd06::10/64", "10.6.0.11/16")
    pod = pod_nic(lan)

    async def main() -> None:
        async with node(tmp_path, settings=DETECT, probe=PROBE) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.12", gateway="10.6.0.1")
            await pool(store, "v6", "fd06::10-fd06::11", gateway="fd06::1")
            # At random, so one ADD may miss the thief: go on until it was met in every address.
            for turn in range(40):
                result = await ipam.add(call("a", container=str(turn), **DUAL, netns_fd=pod.fd))
                assert addresses(result) == ["10.6.0.12", "fd06::11"]
                if len(quarantined(await claims(store))) == 3:
                    break
                await ipam.delete(call("a", "DEL", container=str(turn)))
            assert set(quarantined(await claims(store))) == {"10.6.0.10", "10.6.0.11", "fd06::10"}
            for claim in quarantined(await claims(store)).values():
                assert claim.spec.quarantine is not None
                assert claim.spec.quarantine.mac == thief.mac
                assert claim.metadata.labels.keys() == {"ipam.spidernet.io/pool", "ipam.spidernet.io/node"}
                assert (claim.spec.pod_uid, claim.spec.container_id, claim.spec.nic) == ("", "", "")
            await ipam.delete(call("a", "DEL", container=str(turn)))
            left = await claims(store)
            assert left == quarantined(left)

    asyncio.run(main())


def test_a_fixed_address_in_use_fails_and_is_released(tmp_path: Path, lan: Segment) -> None:
    thief = lan.add_host("10.6.0.10/16")
    pod = pod_nic(lan)

    async def main() -> None:
        settings = IpamSettings(enable_ip_conflict_detection=True)
        async with node(tmp_path, settings=settings, probe=PROBE) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.20")
            with pytest.raises(AddressConflictError) as raised:
                await ipam.add(call("a", netns_fd=pod.fd, args={"IP": "10.6.0.10"}))
            assert raised.value.msg.startswith("ip conflict: ")  # upstream's word
            assert "10.6.0.10 of pool v4" in raised.value.details
            assert thief.mac in raised.value.details
            assert not await claims(store)

    asyncio.run(main())


def test_a_router_with_proxy_arp_does_not_eat_the_pool(tmp_path: Path, lan: Segment) -> None:
    router = lan.add_host()
    mac = bytes.fromhex(router.mac.replace(":", ""))

    def answer(frame: bytes) -> list[tuple[float, bytes]]:
        """As routers do that answer for all; Linux itself spares probes without a sender."""
        if frame[12:14] != b"\x08\x06" or frame[20:22] != b"\0\1":
            return []
        asker, target = frame[22:28], frame[38:42]
        return [(0.0, asker + mac + frame[12:20] + b"\0\2" + mac + target + asker + bytes(4))]

    pod = pod_nic(lan)

    async def main() -> None:
        settings = IpamSettings(enable_ip_conflict_detection=True, quarantine_cap_per_mac=2)
        async with node(tmp_path, settings=settings, probe=PROBE) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.60")
            for _ in range(3):
                with pytest.raises(AddressConflictError) as raised:
                    await ipam.add(call("a", netns_fd=pod.fd))
                assert raised.value.msg.startswith("ip conflict: ")
                assert f"{router.mac} answers for 4 of them: is it a router with proxy ARP" in raised.value.details
            held = await claims(store)
            assert len(held) == 2
            assert held == quarantined(held)

    with Answering(router, answer):
        asyncio.run(main())


def test_a_silent_gateway_is_named_and_nothing_is_kept(tmp_path: Path, lan: Segment) -> None:
    pod = pod_nic(lan)

    async def main() -> None:
        async with node(tmp_path, settings=DETECT, probe=PROBE) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.20", gateway="10.6.0.1")
            await pool(store, "plain", "10.6.0.30-10.6.0.40")
            with pytest.raises(GatewayUnreachableError) as raised:
                await ipam.add(call("a", netns_fd=pod.fd))
            assert "unreachable" in raised.value.msg  # upstream's word
            assert "gateway 10.6.0.1 of pool v4" in raised.value.details
            assert "from NIC eth0" in raised.value.details
            assert not await claims(store)
            assert (await ipam.add(call("a", v4=("plain",), netns_fd=pod.fd)))["ips"]

    asyncio.run(main())


def test_a_network_that_cannot_be_asked_is_no_conflict(tmp_path: Path, lan: Segment) -> None:
    pod = pod_nic(lan)

    async def main() -> None:
        async with node(tmp_path, settings=DETECT, probe=PROBE) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.20")
            with pytest.raises(TryAgainLaterError, match="none9"):
                await ipam.add(call("a", nic="none9", netns_fd=pod.fd))
            assert not await claims(store)

    asyncio.run(main())


def test_a_retry_does_not_take_its_own_address_for_a_strangers(tmp_path: Path, lan: Segment) -> None:
    lan.add_host("10.6.0.1/16", "fd06::1/64")
    pod = pod_nic(lan)

    async def main() -> None:
        async with node(tmp_path, settings=DETECT, probe=PROBE) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.20", gateway="10.6.0.1")
            await pool(store, "v6", "fd06::10-fd06::20", gateway="fd06::1")
            first = await ipam.add(call("a", **DUAL, netns_fd=pod.fd))
            for ip in first["ips"]:
                pod.ip("address", "add", ip["address"], "dev", "eth0", *(("nodad",) if ":" in ip["address"] else ()))
            assert await ipam.add(call("a", **DUAL, netns_fd=pod.fd)) == first
            assert not quarantined(await claims(store))

    asyncio.run(main())


def test_an_address_stolen_between_two_sandboxes_is_kept_and_reported(tmp_path: Path, lan: Segment) -> None:
    pod = pod_nic(lan)

    async def main() -> None:
        settings = IpamSettings(enable_ip_conflict_detection=True)
        async with node(tmp_path, settings=settings, probe=PROBE) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.20")
            (address,) = addresses(await ipam.add(call("a", container="old", netns_fd=pod.fd)))
            lan.add_host(f"{address}/16")
            with pytest.raises(AddressConflictError, match="not replaced since the pod was given it before"):
                await ipam.add(call("a", container="new", netns_fd=pod.fd))
            assert list(await claims(store)) == [address]
            await ipam.delete(call("a", "DEL", container="new"))
            again = addresses(await ipam.add(call("a", container="newer", netns_fd=pod.fd)))
            assert again != [address]

    asyncio.run(main())


@pytest.mark.parametrize("asked", [True, False])
def test_the_kernel_does_not_ask_for_duplicates_again(tmp_path: Path, lan: Segment, asked: bool) -> None:
    """After our probe the address is usable at once; without one the kernel's own detection stays on."""
    pod = pod_nic(lan)

    async def main() -> Any:
        settings = IpamSettings(enable_ip_conflict_detection=asked)
        async with node(tmp_path, settings=settings, probe=PROBE) as (ipam, store):
            await pool(store, "v6", "fd06::10-fd06::20")
            return await ipam.add(call("a", v4=(), v6=("v6",), netns_fd=pod.fd))

    (address,) = [ip["address"] for ip in asyncio.run(main())["ips"]]
    pod.ip("link", "set", "eth0", "up")
    pod.ip("address", "add", address, "dev", "eth0")
    shown = subprocess.run(
        ["ip", "-n", pod.netns, "-6", "address", "show", "dev", "eth0"], capture_output=True, text=True, check=True
    ).stdout
    assert address in shown
    assert ("tentative" in shown) is not asked


def test_check(tmp_path: Path, lan: Segment) -> None:
    pod = lan.add_host()

    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.20")
            await pool(store, "v6", "fd06::10-fd06::20")
            result = await ipam.add(call("a", **DUAL, netns_fd=pod.fd))

            def check(previous: Any = result, **more: Any) -> Any:
                config = {"prevResult": previous}
                return ipam.check(call("a", "CHECK", **DUAL, netns_fd=pod.fd, config=config, **more))

            with pytest.raises(CheckFailedError, match="the NIC lacks an address"):
                await check()
            for ip in result["ips"]:
                pod.ip("address", "add", ip["address"], "dev", "eth0", *(("nodad",) if ":" in ip["address"] else ()))
            await check()
            with pytest.raises(CheckFailedError, match="claims and prevResult differ"):
                await check({**result, "ips": [{"address": "10.6.0.99/16"}]})
            for member, wrong in {"address": "10.6.0.10/x", "interface": "0"}.items():
                with pytest.raises(InvalidConfigError, match=rf"prevResult\.ips\[1\]\.{member}"):
                    await check({**result, "ips": [result["ips"][0], {**result["ips"][1], member: wrong}]})
            with pytest.raises(CheckFailedError, match="no address is claimed"):
                await check(container="another")
            await ipam.delete(call("a", "DEL"))
            with pytest.raises(CheckFailedError, match="no address is claimed"):
                await check()

    asyncio.run(main())
