"""The network below the pods: namespaces, the segment, the router and the host behind it; made and removed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from lab.layout import CACHE, NODES, OUTSIDE, OUTSIDE_ROUTER, PORTS, PREFIX, RIVAL, ROUTER, STOLEN, Dual, Lab
from lab.process import in_netns, run

SEGMENT = "segment"
OUTSIDE_NAME = "outside"
MEMBERS = (SEGMENT, OUTSIDE_NAME, *(port.name for port in PORTS))
FORWARDING = ("/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding")


def _batch(commands: Iterable[str], namespace: str = "") -> None:
    where = ["-n", namespace] if namespace else []
    run(["ip", *where, "-batch", "-"], stdin="\n".join(commands) + "\n")


def _address(address: Dual, device: str) -> list[str]:
    # Duplicate address detection would leave the IPv6 address tentative for a second, and here nobody can have it.
    return [
        f"address add {address.v4}/{PREFIX.v4} dev {device}",
        f"address add {address.v6}/{PREFIX.v6} dev {device} nodad",
        f"link set {device} up",
    ]


def create(lab: Lab) -> None:
    """All namespaces and links of the lab, with addresses and routes. Raises LabError."""
    _batch(f"netns add {lab.netns(member)}" for member in MEMBERS)
    segment = lab.netns(SEGMENT)
    wires = [
        # No snooping: with a querier absent it would drop the neighbour discovery's multicast.
        "link add br0 type bridge mcast_snooping 0 forward_delay 0",
        "link set br0 up",
    ]
    for port in PORTS:
        wires += [
            f"link add {port.name} type veth peer name eth0 netns {lab.netns(port.name)}",
            f"link set {port.name} master br0 up",
        ]
    _batch(wires, segment)
    _batch(
        [f"link add eth1 type veth peer name eth0 netns {lab.netns(OUTSIDE_NAME)}", *_address(OUTSIDE_ROUTER, "eth1")],
        lab.netns(ROUTER.name),
    )
    for port in PORTS:
        commands = ["link set lo up", "link set eth0 up"]
        if port.address is not None:
            commands += _address(port.address, "eth0")
        if port in NODES:
            commands += [f"route add default via {gateway}" for gateway in ROUTER.address or ()]
            commands += ["link add nodelocal type bridge", "link set nodelocal up"]
            commands += [f"address add {address} dev nodelocal nodad" for address in CACHE]
        _batch(commands, lab.netns(port.name))
    _batch(
        ["link set lo up", *_address(OUTSIDE, "eth0"), *(f"route add default via {gw}" for gw in OUTSIDE_ROUTER)],
        lab.netns(OUTSIDE_NAME),
    )
    _batch(_address(STOLEN, "eth0"), lab.netns(RIVAL.name))
    for forwarder in (ROUTER, *NODES):
        in_netns(lab.netns_path(forwarder.name), _forward)


def _forward() -> None:
    for switch in FORWARDING:
        with open(switch, "w") as file:
            file.write("1")


def namespaces(lab: Lab) -> list[str]:
    """The lab's network namespaces that exist, pods' included."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(name for name in os.listdir("/run/netns") if name.startswith(lab.netns("")))
    return []


def remove(lab: Lab) -> None:
    """All network namespaces of the lab, and with them all links. Raises LabError."""
    existing = namespaces(lab)
    if existing:
        _batch(f"netns delete {name}" for name in existing)
