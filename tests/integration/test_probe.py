"""Probing on a real segment: who is found, who is not, and when the answer is "unknown"."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from api.ranges import Address
from plugins.coordinator.probe import NicProbe, Prober, ProbeSettings, ProbeUnknownError
from plugins.coordinator.probe.frames import announcement, conflict_probe, sighting
from plugins.net.netns import in_netns
from tests.integration.probe_segment import Answering, Host, Segment, ip, raw_socket, segment

USED4, USED6 = IPv4Address("10.9.0.5"), IPv6Address("fd00:9::5")
FREE4, FREE6 = IPv4Address("10.9.0.6"), IPv6Address("fd00:9::6")
USED: list[Address] = [USED4, USED6]
FREE: list[Address] = [FREE4, FREE6]
PATIENT = ProbeSettings(wait=5.0, gateway_wait=5.0)
"""Longer than any test waits: the answer must end it."""


@pytest.fixture
def lan() -> Iterator[Segment]:
    with segment() as made:
        yield made


@asynccontextmanager
async def probing(host: Host, settings: ProbeSettings | None = None) -> AsyncIterator[NicProbe]:
    prober = Prober(settings or ProbeSettings())
    try:
        async with await prober.open(host.fd, "eth0") as nic:
            yield nic
    finally:
        await prober.close()


def find(host: Host, address: Address, settings: ProbeSettings | None = None) -> str | None:
    """The conflict for one address, from `host`."""

    async def ask() -> str | None:
        async with probing(host, settings) as nic:
            return await nic.conflict(address)

    return asyncio.run(ask())


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Return when `condition` holds; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.01)


def neighbours(host: Host) -> dict[str, str]:
    """The MACs that `host` remembers."""
    out = subprocess.run(["ip", "-n", host.netns, "-j", "neigh"], check=True, capture_output=True).stdout
    return {entry["dst"]: entry.get("lladdr", "") for entry in json.loads(out)}


@pytest.mark.parametrize("address", USED, ids=str)
def test_the_owner_is_found_at_once(lan: Segment, address: Address) -> None:
    owner, host = lan.add_host(f"{USED4}/24", f"{USED6}/64"), lan.add_host()
    began = time.monotonic()
    assert find(host, address, PATIENT) == owner.mac
    assert time.monotonic() - began < 2.5


@pytest.mark.parametrize("address", FREE, ids=str)
def test_a_free_address_takes_the_wait(lan: Segment, address: Address) -> None:
    lan.add_host(f"{USED4}/24", f"{USED6}/64")
    host = lan.add_host()

    async def ask() -> float:
        async with probing(host) as nic:
            began = time.monotonic()
            assert await nic.conflict(address) is None
            return time.monotonic() - began

    elapsed = asyncio.run(ask())
    assert 0.1 <= elapsed < 0.3


def test_a_nic_that_is_down_is_set_up(lan: Segment) -> None:
    owner, host = lan.add_host(f"{USED4}/24"), lan.add_host(up=False)
    assert find(host, USED4, PATIENT) == owner.mac


@contextmanager
def macvlan(lan: Segment, node: Host) -> Iterator[Host]:
    """A pod with a NIC as the macvlan plugin leaves it when it calls IPAM: down. IPv6 is off in the pod."""
    pod = Host(f"{lan.name}-pod", -1, "02:5b:00:00:01:01")
    ip("netns", "add", pod.netns)
    try:
        pod.fd = os.open(f"/run/netns/{pod.netns}", os.O_RDONLY | os.O_CLOEXEC)
        pod.sysctl("net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
        node.ip("link", "add", "eth0", "link", "eth0", "netns", pod.netns, "address", pod.mac, "type", "macvlan")
        yield pod
    finally:
        if pod.fd >= 0:
            os.close(pod.fd)
        ip("netns", "delete", pod.netns)


def test_a_macvlan_that_is_down_is_set_up(lan: Segment) -> None:
    owner, node = lan.add_host(f"{USED4}/24", f"{USED6}/64"), lan.add_host()

    async def ask() -> list[str | None]:
        async with probing(pod, ProbeSettings(wait=0.5)) as nic:
            assert nic.mac == pod.mac
            return list(await asyncio.gather(*(nic.conflict(address) for address in (*USED, *FREE))))

    with macvlan(lan, node) as pod:
        assert asyncio.run(ask()) == [owner.mac, owner.mac, None, None]


def test_a_macvlan_hears_others_detect_the_same_address(lan: Segment) -> None:
    """It delivers only the multicast groups that were joined."""
    rival, node = lan.add_host(), lan.add_host()

    def respond(frame: bytes) -> list[tuple[float, bytes]]:
        seen = sighting(frame)
        return [(0, conflict_probe(rival.mac, FREE6))] if seen and seen.asking and seen.address == FREE6 else []

    with macvlan(lan, node) as pod, Answering(rival, respond):
        assert find(pod, FREE6, PATIENT) == rival.mac


def test_the_groups_are_joined_and_left(lan: Segment) -> None:
    def groups(host: Host) -> dict[str, str]:
        out = subprocess.run(["ip", "-n", host.netns, "maddr", "show", "dev", "eth0"], check=True, capture_output=True)
        lines = [line.split() for line in out.stdout.decode().splitlines()]
        return {words[1]: " ".join(words[2:]) for words in lines if words[0] == "link"}

    all_nodes, own_group = "33:33:00:00:00:01", "33:33:ff:00:00:06"

    async def ask() -> None:
        async with probing(host) as nic:
            assert await nic.conflict(FREE6) is None
            assert groups(host).keys() >= before.keys() | {own_group}
            assert groups(host)[all_nodes] != before[all_nodes], "one more member"

    host = lan.add_host()
    before = groups(host)
    assert own_group not in before
    asyncio.run(ask())
    assert groups(host) == before


def test_ipv6_is_probed_although_the_pod_has_it_switched_off(lan: Segment) -> None:
    owner, host = lan.add_host(f"{USED6}/64"), lan.add_host(up=False)
    host.sysctl("net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
    assert find(host, USED6, PATIENT) == owner.mac
    assert find(host, FREE6) is None


def test_many_questions_on_one_nic_at_once(lan: Segment) -> None:
    owner, host = lan.add_host(f"{USED4}/24", f"{USED6}/64"), lan.add_host()

    async def ask() -> list[str | None]:
        async with probing(host, ProbeSettings(wait=0.5, gateway_wait=0.5)) as nic:
            return list(
                await asyncio.gather(
                    *(nic.conflict(address) for address in (*USED, *FREE)),
                    nic.gateway(USED4, FREE4),
                    nic.gateway(USED6, FREE6),
                    nic.gateway(IPv4Address("10.9.0.77"), FREE4),
                    nic.gateway(IPv6Address("fd00:9::77"), FREE6),
                )
            )

    assert asyncio.run(ask()) == [owner.mac, owner.mac, None, None, owner.mac, owner.mac, None, None]


@pytest.mark.parametrize("address", USED, ids=str)
def test_a_late_answer_within_the_wait_counts(lan: Segment, address: Address) -> None:
    rival, host = lan.add_host(), lan.add_host()

    def respond(frame: bytes) -> list[tuple[float, bytes]]:
        seen = sighting(frame)
        late = announcement(rival.mac, address)
        return [(0.3, late)] if seen and seen.asking and seen.address == address else []

    with Answering(rival, respond) as station:
        began = time.monotonic()
        assert find(host, address, ProbeSettings(wait=2.0, frames=1)) == rival.mac
        assert 0.3 <= time.monotonic() - began < 2.0
        assert station.heard.is_set()


def test_two_that_probe_at_the_same_moment_both_see_it(lan: Segment) -> None:
    one, other = lan.add_host(), lan.add_host()

    async def ask() -> list[str | None]:
        async with probing(one, PATIENT) as first, probing(other, PATIENT) as second:
            return list(await asyncio.gather(first.conflict(FREE4), second.conflict(FREE4)))

    assert asyncio.run(ask()) == [other.mac, one.mac]


@pytest.mark.parametrize("address", FREE, ids=str)
def test_another_prober_of_the_address_is_seen_and_sees(lan: Segment, address: Address) -> None:
    assert answer_found(lan, lambda mac: conflict_probe(mac, address), address) == "rival"


@pytest.mark.parametrize("address", FREE, ids=str)
def test_of_two_that_overlap_never_both_find_it_free(lan: Segment, address: Address) -> None:
    one, other = lan.add_host(), lan.add_host()

    async def ask(pause: float) -> set[str | None]:
        async with probing(one, ProbeSettings(wait=0.2)) as first, probing(other, ProbeSettings(wait=0.2)) as second:

            async def later() -> str | None:
                await asyncio.sleep(pause)
                return await second.conflict(address)

            return set(await asyncio.gather(first.conflict(address), later()))

    for pause in (0.0, 0.001, 0.06, 0.12, 0.16):
        assert asyncio.run(ask(pause)) != {None}


def test_the_duplicate_address_detection_of_a_kernel_is_seen(lan: Segment) -> None:
    rival, host = lan.add_host(), lan.add_host()

    async def ask() -> str | None:
        heard = in_netns(rival.fd, raw_socket)
        heard.setblocking(False)
        try:
            # One frame only: a second one would end the rival's detection before it says anything.
            async with probing(host, ProbeSettings(wait=8.0, frames=1)) as nic:
                question = asyncio.create_task(nic.conflict(FREE6))
                while (seen := sighting(await asyncio.get_running_loop().sock_recv(heard, 2048))) is None or (
                    seen.address != FREE6
                ):
                    pass
                rival.ip("address", "add", f"{FREE6}/64", "dev", "eth0")
                return await question
        finally:
            heard.close()

    assert asyncio.run(ask()) == rival.mac


@pytest.mark.parametrize("address", FREE, ids=str)
def test_own_frames_that_come_back_are_no_conflict(lan: Segment, address: Address) -> None:
    host = lan.add_host()
    subprocess.run(["bridge", "-n", lan.name, "link", "set", "dev", lan.port(host), "hairpin", "on"], check=True)

    def returned(frame: bytes) -> list[tuple[float, bytes]]:
        seen = sighting(frame)
        return [(3600, b"")] if seen and (seen.address, seen.mac) == (address, host.mac) else []

    async def ask() -> str | None:
        async with probing(host) as nic:
            await nic.announce(address)
            return await nic.conflict(address)

    with Answering(host, returned) as station:
        assert asyncio.run(ask()) is None
        assert station.heard.is_set(), "the bridge returned nothing, so this test shows nothing"


def advertisement(mac: str, tagged: bytes = b"", **changes: Any) -> bytes:
    """An advertisement of `mac` for the free address; `changes` break it."""
    ip6 = {"src": str(FREE6), "dst": "ff02::1", "hlim": 255, "nh": 58}
    message = {"tgt": str(FREE6), "R": 0, "S": 0, "O": 1}
    layers = [{k: changes.get(k, v) for k, v in fields.items()} for fields in (ip6, message)]
    rest = {k: v for k, v in changes.items() if k in ("code", "cksum")}
    option = ICMPv6NDOptDstLLAddr(lladdr=mac, len=changes.get("len", 1))
    frame = bytes(
        Ether(src=mac, dst="33:33:00:00:00:01", type=0x86DD)
        / IPv6(**layers[0])
        / ICMPv6ND_NA(**layers[1], **rest)
        / option
    )
    return frame[:12] + tagged + frame[12:]


def answer_found(lan: Segment, answer: Callable[[str], bytes], address: Address) -> str | None:
    """What is found if a rival answers each probe for `address` by `answer(its MAC)`."""
    rival, host = lan.add_host(), lan.add_host()

    def respond(frame: bytes) -> list[tuple[float, bytes]]:
        seen = sighting(frame)
        return [(0, answer(rival.mac))] if seen and seen.asking and seen.address == address else []

    with Answering(rival, respond) as station:
        found = find(host, address)
        assert station.heard.is_set()
    return "rival" if found == rival.mac else found


@pytest.mark.parametrize(
    "changes",
    [{"hlim": 254}, {"cksum": 1}, {"code": 3}, {"S": 1}, {"len": 0}, {"len": 3}, {"tgt": "fd00:9::7"}],
    ids=str,
)
def test_malformed_advertisements_are_ignored(lan: Segment, changes: dict[str, Any]) -> None:
    assert answer_found(lan, lambda mac: advertisement(mac, **changes), FREE6) is None


@pytest.mark.parametrize(("tag", "found"), [(b"", "rival"), (b"\x81\0\0\0", "rival"), (b"\x81\0\0\x07", None)])
@pytest.mark.parametrize("address", FREE, ids=str)
def test_only_the_untagged_segment_counts(lan: Segment, tag: bytes, found: str | None, address: Address) -> None:
    """A trunk port delivers other VLANs' frames; the same address may be in use there. VLAN 0 is only a priority."""

    def answer(mac: str) -> bytes:
        if isinstance(address, IPv6Address):
            return advertisement(mac, tag)
        frame = bytes(Ether(src=mac, dst="ff:ff:ff:ff:ff:ff", type=0x806) / ARP(op=2, hwsrc=mac, psrc=str(FREE4)))
        return frame[:12] + tag + frame[12:]

    assert answer_found(lan, answer, address) == found


