"""Who answers by which NIC: exchanges with a pod, each captured on both sides and judged by its frames.

    with Wire(node, pod) as wire:
        wire.answers_by_its_own_nic(4)
        wire.reaches_its_node(4)

It works for pods of any kind of NIC, here and in the virtual machine.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from ipaddress import ip_address
from typing import Any, NamedTuple, Self

from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from plugins.net.netns import in_netns
from tests.integration.coordinator_node import (
    FAR4,
    FAR6,
    NODE4,
    NODE6,
    SECOND4,
    SECOND6,
    Node,
    Pod,
    add_address,
    node,
    ping,
    tcp,
    udp,
)
from tests.matrix import Case

ETH_P_IP = 0x0800
VIP = {4: "10.96.0.10", 6: "fd00:96::10"}
"""Of a service; the node has it, so whoever asks for it by way of the node is answered."""


def serve_vips(here: Node) -> None:
    """Give the node the service's addresses."""
    for vip in VIP.values():
        add_address(here.name, vip, "lo", whole=True)


@contextmanager
def serving_node() -> Iterator[Node]:
    """A node with a service."""
    with node() as made:
        serve_vips(made)
        yield made


def make(here: Node, mode: str, count: int, versions: str = "46") -> Pod:
    """A pod with so many further NICs, wired; they are on the segments from number 1 on."""
    if mode == "overlay":
        pod = here.overlay_pod(versions)
    else:
        pod = underlay_pod(here, versions)
        here.add(pod)
    for number in range(1, count + 1):
        here.add(pod, here.nic(pod, number, versions))
    return pod


def underlay_pod(here: Node, versions: str) -> Pod:
    """A pod whose first NIC is on segment 0, not wired."""
    number = len(here.pods) + 10
    return here.pod(*(here.segments[0].address(int(version), number) for version in versions))


def of(pod: Pod, ifname: str, version: int) -> str:
    """The address of a NIC."""
    return _all_of(pod, ifname, version)[0]


def _all_of(pod: Pod, ifname: str, version: int) -> list[str]:
    return [address for address in pod.of(ifname) if (":" in address) == (version == 6)]


class Frame(NamedTuple):
    """Captured, as the link saw it."""

    link: str
    leaving: bool
    """Whether the namespace sent it by that link, or got it."""
    data: bytes

    @property
    def macs_and_ends(self) -> tuple[str, str, str, str]:
        """MAC addresses and IP addresses, each pair from source to destination."""
        # Headers one by one: scapy would look into what they carry as well, which takes it ten times as long.
        outer = Ether(self.data[:14])
        inner = IP(self.data[14:34]) if outer.type == ETH_P_IP else IPv6(self.data[14:54])
        return outer.src, outer.dst, inner.src, inner.dst

    def __str__(self) -> str:
        return f"{self.link} {'out' if self.leaving else 'in '} {Ether(self.data).summary()}"


class Tap:
    """What passes all links of a namespace."""

    def __init__(self, fd: int) -> None:
        everything = socket.htons(0x0003)
        self._socket = in_netns(fd, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, everything))
        self._socket.setblocking(False)

    def close(self) -> None:
        self._socket.close()

    def take(self, one: str, other: str) -> list[Frame]:
        """What passed between two addresses since the last call: of each link and direction and pair of MACs one."""
        ends = {ip_address(one).packed, ip_address(other).packed}
        v4 = len(ip_address(one).packed) == 4
        first, length = (26, 4) if v4 else (22, 16)
        kind = b"\x08\x00" if v4 else b"\x86\xdd"
        found: dict[tuple[str, bool, bytes, bytes], bytes] = {}
        while True:
            try:
                data, (link, _, way, *_) = self._socket.recvfrom(2000)
            except BlockingIOError:
                return [Frame(link, leaving, data) for (link, leaving, _, _), data in found.items()]
            source = data[first : first + length]
            if data[12:14] == kind and {source, data[first + length : first + 2 * length]} == ends:
                leaving = way == 4  # PACKET_OUTGOING
                found.setdefault((link, leaving, data[:12], source), data)


