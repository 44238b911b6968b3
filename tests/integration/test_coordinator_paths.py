"""Packets to, from and through a pod that the coordinator has wired."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from functools import partial

import pytest

from tests.integration.coordinator_node import (
    FAR4,
    FAR6,
    FIRST4,
    NODE4,
    NODE6,
    ROUTER4,
    ROUTER6,
    SECOND4,
    SECOND6,
    SERVICE4,
    SHORT,
    Node,
    Pod,
    node,
    ping,
    sysctl,
    tcp,
    udp,
)

VIP4, VIP6 = "10.96.0.10", "fd00:96::10"


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node() as made:
        yield made


@pytest.fixture(scope="module")
def pod(here: Node) -> Pod:
    made = here.pod()
    here.add(made)
    return made


@pytest.mark.upstream("C00001")
@pytest.mark.parametrize("version", [4, 6])
def test_node_reaches_pod(here: Node, pod: Pod, version: int) -> None:
    target = pod.v4 if version == 4 else pod.v6
    assert tcp(here.fd, pod.fd, target) in (FIRST4, NODE4, NODE6, SECOND4, SECOND6)
    udp(here.fd, pod.fd, target)
    ping(here.fd, target)


@pytest.mark.parametrize("address", [FIRST4, NODE4, NODE6, SECOND4, SECOND6])
def test_pod_reaches_every_address_of_its_node(here: Node, pod: Pod, address: str) -> None:
    own = pod.v6 if ":" in address else pod.v4
    assert tcp(pod.fd, here.fd, address) == own
    assert udp(pod.fd, here.fd, address) == own
    ping(pod.fd, address)
    # and what the node sends from that very address
    assert tcp(here.fd, pod.fd, own, address) == address


def test_an_address_that_comes_later_does_not_speak_for_the_pod(here: Node) -> None:
    """As on a segment with router advertisements: the node has no route to it, and so the kernel must not choose it."""
    other = here.pod()
    here.add(other)
    other.ip("address", "add", "fd31:9::ffff:1/64", "dev", "eth0", "nodad")
    for address in (NODE6, SECOND6):
        assert tcp(other.fd, here.fd, address, wait=1) == other.v6
    here.check(other)
    single = here.pod("172.31.9.91")
    here.add(single)
    single.ip("address", "add", "fd31:9::ffff:3/64", "dev", "eth0", "nodad")
    here.check(single)
    # Addresses that configured themselves before are no choice either, nor is one that is still being checked.
    late = here.pod()
    late.ip("address", "add", "fd31:9::ffff:2/64", "dev", "eth0", "valid_lft", "900", "preferred_lft", "900", "nodad")
    here.add(late)
    assert tcp(late.fd, here.fd, NODE6) == late.v6
    unsettled = here.pod("172.31.9.90")
    unsettled.addresses.append("fd31:9::90")
    unsettled.ip("address", "add", "fd31:9::90/64", "dev", "eth0")
    here.add(unsettled)
    here.check(unsettled)


@pytest.mark.parametrize(("vip", "length"), [(VIP4, 32), (VIP6, 128)])
def test_services_are_asked_for_at_the_node(here: Node, pod: Pod, vip: str, length: int) -> None:
    here.ip("address", "add", f"{vip}/{length}", "dev", "lo", *(["nodad"] if ":" in vip else []))
    try:
        before = _received(here, pod.host_link)
        assert tcp(pod.fd, here.fd, vip) == (pod.v6 if ":" in vip else pod.v4)
        assert _received(here, pod.host_link) > before
    finally:
        here.ip("address", "del", f"{vip}/{length}", "dev", "lo")


def _received(here: Node, link: str) -> int:
    def read() -> int:
        with open("/proc/thread-self/net/dev") as file:
            return next(int(line.split()[2]) for line in file if line.split()[0] == f"{link}:")

    return here.run(read)


@pytest.mark.parametrize("version", [4, 6])
def test_the_segment_reaches_the_pod_by_its_own_nic(here: Node, pod: Pod, version: int) -> None:
    own, router = (pod.v4, ROUTER4) if version == 4 else (pod.v6, ROUTER6)

    def unseen_by_the_node() -> bool:
        before = _received(here, pod.host_link)
        assert tcp(here.router_fd, pod.fd, own) == router
        assert tcp(pod.fd, here.router_fd, router) == own
        assert udp(here.router_fd, pod.fd, own) == router
        ping(here.router_fd, own)
        return _received(here, pod.host_link) == before

    # veth0's own router solicitations and listener reports come seconds apart.
    assert any(unseen_by_the_node() for _ in range(3))


@pytest.mark.upstream("C00013")
@pytest.mark.parametrize("version", [4, 6])
def test_what_came_by_the_node_is_answered_by_the_node(here: Node, pod: Pod, version: int) -> None:
    """From an address that is not the node's: without marks the pod would answer by its router, which knows no way."""
    own, far = (pod.v4, FAR4) if version == 4 else (pod.v6, FAR6)
    for _ in range(2):
        assert tcp(here.far_fd, pod.fd, own, far) == far
        assert udp(here.far_fd, pod.fd, own, far) == far
        ping(here.far_fd, own, far)


