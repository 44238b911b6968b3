"""Checks of what works while nothing is wrong: addresses, reachability, services."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from ipaddress import ip_address
from typing import Any

from lab import nodes
from lab.capture import Packet, capturing, joined
from lab.layout import (
    BACKENDS,
    CACHE,
    NODE_ADDRESS,
    OUTSIDE,
    PORT,
    STANDING,
    VIP,
    LabError,
)
from lab.lifecycle import host_actor
from lab.pods import ask
from lab.process import run
from lab.state import Attachment, State
from lab.topology import OUTSIDE_NAME, SEGMENT

TIMEOUT = 3
"""Seconds that one connection or datagram may take."""
POOL = (("172.20.0.103", "172.20.0.139"), ("fd00:20::103", "fd00:20::13f"))
"""First and last usable address of demo-v4 and demo-v6."""
SPREAD = 64
"""Connections of which none may miss a backend: with two, all the same once in 2^63."""


def require(holds: object, text: str) -> None:
    """Raise LabError with `text` unless it holds."""
    if not holds:
        raise LabError(text)


def call(state: State, caller: str, to: str, port: int, *, op: str = "tcp", named: str = "", seen_as: str = "") -> Any:
    """The reply that `caller` gets from `to`; who answers and whom it sees are checked. Raises LabError."""
    reply = ask(state.lab, caller, op, to=[to, port], timeout=TIMEOUT)
    what = f"{caller} → {to} port {port} ({op})"
    require("error" not in reply, f"{what}: {reply.get('error')}")
    who, sees = reply["answer"]["name"], reply["answer"]["peer"][0]
    require(not named or who == named, f"{what}: {who} answers, not {named}")
    require(not seen_as or sees == seen_as, f"{what}: {who} sees {sees}, not {seen_as}")
    return reply


def both_ways(state: State, first: str, second: str) -> list[str]:
    """TCP and UDP, both families, each pod calling the other under its own address."""
    lines = []
    for caller, target in ((first, second), (second, first)):
        sources, targets = addresses_of(state, caller), addresses_of(state, target)
        took = []
        for source, address in zip(sources, targets, strict=True):
            tcp = call(state, caller, address, PORT, named=target, seen_as=source)
            udp = call(state, caller, address, PORT, op="udp", named=target, seen_as=source)
            took.append(f"{address} TCP {tcp['milliseconds']:.2f} ms, UDP {udp['milliseconds']:.2f} ms")
        lines.append(f"{caller} → {target}: {'; '.join(took)}")
    return lines


def addresses_of(state: State, pod: str) -> list[str]:
    """IPv4 and IPv6 address of an attached pod. Raises LabError."""
    found = state.attachments[pod].addresses()
    require(len(found) == 2, f"{pod} has {found}, not an IPv4 and an IPv6 address")
    return found


def claims(state: State) -> dict[str, dict[str, Any]]:
    """The spec of each claim, by address in canonical text, completed by what is left out when it is default."""
    found = {}
    for item in nodes.ctl_list(state.lab, "spideripclaims"):
        spec = {"state": "Allocated", "podUID": "", "containerID": "", "node": "", **item["spec"]}
        found[str(ip_address(spec["address"]))] = spec
    return found


def nic(attachment: Attachment) -> tuple[str, list[str]]:
    """MAC and global addresses of the pod's NIC as the kernel has them. Raises LabError."""
    shown = run(["ip", "-j", "-n", os.path.basename(attachment.netns), "address", "show", attachment.ifname])
    link = json.loads(shown)[0]
    listed = [info["local"] for info in link["addr_info"] if info["scope"] == "global"]
    return link["address"], sorted(listed, key=lambda address: ":" in address)