def test_a_station_that_answers_for_all_is_reported(lan: Segment) -> None:
    """Proxy ARP as some routers do it; the caller bounds what it costs."""
    router, host = lan.add_host(), lan.add_host()

    def respond(frame: bytes) -> list[tuple[float, bytes]]:
        request = Ether(frame).getlayer(ARP)
        if request is None or request.op != 1:
            return []
        reply = ARP(op=2, hwsrc=router.mac, psrc=request.pdst, hwdst=request.hwsrc, pdst=request.psrc)
        return [(0, bytes(Ether(src=router.mac, dst=request.hwsrc, type=0x806) / reply))]

    async def ask() -> list[str | None]:
        async with probing(host, PATIENT) as nic:
            return [await nic.conflict(IPv4Address(f"10.9.0.{n}")) for n in range(20, 23)]

    with Answering(router, respond):
        assert asyncio.run(ask()) == [router.mac] * 3


def test_linux_does_not_proxy_for_a_probe(lan: Segment) -> None:
    """It tells an ARP probe by its sender 0.0.0.0 and answers only for its own addresses."""
    router, host = lan.add_host("10.9.0.1/24"), lan.add_host()
    router.ip("link", "add", "up0", "type", "veth", "peer", "name", "up1")
    for name in ("up0", "up1"):
        router.ip("link", "set", name, "up")
    router.ip("route", "add", "10.9.0.128/25", "dev", "up0")
    router.sysctl("net.ipv4.conf.eth0.proxy_arp=1", "net.ipv4.ip_forward=1", "net.ipv4.neigh.eth0.proxy_delay=0")

    async def ask() -> tuple[str | None, str | None]:
        async with probing(host) as nic:
            proxied = IPv4Address("10.9.0.200")
            return await nic.conflict(proxied), await nic.gateway(proxied, FREE4)

    assert asyncio.run(ask()) == (None, router.mac)


