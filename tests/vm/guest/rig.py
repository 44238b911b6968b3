"""The guest's network for tests: an outside host on the far side of the wires, pods with NICs of every kind here.

    with Rig() as rig, rig.pod("spt-pod") as pod:
        rig.attach("ipvlan", pod, "net1", number=5)     # 10.9.1.5/24 and fd00:9:1::5/64
        reach(pod, "10.9.1.1")                          # the outside host on the same wire

Wires and NICs are those of lab/vm/machine.py. The guest's first network namespace is the node.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

OUTSIDE = "spt-outside"
PF = "pf1"
VFS = 7
FAR = ("far1", "far2", "far3")
NICS = "/sys/class/net"
DEADLINE = 20.0
"""Seconds for anything that the network needs to come about; the guest computes slower than a machine by ten times."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A network between the node and the outside host."""

    number: int
    """The third number of its addresses."""
    node: str
    """The link on the node that pods' NICs are made on."""
    far: str
    """The link in the outside host."""

    def v4(self, host: int) -> str:
        """An address; the outside host is number 1."""
        return f"10.9.{self.number}.{host}"

    def v6(self, host: int) -> str:
        """An address; the outside host is number 1."""
        return f"fd00:9:{self.number}::{host:x}"


PLAIN = Segment(1, "node1", "far1")
TAGGED = Segment(2, "node1", "far1.100")
"""The tag is the pod's own affair: its NIC is a VLAN sub-interface."""
TRUNK = Segment(3, "node1.200", "far1.200")
"""Here the node's sub-interface is the master."""
BONDED = Segment(4, "spt-bond", "spt-bond")
SEGMENTS = (PLAIN, TAGGED, TRUNK, BONDED)

MACVLAN, IPVLAN = ("type", "macvlan", "mode", "bridge"), ("type", "ipvlan", "mode", "l2")
KINDS: dict[str, tuple[Segment, tuple[str, ...]]] = {
    "macvlan": (PLAIN, MACVLAN),
    "ipvlan": (PLAIN, IPVLAN),
    "sriov": (PLAIN, ()),
    "vlan": (TAGGED, ("type", "vlan", "id", "100")),
    "macvlan-on-vlan": (TRUNK, MACVLAN),
    "ipvlan-on-vlan": (TRUNK, IPVLAN),
    "bond": (BONDED, MACVLAN),
    "ipvlan-on-bond": (BONDED, IPVLAN),
}
"""Segment, and type of the link in `ip link add`; a VF is there already. A bond cannot be moved into a namespace."""