def addresses(state: State) -> list[str]:
    """Every standing pod has what its claims say, from the pools and outside their exclusions, and nobody else has."""
    lines, given, held = [], [], claims(state)
    for pod in STANDING:
        attachment = state.attachments[pod.name]
        mac, listed = nic(attachment)
        require(listed == addresses_of(state, pod.name), f"{pod.name}: ADD said {attachment.addresses()}, has {listed}")
        for address, (first, last) in zip(listed, POOL, strict=True):
            inside = ip_address(first) <= ip_address(address) <= ip_address(last)  # type: ignore[operator]
            require(inside, f"{pod.name}: {address} is not within {first} to {last}")
            claim = held.get(address)
            require(claim, f"{pod.name}: nobody has a claim on {address}")
            owner = claim and (claim["podUID"], claim["containerID"], claim["node"])
            require(
                owner == (attachment.uid, attachment.container_id, pod.node),
                f"{pod.name}: the claim on {address} names {owner}",
            )
        given += listed
        lines.append(f"{pod.name:<7} {pod.node}  {listed[0]:<14} {listed[1]:<14} {mac}")
    require(len(set(given)) == len(given), f"an address was given twice: {given}")
    return lines


def agents(state: State) -> list[str]:
    """Health and metrics of both agents, by HTTP on the node's loopback."""
    lines = []
    for node in NODE_ADDRESS:
        for probe in ("startup", "readiness", "liveness"):
            status, body = nodes.http_get(state.lab, node, nodes.HEALTH_PORT, f"/v1/runtime/{probe}")
            require(status == 200, f"{node} answers its {probe} probe with {status} {body}")
        require(nodes.metric(state.lab, node, "spiderpool_dataplane_ready") == 1, f"{node}: services are not served")
        memory = nodes.metric(state.lab, node, "process_resident_memory_bytes") / 1e6
        frontends = nodes.metric(state.lab, node, "spiderpool_dataplane_frontends")
        lines.append(f"{node}: started, ready, alive; {frontends:.0f} service ports served; {memory:.0f} MB resident")
    return lines


def same_node(state: State) -> list[str]:
    """Two pods of node1."""
    return both_ways(state, "client", "web-1")


def cross_node(state: State) -> list[str]:
    """Two pods of each node."""
    return both_ways(state, "client", "web-2") + both_ways(state, "web-1", "web-3")


def outside(state: State) -> list[str]:
    """Routed traffic in both directions, each side seeing the other's own address."""
    lines = []
    for pod in ("client", "web-2"):
        took = []
        for address, far in zip(addresses_of(state, pod), OUTSIDE, strict=True):
            there = call(state, OUTSIDE_NAME, address, PORT, named=pod, seen_as=far)
            back = call(state, pod, far, PORT, named=OUTSIDE_NAME, seen_as=address)
            took.append(f"{far} → {address} {there['milliseconds']:.2f} ms, back {back['milliseconds']:.2f} ms")
        lines.append(f"{pod}: {'; '.join(took)}")
    return lines


def host(state: State) -> list[str]:
    """Each node and each of its pods, both directions; the way is a veth, since macvlan does not reach its master.

    And a pod and an address that only its node has, in a network that the configuration hands to the node.
    """
    lines = []
    for pod in STANDING:
        node, took = NODE_ADDRESS[pod.node], []
        for address, own in zip(addresses_of(state, pod.name), node, strict=True):
            there = call(state, host_actor(pod.node), address, PORT, named=pod.name, seen_as=own)
            back = call(state, pod.name, own, PORT, named=host_actor(pod.node), seen_as=address)
            took.append(f"{address} {there['milliseconds']:.2f} ms, back {back['milliseconds']:.2f} ms")
        way = json.loads(run(["ip", "-j", "-n", state.lab.netns(pod.node), "route", "get", address]))[0]["dev"]
        require(way.startswith("veth"), f"{pod.node} reaches {pod.name} by {way}, not by its veth")
        lines.append(f"{pod.node} ↔ {pod.name} by {way}: {'; '.join(took)}")
    for address, cache in zip(addresses_of(state, "client"), CACHE, strict=True):
        reply = call(state, "client", cache, PORT, named=host_actor("node1"), seen_as=address)
        lines.append(f"client → {cache}, the node's own: {reply['answer']['name']} answers and sees {address}")
    return lines