@pytest.mark.parametrize(
    ("gateway", "source"),
    [("10.9.0.5", "10.9.0.6"), ("fd00:9::5", "fd00:9::6"), ("fe80::5b:1", "fd00:9::6")],
)
def test_the_gateway_answers(lan: Segment, gateway: str, source: str) -> None:
    router, host = lan.add_host(f"{USED4}/24", f"{USED6}/64", "fe80::5b:1/64"), lan.add_host()

    async def ask() -> str | None:
        async with probing(host, PATIENT) as nic:
            return await nic.gateway(ip_address(gateway), ip_address(source))

    assert asyncio.run(ask()) == router.mac


@pytest.mark.parametrize(("gateway", "source"), [("10.9.0.1", "10.9.0.6"), ("fd00:9::1", "fd00:9::6")])
def test_a_silent_gateway_takes_its_wait(lan: Segment, gateway: str, source: str) -> None:
    lan.add_host(f"{USED4}/24", f"{USED6}/64")
    host = lan.add_host()

    async def ask() -> float:
        async with probing(host, ProbeSettings(gateway_wait=0.25)) as nic:
            began = time.monotonic()
            assert await nic.gateway(ip_address(gateway), ip_address(source)) is None
            return time.monotonic() - began

    assert 0.25 <= asyncio.run(ask()) < 0.5