def test_without_marks_it_would_not_be_answered(here: Node) -> None:
    """The test above can fail."""
    other = here.pod()
    here.add(other)
    other.run(lambda: subprocess.run(["nft", "delete", "table", "inet", "spiderpool"], check=True, timeout=10))
    for own, far in ((other.v4, FAR4), (other.v6, FAR6)):
        with pytest.raises(TimeoutError):
            tcp(here.far_fd, other.fd, own, far, wait=SHORT)
        with pytest.raises(TimeoutError):
            ping(here.far_fd, own, far, wait=SHORT)


@pytest.mark.parametrize("router", [ROUTER4, ROUTER6])
def test_an_applications_own_mark_survives(here: Node, router: str) -> None:
    """Meshes tell their own packets by SO_MARK; only what goes back through veth0 is ours to mark."""
    other = here.pod()
    here.add(other)
    rules = "table inet seen { chain output { type filter hook output priority 0; meta mark 1337 counter; }; }"
    other.run(lambda: subprocess.run(["nft", rules], check=True, timeout=10))
    family = socket.AF_INET6 if ":" in router else socket.AF_INET
    with other.run(lambda: socket.socket(family, socket.SOCK_DGRAM)) as sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1337)
        for _ in range(3):
            sender.sendto(b"marked", (router, 9))
    seen = other.run(lambda: subprocess.check_output(["nft", "list", "table", "inet", "seen"], timeout=10))
    assert b"counter packets 3 " in seen


@pytest.mark.parametrize("rp_filter", ["1", "2"])
def test_strict_and_loose_nodes(rp_filter: str) -> None:
    """Nodes come with any rp_filter, and namespaces inherit it: nothing of the above may depend on it."""
    with node() as here:
        pod = here.pod()
        for place in (here, pod):
            for name in ("all", "default", "eth0"):
                place.run(partial(sysctl, f"ipv4/conf/{name}/rp_filter", rp_filter))
        here.add(pod)
        for address in (NODE4, SECOND4):
            assert tcp(pod.fd, here.fd, address) == pod.v4
            assert tcp(here.fd, pod.fd, pod.v4, address) == address
        assert tcp(here.far_fd, pod.fd, pod.v4, FAR4) == FAR4
        assert udp(here.far_fd, pod.fd, pod.v4, FAR4) == FAR4
        assert here.run(lambda: _read("ipv4/conf/all/rp_filter")) == rp_filter, "the node's own settings are not ours"
        # A pod that asks for strictness keeps the way back if veth0 has an address, and to the node in any case.
        strict = here.pod()
        here.add(strict, podRPFilter=1, vethLinkAddress="169.254.100.1")
        assert tcp(here.fd, strict.fd, strict.v4, SECOND4) == SECOND4
        assert tcp(here.far_fd, strict.fd, strict.v4, FAR4) == FAR4
        assert strict.run(lambda: _read("ipv4/conf/eth0/rp_filter")) == "1"


def _read(path: str) -> str:
    with open(f"/proc/sys/net/{path}") as file:
        return file.read().strip()


@pytest.mark.parametrize("family", [4, 6])
def test_single_stack(family: int) -> None:
    with node() as here:
        pod = here.pod("172.31.9.40") if family == 4 else here.pod("fd31:9::40")
        here.add(pod, vethLinkAddress="169.254.100.1")
        here.check(pod, vethLinkAddress="169.254.100.1")
        own, far = (pod.addresses[0], FAR4 if family == 4 else FAR6)
        assert tcp(here.far_fd, pod.fd, own, far) == far
        assert tcp(pod.fd, here.fd, NODE4 if family == 4 else NODE6) == own
        assert ("169.254.100.1" in pod.ip("address")) == (family == 4)
        other = "-6" if family == 4 else "-4"
        assert "proto 83" not in pod.ip(other, "rule") + here.ip(other, "rule")
        here.delete(pod, fd=None)


def test_a_node_without_ipv6() -> None:
    """Its pods may be dual stack all the same; it is only the node itself that they do not reach by IPv6."""
    with node() as here:
        for name in ("all", "default"):
            here.run(partial(sysctl, f"ipv6/conf/{name}/disable_ipv6", "1"))
        pod = here.pod()
        here.add(pod)
        here.check(pod)
        assert tcp(here.far_fd, pod.fd, pod.v4, FAR4) == FAR4
        assert tcp(pod.fd, here.router_fd, ROUTER6) == pod.v6
        here.delete(pod)
        assert "proto 83" not in here.ip("rule")


def test_a_hijacked_network_that_is_an_address_of_the_node(here: Node) -> None:
    pod = here.pod()
    here.add(pod, hijackCIDR=[f"{NODE4}/32", f"{SECOND6}/128"])
    here.check(pod, hijackCIDR=[f"{NODE4}/32", f"{SECOND6}/128"])
    for address in (NODE4, SECOND6):
        assert tcp(pod.fd, here.fd, address)


def test_two_pods_of_one_node_and_a_policy_route(here: Node) -> None:
    first, second = here.pod(), here.pod()
    routes = [{"dst": "203.0.113.0/24", "gw": ROUTER4}, {"dst": "2001:db8:99::9", "gw": ROUTER6}]
    for each in (first, second):
        here.add(each, policyRoutes=routes)
    assert tcp(first.fd, second.fd, second.v4) == first.v4
    assert tcp(first.fd, second.fd, second.v6) == first.v6
    assert f"via {ROUTER4} dev eth0" in first.ip("route", "get", "203.0.113.5")
    assert f"via {ROUTER6} dev eth0" in first.ip("-6", "route", "get", "2001:db8:99::9")
    assert SERVICE4 in first.ip("route", "show", "dev", "veth0")
