"""The coordinator's test node on the guest's wires: pods with NICs of one kind, each NIC on a segment of its own.

The node is the guest's first network namespace, with the wires' node side; all segments end in one outside host.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from plugins.cni import Call
from plugins.ifacer.ifacer import Ifacer
from plugins.ifacer.settings import IfacerSettings
from tests.integration.coordinator_node import (
    NODE4,
    NODE6,
    Node,
    Pod,
    Segment,
    add_address,
    batch,
    ip,
    namespaces,
    sysctl,
)
from tests.integration.coordinator_wire import VIP, serve_vips
from tests.vm.guest.rig import OUTSIDE, PF, Rig, free_vf, remove, until, vfs

BOND = "spt-bond"
NAME = "spt-node"


def ends(kind: str, number: int) -> tuple[str, str]:
    """The node's and the outside host's link of a segment."""
    wire = number + 1
    plain, far = f"node{wire}", f"far{wire}"
    match kind:
        case "macvlan" | "ipvlan":
            return plain, far
        case "vlan":  # the tag is the pod's own affair
            return plain, f"{far}.{100 + wire}"
        case "macvlan-on-vlan":
            return f"{plain}.{200 + wire}", f"{far}.{200 + wire}"
        case "sriov":  # all VFs are on the first wire; the NIC tags what they send
            return PF, f"far1.{300 + wire}"
        case "bond":
            name = BOND if number == 0 else f"{BOND}.{400 + wire}"
            return name, name
    raise AssertionError(kind)


def master(kind: str, number: int) -> dict[str, Any]:
    """ifacer's configuration for the node's link of a segment; empty if it is there already."""
    vlan = int(ends(kind, number)[0].partition(".")[2] or 0)
    if kind == "bond":
        bond = {"name": BOND, "mode": 1, "options": "miimon=50"}
        return {"interfaces": ["node2", "node3"], "vlanID": vlan, "bond": bond}
    return {"interfaces": [f"node{number + 1}"], "vlanID": vlan} if vlan else {}


@dataclass
class GuestNode(Node):
    """A node whose pods have NICs of one kind."""

    kind: str = ""
    rig: Rig = field(default_factory=Rig)
    record: str = ""
    """A folder for ifacer."""
    lent: dict[str, list[int]] = field(default_factory=dict)
    """The VFs that each pod was given."""

    def segment(self, number: int) -> Segment:
        if number not in self.segments:
            near, far = ends(self.kind, number)
            self._make_master(master(self.kind, number))
            ip("link", "set", near, "up")
            parent, _, vlan = far.partition(".")
            if self.kind == "bond" and BOND not in ip("-n", OUTSIDE, "-br", "link"):
                # Every frame goes out on both links: the node's bond may listen to either.
                self.rig.bond(BOND, ("far2", "far3"), OUTSIDE, "mode", "broadcast", "miimon", "50")
            if vlan:
                ip("-n", OUTSIDE, "link", "add", "link", parent, "name", far, "type", "vlan", "id", vlan)
            made = self.segments[number] = Segment(number, OUTSIDE, self.router_fd, near, far)
            made.equip()
            self.lead_from_far(made)
        return self.segments[number]

    def _make_master(self, config: dict[str, Any]) -> None:
        """As the agent has ifacer make it."""
        if not config:
            return

        async def main() -> None:
            plugin = Ifacer(IfacerSettings(record=self.record))
            whole = {"cniVersion": "1.0.0", "name": "underlay", "type": "ifacer", **config}
            try:
                await plugin.add(Call("ifacer", "ADD", "c1", "/proc/self/ns/net", None, "eth0", {}, "", whole, "1.0.0"))
            finally:
                await plugin.close()

        asyncio.run(main())

    def link(self, pod: Pod, segment: Segment, name: str) -> None:
        if self.kind == "sriov":
            free_vf()
            number, vf = next(iter(vfs().items()))
            self.lent.setdefault(pod.name, []).append(number)
            vlan = segment.link.partition(".")[2]
            # A link that is up keeps its name.
            orders = [f"set {PF} vf {number} vlan {vlan}", f"set {vf} down", f"set {vf} netns {pod.name} name {name}"]
        else:
            kinds = {"ipvlan": "ipvlan mode l2", "vlan": f"vlan id {segment.link.partition('.')[2]}"}
            words = kinds.get(self.kind, "macvlan mode bridge")
            orders = [f"add link {segment.master} name tmp0 type {words}", f"set tmp0 netns {pod.name} name {name}"]
        batch(self.name, [f"link {order}" for order in orders])

    def remove(self, pod: Pod) -> None:
        super().remove(pod)
        lent = self.lent.pop(pod.name, [])
        until(lambda: set(lent) <= vfs().keys(), "the VFs are back on the node")
        for number in lent:
            now = vfs()[number]
            batch(
                self.name,
                [f"link set {now} down", f"link set {now} name {PF}v{number}", f"link set {PF} vf {number} vlan 0"],
            )


@contextmanager
def guest_node(kind: str, record: str) -> Iterator[GuestNode]:
    """A node that forwards and has a service; everything is removed in the end."""
    with Rig() as rig, namespaces(1) as ((far,), (far_fd,)), ExitStack() as stack:
        ip("netns", "attach", NAME, str(os.getpid()))
        stack.callback(ip, "netns", "delete", NAME)
        fds = [os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in (NAME, OUTSIDE)]
        for fd in fds:
            stack.callback(os.close, fd)
        made = GuestNode(NAME, OUTSIDE, far, fds[0], fds[1], far_fd, kind=kind, rig=rig, record=record)
        stack.callback(_leave, made)
        for family in ("ipv4", "ipv6"):
            stack.callback(sysctl, f"{family}/conf/all/forwarding", "0")
            sysctl(f"{family}/conf/all/forwarding", "1")
        made.lay_out_far()
        near = made.segment(0).master
        has_own = kind not in ("sriov", "vlan")  # else the node is not in the networks of its pods
        for address in (NODE4, NODE6):
            add_address(NAME, address, near if has_own else "eth2", whole=not has_own)
        serve_vips(made)
        yield made


def _leave(node: GuestNode) -> None:
    for pod in node.pods:
        if pod.fd >= 0:
            node.remove(pod)
    for vip in VIP.values():
        ip("address", "delete", vip, "dev", "lo", check=False)
    for segment in node.segments.values():
        if master(node.kind, segment.number):
            remove(segment.master)
        else:
            ip("address", "flush", "dev", segment.master, "scope", "global")
    if node.kind == "bond":
        remove(BOND)