def on_the_wire(packets: list[Packet], reply: Any, vip: str, source: str, targets: set[str]) -> str:
    """What the segment saw of one exchange with a service, as evidence. Raises LabError if the VIP was there."""
    port = reply["local"][1]
    asked = [packet for packet in packets if packet.source == source and packet.source_port == port]
    require(asked, f"nothing from {source} port {port} was on the wire of the backends' node")
    require({packet.target for packet in asked} <= targets, f"{asked[0]} went to none of the backends {targets}")
    stray = [packet for packet in packets if vip in (packet.source, packet.target)]
    require(not stray, f"the service's address was on the wire: {stray[:1]}")
    return f"{asked[0]}, VIP in 0 of {len(packets)} packets"


def through_service(state: State, caller: str, sources: list[str], op: str, port: int) -> list[str]:
    """Both families through service `web`, watched on the wire of the backends' node."""
    lines = []
    for index, (vip, source) in enumerate(zip(VIP, sources, strict=True)):
        targets = {addresses_of(state, backend)[index] for backend in BACKENDS}
        with capturing(state.lab.netns_path(SEGMENT), "node2") as capture:
            reply = call(state, caller, vip, port, op=op, seen_as=source)
            seen = on_the_wire(capture.packets(), reply, vip, source, targets)
        require(reply["peer"] == [vip, port], f"{caller} asked {vip} and is told that {reply['peer'][0]} answered")
        lines.append(f"{caller} → {joined(vip, port)}: {reply['answer']['name']} answers; wire: {seen}")
    return lines


def service_tcp(state: State) -> list[str]:
    """IPv4, IPv6, and an IPv6 socket that is given a v4-mapped address."""
    source = addresses_of(state, "client")[0]
    lines = through_service(state, "client", addresses_of(state, "client"), "tcp", 80)
    mapped = call(state, "client", f"::ffff:{VIP.v4}", 80, seen_as=source)
    return [*lines, f"client → ::ffff:{VIP.v4}: {mapped['answer']['name']} answers and sees {source}"]


def service_udp(state: State) -> list[str]:
    """Connected sockets, and unconnected ones as resolvers use."""
    own = addresses_of(state, "client")
    lines = through_service(state, "client", own, "udp", 7)
    for vip, source in zip(VIP, own, strict=True):
        reply = call(state, "client", vip, 7, op="udp_unconnected", seen_as=source)
        require(reply["peer"] == [vip, 7], f"the answer from {vip} names {reply['peer']} as its sender")
        lines.append(f"unconnected: asked {vip}, {reply['answer']['name']} answers, sender reads {reply['peer'][0]}")
    return lines


def service_host(state: State) -> list[str]:
    """A process on node1 itself, which has no pod's namespace."""
    own = list(NODE_ADDRESS["node1"])
    return [
        *through_service(state, host_actor("node1"), own, "tcp", 80),
        *through_service(state, host_actor("node1"), own, "udp", 7),
    ]


def service_spread(state: State) -> list[str]:
    """Many connections and datagrams from a pod of the other node; every backend gets some."""
    lines = []
    for op, port in (("tcp", 80), ("udp", 7)):
        begin = time.monotonic()
        count = Counter(call(state, "web-1", VIP.v4, port, op=op)["answer"]["name"] for _ in range(SPREAD))
        took = (time.monotonic() - begin) * 1000 / SPREAD
        require(set(count) == set(BACKENDS), f"{SPREAD} times {op} to {VIP.v4} reached {dict(count)}")
        shares = ", ".join(f"{name} {times}" for name, times in sorted(count.items()))
        lines.append(f"{SPREAD} times {op.upper()} to {VIP.v4}: {shares}; {took:.2f} ms each, lab included")
    return lines
