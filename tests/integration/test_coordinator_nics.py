"""Pods with several NICs, in underlay and overlay mode: packets, tables, and what an operator may choose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.coordinator_node import (
    FAR4,
    FAR6,
    NODE4,
    NODE6,
    ROUTER4,
    ROUTER6,
    SECOND4,
    SECOND6,
    Node,
    Pod,
    Sent,
    ip,
    node,
    ping,
    tcp,
    udp,
)

VIP = {4: "10.96.0.10", 6: "fd00:96::10"}
ABROAD = {4: "172.31.21.200", 6: "fd31:21::200"}
"""An address in the first further segment's network that asks by the first NIC's router."""


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node() as made:
        for version, length in ((4, 32), (6, 128)):
            extra = ["nodad"] if version == 6 else []
            made.ip("address", "add", f"{VIP[version]}/{length}", "dev", "lo", *extra)
            ip("-n", made.router, "address", "add", f"{ABROAD[version]}/{length}", "dev", "lo", *extra)
        yield made


def make(here: Node, mode: str, count: int, versions: str = "46") -> Pod:
    """A pod with so many further NICs, wired."""
    if mode == "overlay":
        pod = here.overlay_pod(versions)
    else:
        number = len(here.pods) + 10
        pod = here.pod(*(f"172.31.9.{number}" if version == "4" else f"fd31:9::{number}" for version in versions))
        here.add(pod)
    for number in range(1, count + 1):
        here.add(pod, here.nic(pod, number, versions))
    return pod


def of(pod: Pod, ifname: str, version: int) -> str:
    return next(a for a in pod.of(ifname) if (":" in a) == (version == 6))


def answers_by_its_own_nic(here: Node, pod: Pod, version: int) -> None:
    """Everybody's request to each NIC is answered by that NIC."""
    with Sent(pod) as sent:
        for ifname in pod.further:
            own, segment = of(pod, ifname, version), here.segments[int(ifname[-1])]
            for asker in (segment.gateway(version), segment.behind(version)):
                assert tcp(segment.fd, pod.fd, own, asker) == asker
                assert sent.by(own, asker) == {ifname}
                assert udp(segment.fd, pod.fd, own, asker) == asker
                ping(segment.fd, own, asker)
                assert sent.by(own, asker) == {ifname}
        if not pod.overlay:
            own, router = of(pod, "eth0", version), ROUTER4 if version == 4 else ROUTER6
            for asker in (router, ABROAD[version]):
                assert tcp(here.router_fd, pod.fd, own, asker) == asker
                assert sent.by(own, asker) == {"eth0"}


def reaches_its_node(here: Node, pod: Pod, version: int) -> None:
    """Node to every address of the pod and back, all by the link between them."""
    nodes = (NODE4, SECOND4) if version == 4 else (NODE6, SECOND6)
    far = FAR4 if version == 4 else FAR6
    with Sent(pod) as sent:
        for ifname in ("eth0", *pod.further):
            own = of(pod, ifname, version)
            for address in nodes:
                assert tcp(here.fd, pod.fd, own, address) == address
                assert sent.by(own, address) == {pod.lead}
                assert tcp(pod.fd, here.fd, address, own) == own
                assert sent.by(own, address) == {pod.lead}
            assert tcp(pod.fd, here.fd, VIP[version], own) == own
            assert sent.by(own, VIP[version]) == {pod.lead}
            if not pod.overlay:  # the mark leads back what was forwarded, whichever address it was for
                assert tcp(here.far_fd, pod.fd, own, far) == far
                assert sent.by(own, far) == {pod.lead}
        unbound = of(pod, "eth0", version)
        for address in (*nodes, VIP[version]):
            assert tcp(pod.fd, here.fd, address) == unbound
            assert sent.by(unbound, address) == {pod.lead}


@pytest.mark.upstream("C00001", "C00002", "C00003", "C00004", "C00011", "C00012")
@pytest.mark.parametrize("versions", ["4", "6", "46"])
@pytest.mark.parametrize(
    ("mode", "count"), [("underlay", 0), ("underlay", 1), ("underlay", 2), ("overlay", 1), ("overlay", 2)]
)
def test_each_nic_answers_for_itself(here: Node, mode: str, count: int, versions: str) -> None:
    pod = make(here, mode, count, versions)
    for version in map(int, versions):
        answers_by_its_own_nic(here, pod, version)
        reaches_its_node(here, pod, version)
        default = pod.ip(f"-{version}", "route", "show", "default")
        assert default.count("default") == 1
        assert "dev eth0" in default
    for ifname in pod.further:
        here.check(pod, ifname)
    if not pod.overlay:
        here.check(pod)