def ip(*words: str, netns: str = "") -> str:
    """What `ip` prints. Raises AssertionError with what it complains about."""
    argv = ["ip", *(("-n", netns) if netns else ()), *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout


def ip_batch(*commands: str, netns: str = "") -> None:
    """Have one `ip` carry out commands, one after another. Raises AssertionError with what it complains about."""
    argv = ["ip", *(("-n", netns) if netns else ()), "-batch", "-"]
    text = "".join(f"{command}\n" for command in commands)
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert done.returncode == 0, f"{'; '.join(commands)}: {done.stderr}"


def links(netns: str = "") -> dict[str, Any]:
    """All links as `ip` tells them in JSON, by name."""
    return {link["ifname"]: link for link in json.loads(ip("-d", "-j", "link", "show", netns=netns))}


def until(condition: Callable[[], object], what: str, seconds: float = DEADLINE) -> None:
    """Wait for a condition. Raises AssertionError naming it after the deadline."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


def answers(netns: str, address: str, seconds: int = 1) -> bool:
    """Whether one echo request from the namespace is answered in time."""
    argv = ["nsenter", f"--net=/run/netns/{netns}", "/bin/busybox", "ping", "-c", "1", "-W", str(seconds), address]
    return subprocess.run(argv, capture_output=True, check=False, timeout=DEADLINE).returncode == 0


def reach(netns: str, address: str) -> None:
    """Wait until the address answers. Raises AssertionError after the deadline."""
    until(lambda: answers(netns, address), f"{netns} reaches {address}")


def cable(nic: str, state: str) -> None:
    """Pull the cable of a node's NIC `out`, or put it `in` again: its carrier goes and comes."""
    port = os.open("/dev/virtio-ports/control", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(port, f"cable {nic} {state}\n".encode())
        reply = os.read(port, 100)
    finally:
        os.close(port)
    assert reply == b"done\n", reply


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """A network namespace with lo up."""
    ip("netns", "add", name)
    try:
        ip("link", "set", "lo", "up", netns=name)
        yield name
    finally:
        ip("netns", "delete", name)


def vfs() -> dict[int, str]:
    """The VFs that are on the node now, by their number."""
    folders = {number: f"{NICS}/{PF}/device/virtfn{number}/net" for number in range(VFS)}
    found = {number: os.listdir(folder) for number, folder in folders.items() if os.path.isdir(folder)}
    return {number: names[0] for number, names in found.items() if names}


def free_vf() -> str:
    """A VF that is on the node; all are made when the first is wanted, and stay."""
    path = f"{NICS}/{PF}/device/sriov_numvfs"
    with open(path) as file:
        there = int(file.read())
    if there != VFS:
        ip("link", "set", PF, "up")
        with open(path, "w") as file:
            file.write(str(VFS))
        until(lambda: len(vfs()) == VFS, f"{PF} has {VFS} VFs on the node")
    return next(iter(vfs().values()))


@dataclass
class Rig:
    """The outside host, from `with` on, and what is added to it; all of it goes at the end."""

    _stack: ExitStack = field(default_factory=ExitStack)
    _segments: set[Segment] = field(default_factory=set)
    _lent: dict[str, list[int]] = field(default_factory=dict)
    """The VFs that each pod was given."""

    def __enter__(self) -> Self:
        try:
            self._stack.callback(until, lambda: set(FAR) <= set(os.listdir(NICS)), "the far NICs are back on the node")
            self._stack.enter_context(namespace(OUTSIDE))
            ip_batch(*(f"link set {name} netns {OUTSIDE}" for name in FAR))
            ip_batch(*(f"link set {name} up" for name in FAR), netns=OUTSIDE)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def segment(self, segment: Segment) -> Segment:
        """Make the links of a segment on both sides, if they are not there yet, with the outside host's addresses."""
        if segment in self._segments:
            return segment
        self._segments.add(segment)
        for link, netns in ((segment.node, ""), (segment.far, OUTSIDE)):
            parent, _, vlan = link.partition(".")
            if vlan:
                ip("link", "set", parent, "up", netns=netns)
                self._add(link, netns, "link", parent, words=("type", "vlan", "id", vlan))
        if segment == BONDED:
            self.bond(segment.node, ("node2", "node3"), "", "mode", "active-backup", "miimon", "50")
            # Every frame goes out on both links: the node's bond may listen to either.
            self.bond(segment.far, ("far2", "far3"), OUTSIDE, "mode", "broadcast", "miimon", "50")
        ip("link", "set", segment.node, "up")
        ip("link", "set", segment.far, "up", netns=OUTSIDE)
        self.address(segment, OUTSIDE, segment.far, 1)
        return segment

    def _add(self, name: str, netns: str, *before: str, words: tuple[str, ...]) -> None:
        ip("link", "add", *before, "name", name, *words, netns=netns)
        if not netns:  # the others go with their namespace
            self._stack.callback(remove, name)

    def bond(self, name: str, slaves: tuple[str, ...], netns: str, *options: str) -> None:
        """Make a bond, up."""
        self._add(name, netns, words=("type", "bond", *options))
        commands = (f"link set {slave} {what}" for slave in slaves for what in ("down", f"master {name}"))
        ip_batch(*commands, f"link set {name} up", netns=netns)

    @contextmanager
    def pod(self, name: str) -> Iterator[str]:
        """A pod's network namespace. VFs that were moved there are back on the node afterwards, by their old names."""
        lent = self._lent.setdefault(name, [])
        with namespace(name):
            yield name
        until(lambda: set(lent) <= vfs().keys(), "the VFs are back on the node")
        # While a link of the node's is called net1, the kernel makes no other net1 for a pod.
        for number in lent:
            now = vfs()[number]
            ip_batch(f"link set {now} down", f"link set {now} name {PF}v{number}")

    def nic(self, kind: str, pod: str, name: str) -> Segment:
        """Give the pod a NIC without addresses, up, called `name`; the segment that it is on."""
        segment, words = KINDS[kind]
        self.segment(segment)
        if kind == "sriov":
            vf = free_vf()
            self._lent[pod].append(next(number for number, link in vfs().items() if link == vf))
            # A link that is up keeps its name.
            ip_batch(f"link set {vf} down", f"link set {vf} netns {pod} name {name}")
        else:
            ip("link", "add", "link", segment.node, "name", name, "netns", pod, *words)
        ip("link", "set", name, "up", netns=pod)
        return segment

    def attach(self, kind: str, pod: str, name: str, *, number: int) -> Segment:
        """Give the pod a NIC with one address of each family; the segment that it is on."""
        segment = self.nic(kind, pod, name)
        self.address(segment, pod, name, number)
        return segment

    @staticmethod
    def address(segment: Segment, netns: str, link: str, number: int) -> None:
        """Give a link one address of each family."""
        addresses = (f"{segment.v4(number)}/24", f"{segment.v6(number)}/64 nodad")
        ip_batch(*(f"addr add {address} dev {link}" for address in addresses), netns=netns)


def remove(name: str) -> None:
    """Delete a link of the node's, if it is still there."""
    subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True, timeout=DEADLINE)