def test_others_that_ask_for_the_gateway_are_not_the_gateway(lan: Segment) -> None:
    one, other = lan.add_host(), lan.add_host()
    gateways: list[tuple[Address, Address]] = [
        (IPv4Address("10.9.0.1"), FREE4),
        (IPv6Address("fd00:9::1"), FREE6),
    ]

    async def ask() -> list[str | None]:
        async with probing(one) as first, probing(other) as second:
            questions = [nic.gateway(*pair) for pair in gateways for nic in (first, second)]
            return list(await asyncio.gather(*questions, *(second.conflict(gateway) for gateway, _ in gateways)))

    found = asyncio.run(ask())
    assert found[:4] == [None] * 4


def test_the_conflict_question_enters_no_cache(lan: Segment) -> None:
    owner, host = lan.add_host(f"{USED4}/24", f"{USED6}/64"), lan.add_host()
    for address in (*USED, *FREE):
        find(host, address)
    assert not {str(address) for address in (*USED, *FREE)} & set(neighbours(owner))
    assert host.mac not in neighbours(owner).values()


def test_asking_for_a_gateway_does_not_take_its_address_away(lan: Segment) -> None:
    """A router that is still checking its address must not take us for a second claimant."""
    router, host = lan.add_host(), lan.add_host()
    gateway = IPv6Address("fd00:9::1")

    def states() -> str:
        command = ["ip", "-n", router.netns, "-6", "address", "show", "dev", "eth0", "to", f"{gateway}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    async def ask() -> None:
        async with probing(host, ProbeSettings(gateway_wait=0.2)) as nic:
            router.ip("address", "add", f"{gateway}/64", "dev", "eth0")
            assert "tentative" in states()
            await nic.gateway(gateway, FREE6)
            await until(lambda: "tentative" not in states())
            assert "dadfailed" not in states()
            assert await nic.gateway(gateway, FREE6) == router.mac

    asyncio.run(ask())


@pytest.mark.parametrize("address", FREE, ids=str)
def test_an_announcement_corrects_a_stale_neighbour(lan: Segment, address: Address) -> None:
    neighbour, host = lan.add_host(f"{USED4}/24", f"{USED6}/64"), lan.add_host()
    neighbour.ip("neigh", "add", str(address), "lladdr", "02:de:ad:00:00:01", "dev", "eth0", "nud", "stale")

    async def tell() -> None:
        async with probing(host) as nic:
            await nic.announce(address)
            await until(lambda: neighbours(neighbour)[str(address)] == host.mac)

    asyncio.run(tell())


def take_down(lan: Segment, host: Host) -> None:
    host.ip("link", "set", "eth0", "down")


def flap(lan: Segment, host: Host) -> None:
    host.ip("link", "set", "eth0", "down")
    host.ip("link", "set", "eth0", "up")


def lose_carrier(lan: Segment, host: Host) -> None:
    lan.ip("link", "set", lan.port(host), "down")


def flap_carrier(lan: Segment, host: Host) -> None:
    lan.ip("link", "set", lan.port(host), "down")
    lan.ip("link", "set", lan.port(host), "up")


def remove(lan: Segment, host: Host) -> None:
    host.ip("link", "delete", "eth0")


@pytest.mark.parametrize("disturb", [take_down, flap, lose_carrier, flap_carrier, remove])
def test_a_disturbed_link_is_unknown_not_free(lan: Segment, disturb: Callable[[Segment, Host], None]) -> None:
    witness, host = lan.add_host(), lan.add_host()

    def heard(frame: bytes) -> list[tuple[float, bytes]]:
        seen = sighting(frame)
        return [(3600, b"")] if seen and seen.asking and seen.address == FREE4 else []

    async def ask() -> None:
        async with probing(host, ProbeSettings(wait=2.0, frames=1)) as nic:
            questions = [asyncio.create_task(nic.conflict(address)) for address in FREE]
            await until(station.heard.is_set)
            disturb(lan, host)
            for outcome in await asyncio.gather(*questions, return_exceptions=True):
                assert isinstance(outcome, ProbeUnknownError)
                assert str(outcome).startswith("eth0: ")
            with pytest.raises(ProbeUnknownError):
                await nic.conflict(FREE4)
            with pytest.raises(ProbeUnknownError):
                await nic.announce(FREE4)

    with Answering(witness, heard) as station:
        began = time.monotonic()
        asyncio.run(ask())
        assert time.monotonic() - began < 1.9, "the end of the wait noticed it, not the event"


def test_a_nic_without_carrier_is_unknown(lan: Segment) -> None:
    host = lan.add_host(up=False)
    lan.ip("link", "set", lan.port(host), "down")
    with pytest.raises(ProbeUnknownError, match=r"^eth0: not operational after 0\.2 s$"):
        find(host, FREE4, ProbeSettings(up_wait=0.2))


def test_the_carrier_is_waited_for(lan: Segment) -> None:
    owner, host = lan.add_host(f"{USED4}/24"), lan.add_host(up=False)
    lan.ip("link", "set", lan.port(host), "down")
    plug = threading.Timer(0.2, lan.ip, ("link", "set", lan.port(host), "up"))
    plug.start()
    try:
        assert find(host, USED4, PATIENT) == owner.mac
    finally:
        plug.join()


def test_a_missing_nic_is_unknown(lan: Segment) -> None:
    host = lan.add_host()

    async def ask() -> None:
        prober = Prober(ProbeSettings())
        plain = os.open("/dev/null", os.O_RDONLY)
        try:
            with pytest.raises(ProbeUnknownError, match=r"^net7: .*No such device$"):
                await prober.open(host.fd, "net7")
            with pytest.raises(ProbeUnknownError, match=r"^lo: not an Ethernet NIC$"):
                await prober.open(host.fd, "lo")
            with pytest.raises(ProbeUnknownError, match=r"^eth0: .*Invalid argument$"):
                await prober.open(plain, "eth0")
        finally:
            os.close(plain)
            await prober.close()

    asyncio.run(ask())


def test_a_flood_is_unknown_not_free(lan: Segment) -> None:
    """Frames that pass the filter and break the rules only afterwards, faster than they can be read."""
    rival, host = lan.add_host(), lan.add_host()
    broken = advertisement(rival.mac, cksum=1)

    async def ask() -> None:
        flooding = in_netns(rival.fd, raw_socket)
        try:
            async with probing(host, ProbeSettings(wait=0.05)) as nic:
                question = asyncio.create_task(nic.conflict(FREE6))
                await until(lambda: bool(nic._questions))
                for _ in range(2000):
                    flooding.send(broken)
                with pytest.raises(ProbeUnknownError, match=r"lost|flooded"):
                    await question
        finally:
            flooding.close()

    asyncio.run(ask())


def test_lost_news_of_the_link_are_unknown_not_free(lan: Segment) -> None:
    """ENOBUFS: the link may have been down in between."""
    host = lan.add_host()

    async def ask() -> None:
        async with probing(host, ProbeSettings(wait=1.0)) as nic:
            question = asyncio.create_task(nic.conflict(FREE4))
            await until(lambda: any(one.sent for one in nic._questions))
            with socket.socket(fileno=os.dup(nic._sockets.link.fileno())) as netlink:
                netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            for length in range(100, 140):  # the event loop waits, and reads nothing meanwhile
                host.ip("link", "set", "eth0", "txqueuelen", str(length))
            with pytest.raises(ProbeUnknownError, match="No buffer space available"):
                await question

    asyncio.run(ask())


@pytest.mark.parametrize(("address", "found"), [(USED4, True), (USED6, True), (FREE4, False), (FREE6, False)], ids=str)
def test_signals_are_no_answer(lan: Segment, address: Address, found: bool) -> None:
    """EINTR, several hundred times while one question is open (upstream issue 4975)."""
    owner, host = lan.add_host(f"{USED4}/24", f"{USED6}/64"), lan.add_host()
    caught = []
    before = signal.signal(signal.SIGALRM, lambda number, _: caught.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        result = find(host, address, ProbeSettings(wait=0.3))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert result == (owner.mac if found else None)
    assert caught


def test_an_answer_that_a_busy_event_loop_has_not_read_counts(lan: Segment) -> None:
    """It came in time, behind more frames than are read in one go."""
    rival, host = lan.add_host(), lan.add_host()
    answers = [advertisement(rival.mac, cksum=1)] * 40 + [advertisement(rival.mac)]

    def respond(frame: bytes) -> list[tuple[float, bytes]]:
        seen = sighting(frame)
        asked = seen and seen.asking and seen.address == FREE6
        return [(0.2 + number / 1e6, answer) for number, answer in enumerate(answers)] if asked else []

    async def ask() -> str | None:
        async with probing(host, ProbeSettings(wait=0.6, frames=1)) as nic:
            question = asyncio.create_task(nic.conflict(FREE6))
            await until(lambda: any(one.sent for one in nic._questions))
            time.sleep(0.7)  # noqa: ASYNC251 - the event loop is kept busy past the end of the wait
            return await question

    with Answering(rival, respond):
        assert asyncio.run(ask()) == rival.mac


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_left_open(lan: Segment) -> None:
    host = lan.add_host()

    async def ask() -> None:
        prober = Prober(ProbeSettings(wait=0.02))
        for _ in range(3):
            opening = asyncio.create_task(prober.open(host.fd, "eth0"))
            await asyncio.sleep(0)
            opening.cancel()
            async with await prober.open(host.fd, "eth0") as nic:
                question = asyncio.create_task(nic.conflict(FREE6))
                await asyncio.sleep(0)
                question.cancel()
                assert await nic.conflict(FREE4) is None
        await prober.close()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("probe-")]

    before = open_files()
    asyncio.run(ask())
    assert open_files() == before


def test_no_more_nics_than_allowed(lan: Segment) -> None:
    host = lan.add_host()

    async def ask() -> None:
        prober = Prober(ProbeSettings(nics=1, up_wait=0.3))
        try:
            async with await prober.open(host.fd, "eth0"):
                with pytest.raises(ProbeUnknownError, match="not operational after"):
                    await prober.open(host.fd, "eth0")
            for _ in range(3):
                (await prober.open(host.fd, "eth0")).close()
        finally:
            await prober.close()

    asyncio.run(ask())
