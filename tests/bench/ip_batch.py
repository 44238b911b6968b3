"""The coordinator's rival: programs that wire a pod as the coordinator does, told everything it has to find out.

What they make is what CHECK wants to see, but for the marks, which are iptables' and not nft's: `nft -f` takes longer
than `iptables-restore` and `ip6tables-restore` together.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from plugins.coordinator.attachment import LINK_GROUP, PROTOCOL, Attachment
from plugins.net.netns import enter, run_in_thread
from tests.integration.coordinator_node import FIRST4, NODE4, NODE6, SECOND4, SECOND6, SERVICE4, SERVICE6, Node, Pod

POD_MAC, NODE_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
FIRST, FURTHER = "eth0", "net1"
OURS = f"proto {PROTOCOL}"
EVERYTHING = {4: "0.0.0.0/0", 6: "::/0"}
REPLIES = f"rule add fwmark 0x1 lookup 100 pref 1000 {OURS}"
MARKS = [
    "*mangle",
    "-A PREROUTING -i veth0 -m conntrack --ctstate NEW -j MARK --set-xmark 0x1",
    "-A PREROUTING -m mark --mark 0x1 -j CONNMARK --save-mark",
    "-A OUTPUT -j CONNMARK --restore-mark",
    "COMMIT",
]


class Programs:
    """What has to be executed for one pod with the NICs eth0 and net1, each on a segment of its own."""

    def __init__(self, here: Node, pod: Pod, folder: Path) -> None:
        """Write down all that the programs will be told, in `folder`."""
        self._node_fd, self._pod_fd = here.fd, pod.fd
        self._folder = folder / pod.name
        self._folder.mkdir()
        ip, ip4, ip6 = (shutil.which(name) or name for name in ("ip", "iptables-restore", "ip6tables-restore"))
        write = self._write
        self._orders = {
            FIRST: (
                [[ip, "-batch", write("pair", [*pair(pod), *on_node(pod, FIRST)])]],
                [
                    [ip, "-batch", write("pod", [*in_pod(pod), REPLIES])],
                    [ip, "-6", "-batch", write("pod6", [REPLIES])],
                    [ip4, write("marks", MARKS)],
                    [ip6, write("marks", MARKS)],
                ],
            ),
            FURTHER: (
                [[ip, "-batch", write("further", on_node(pod, FURTHER))]],
                [
                    [ip, "-batch", write("tables", [*tables(pod), *rules(pod, 4)])],
                    [ip, "-6", "-batch", write("tables6", rules(pod, 6))],
                ],
            ),
        }

    def _write(self, name: str, lines: Iterable[str]) -> str:
        path = self._folder / name
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    async def attach(self, ifname: str) -> None:
        """Wire a NIC, in a thread that ends with it, as an ADD of the coordinator. Raises RuntimeError, OSError."""
        on_the_node, in_the_pod = self._orders[ifname]

        errors = self._folder / "errors"
        told = (os.POSIX_SPAWN_OPEN, 2, str(errors), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

        def run() -> None:
            for fd, orders in ((self._node_fd, on_the_node), (self._pod_fd, in_the_pod)):
                enter(fd)
                for argv in orders:
                    # vfork and exec, and none of what subprocess would add.
                    _, status = os.waitpid(os.posix_spawn(argv[0], argv, os.environ, file_actions=[told]), 0)
                    if status:
                        raise RuntimeError(f"{argv} ended with {status}: {errors.read_text()}")

        await run_in_thread(run)


def pair(pod: Pod) -> list[str]:
    """The pair of an underlay's first NIC, on the node."""
    link = pod.host_link
    peer = f"veth0 address {POD_MAC} mtu 1500 netns {pod.name}"
    return [
        f"link add {link} address {NODE_MAC} mtu 1500 group {LINK_GROUP} type veth peer name {peer}",
        f"link set {link} up alias {Attachment(pod.container_id, FIRST, 'underlay').alias}",
    ]


def on_node(pod: Pod, ifname: str) -> list[str]:
    """The node's ways to a NIC; the rule that all pods share is there already."""
    tag, dev = Attachment(pod.container_id, ifname, "underlay").tag, f"dev {pod.host_link}"
    lines: list[str] = []
    for address in pod.of(ifname):
        lines += [
            f"route replace {address}/{128 if ':' in address else 32} {dev} table 500 metric {tag} {OURS}",
            f"neigh replace {address} lladdr {POD_MAC} {dev} nud permanent {OURS}",
        ]
    return lines


def node_ways(pod: Pod, table: str) -> list[str]:
    """Routes of a pod to its node's addresses and to services, in a table."""
    lines: list[str] = []
    for source, addresses, service in (
        (pod.v4, (NODE4, FIRST4, SECOND4), SERVICE4),
        (pod.v6, (NODE6, SECOND6), SERVICE6),
    ):
        rest = f"dev veth0 src {source} table {table} {OURS}"
        lines += [f"route add {address}/{128 if ':' in address else 32} {rest}" for address in addresses]
        lines.append(f"route add {service} via {addresses[0]} {rest}")
    return lines


def in_pod(pod: Pod) -> list[str]:
    """What the first NIC needs in the pod, but for rules and marks."""
    neighbour = f"lladdr {NODE_MAC} dev veth0 nud permanent {OURS}"
    lines = [f"neigh replace {address} {neighbour}" for address in (NODE4, FIRST4, SECOND4, NODE6, SECOND6)]
    lines = ["link set veth0 up", *lines, *node_ways(pod, "main")]
    for version, gateway, source in ((4, NODE4, pod.v4), (6, NODE6, pod.v6)):
        lines.append(f"route add {EVERYTHING[version]} via {gateway} dev veth0 src {source} table 100 {OURS}")
    return lines


def tables(pod: Pod) -> list[str]:
    """The tables of both NICs, when the second one comes, and the end of its default routes in the main table."""
    lines: list[str] = []
    for ifname, table in ((FIRST, "99"), (FURTHER, "101")):
        segment = pod.seats[ifname]
        for version, address in zip((4, 6), pod.of(ifname), strict=True):
            network = f"{segment.address(version, 0)}/{24 if version == 4 else 64}"
            kept = f"scope link src {address}" if version == 4 else "metric 256"
            lines += [
                f"route add {network} dev {ifname} {kept} table {table} {OURS}",
                f"route add {EVERYTHING[version]} via {segment.gateway(version)} dev {ifname} table {table} {OURS}",
            ]
        lines += node_ways(pod, table)
    leaving = pod.seats[FURTHER]
    return [*lines, *(f"route del {EVERYTHING[v]} via {leaving.gateway(v)} dev {FURTHER}" for v in (4, 6))]


def rules(pod: Pod, version: int) -> list[str]:
    """The rules of one family for both tables."""
    found = ((pod.of(ifname)[version == 6], table) for ifname, table in ((FIRST, "99"), (FURTHER, "101")))
    return [f"rule add from {address} lookup {table} pref 1001 {OURS}" for address, table in found]