class Wire:
    """Taps in the pod, on its node and in all segments, from `with` on."""

    def __init__(self, here: Node, pod: Pod) -> None:
        self._here, self._pod = here, pod
        self._stack = ExitStack()
        self._taps: dict[int, Tap] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            outside = {segment.fd for segment in self._here.segments.values()}
            for fd in (self._pod.fd, self._here.fd, *outside):
                self._taps[fd] = Tap(fd)
                stack.callback(self._taps[fd].close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _captured(self, one: str, other: str) -> dict[int, list[Frame]]:
        return {fd: tap.take(one, other) for fd, tap in self._taps.items()}

    def _exchange(self, own: str, peer: str, talk: Callable[[], object], link: str, end: tuple[int, str]) -> None:
        """Let `own`, in the pod, and `peer` talk: by that link of the pod, `end` being the other end, and by no other.

        An end is a namespace's descriptor and the name of a link there.
        """
        before = self._captured(own, peer)
        assert not any(before.values()), self._told(before, f"{own} and {peer} talked before they were to")
        wrong = ""
        try:
            talk()
        except (OSError, AssertionError) as error:
            wrong = f"{error!r}; "
        seen = self._captured(own, peer)
        inside = {(frame.link, frame.leaving, *frame.macs_and_ends) for frame in seen[self._pod.fd]}
        outside = {(f.leaving, *f.macs_and_ends) for f in seen[end[0]] if f.link == end[1]}
        ways = {(nic, leaving, source, target) for nic, leaving, _, _, source, target in inside}
        if ways != {(link, True, own, peer), (link, False, peer, own)}:
            wrong += f"not by {link} in the pod alone; "
        if outside != {(not leaving, *others) for _, leaving, *others in inside}:
            wrong += f"other frames at the other end, {end[1]}, or other MAC addresses; "
        strangers = self._taps.keys() - {self._pod.fd, self._here.fd, end[0]}
        if any(seen[fd] for fd in strangers):
            wrong += "others heard it; "
        assert not wrong, self._told(seen, f"{wrong}{own} and {peer}")

    def _told(self, seen: dict[int, list[Frame]], what: str) -> str:
        names = {self._pod.fd: "pod", self._here.fd: "node"}
        lines = [what, *(f"{names.get(fd, 'outside'):8}{frame}" for fd, frames in seen.items() for frame in frames)]
        for family in ("-4", "-6"):
            lines += [self._pod.ip(family, "rule"), self._pod.ip(family, "route", "show", "table", "all")]
        return "\n".join(lines)

    def answers_by_its_own_nic(self, version: int) -> None:
        """Everybody's request to a NIC on a segment is answered by that NIC."""
        asked = [(own, nic) for nic in self._pod.seats for own in _all_of(self._pod, nic, version)]
        for own, ifname in asked:
            segment = self._pod.seats[ifname]
            end = segment.fd, segment.link
            near, behind = segment.gateway(version), segment.behind(version)
            for asker, talk in (
                (near, partial(udp, segment.fd, self._pod.fd, own, near)),
                (behind, partial(ping, segment.fd, own, behind)),
                (behind, partial(tcp, segment.fd, self._pod.fd, own, behind)),
            ):
                self._exchange(own, asker, talk, ifname, end)

    def reaches_its_node(self, version: int) -> None:
        """Node to every address of the pod and back, and the pod to services: all by the link between them."""
        nodes = (NODE4, SECOND4) if version == 4 else (NODE6, SECOND6)
        far = FAR4 if version == 4 else FAR6
        here, pod = self._here.fd, self._pod.fd
        end = (here, self._pod.node_end)
        for ifname in ("eth0", *self._pod.further):
            own = of(self._pod, ifname, version)
            for address, one, other in zip(nodes, (tcp, udp), (udp, tcp), strict=True):
                self._exchange(own, address, partial(one, here, pod, own, address), self._pod.lead, end)
                self._exchange(own, address, partial(other, pod, here, address, own), self._pod.lead, end)
            vip = VIP[version]
            self._exchange(own, vip, partial(tcp, pod, here, vip, own), self._pod.lead, end)
            if not self._pod.overlay:  # the mark leads back what was forwarded, whichever address it was for
                talk = partial(tcp, self._here.far_fd, pod, own, far)
                self._exchange(own, far, talk, self._pod.lead, end)
        unbound = of(self._pod, "eth0", version)
        for address in (nodes[1], VIP[version]):
            self._exchange(unbound, address, partial(tcp, pod, here, address), self._pod.lead, end)


def judge(here: Node, pod: Pod, *versions: int) -> None:
    """All that must hold of a wired pod's packets."""
    with Wire(here, pod) as wire:
        for version in versions:
            wire.answers_by_its_own_nic(version)
            wire.reaches_its_node(version)


def run_case(here: Node, case: Case, **config: Any) -> None:
    """A pod of the matrix: it is wired, its packets and CHECK are right, and DEL leaves nothing."""
    overlay = case.mode == "overlay"
    pod = here.overlay_pod(case.families) if overlay else underlay_pod(here, case.families)
    names = [] if overlay else ["eth0"]
    if not overlay:
        here.add(pod, **config)
    for number in range(len(names), case.nics):
        names.append(here.nic(pod, number, case.families, f"net{number + overlay}"))
        here.add(pod, names[-1], **config)
    judge(here, pod, *map(int, case.families))
    defaults = pod.ip("route", "show", "default") + pod.ip("-6", "route", "show", "default")
    assert defaults.count("default") == defaults.count("dev eth0") == len(case.families), defaults
    macs = [link["address"] for link in json.loads(pod.ip("-j", "link")) if link["ifname"] in names]
    assert all(mac.startswith(config.get("podMACPrefix", "")) for mac in macs), macs
    for name in names:
        here.check(pod, name, **config)
    for name in reversed(names):
        here.delete(pod, name, **config)
    here.remove(pod)
    assert here.left() == ""
