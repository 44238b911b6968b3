"""What a lab consists of, and how everything of it is called: all names follow from the lab's name.

So a lab can be taken down by its name alone, even if the record of what was started is lost, and two labs with
different names share nothing. The addresses are the same in every lab: each has network namespaces of its own.

              outside 192.0.2.2, 2001:db8::2
                 |
              router .1  ::1
                 |                    172.20.0.0/24, fd00:20::/64
    -------------+-----------+---------------+------------- segment (a bridge)
                 |           |               |
              node1 .11   node2 .12        rival (answers for addresses that are not its own)
              client      web-2
              web-1       web-3
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import NamedTuple

SOURCES = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The checkout that this package belongs to."""

STATE_ROOT = "/run/spiderpool-lab"
STANDARD_CNI = "/usr/lib/cni"
"""Where Debian installs the standard CNI plugins."""

PORT = 8080
"""What every actor listens on, TCP and UDP."""

DEFAULT_NAME = "spl"
_NAME = re.compile(r"spl[a-z0-9]{0,12}")
"""Begins with three letters of ours, so that `down` cannot take somebody else's namespaces for the lab's."""


class LabError(Exception):
    """Something that the user can do something about; the text says what."""


class Dual(NamedTuple):
    """An IPv4 and an IPv6 address."""

    v4: str
    v6: str


@dataclass(frozen=True, slots=True)
class Port:
    """A member of the segment: its namespace's short name and the addresses of its eth0."""

    name: str
    address: Dual | None


PREFIX = Dual("24", "64")
"""Prefix lengths of the segment."""
NETWORK = Dual("172.20.0.", "fd00:20::")
"""What the segment's addresses begin with."""
NODES = (Port("node1", Dual("172.20.0.11", "fd00:20::11")), Port("node2", Dual("172.20.0.12", "fd00:20::12")))
ROUTER = Port("router", Dual("172.20.0.1", "fd00:20::1"))
RIVAL = Port("rival", None)
PORTS = (*NODES, ROUTER, RIVAL)
OUTSIDE = Dual("192.0.2.2", "2001:db8::2")
OUTSIDE_ROUTER = Dual("192.0.2.1", "2001:db8::1")
STOLEN = Dual("172.20.0.160", "fd00:20::160")
"""The only addresses of the pools `contested-*`; the rival has them. Same as in manifests/pools.yaml."""
NODE_ADDRESS = {node.name: node.address for node in NODES if node.address is not None}
CACHE = Dual("169.254.25.10", "fd00:25::10")
"""What each node has for itself, as a node-local DNS cache has; within hijackCIDR of manifests/underlay.conflist."""

VIP = Dual("10.96.0.10", "fd00:96::10")
"""Service web: TCP 80 and UDP 7, backends web-2 and web-3. Same as in manifests/services.yaml."""
LATE_VIP = Dual("10.96.0.20", "fd00:96::20")
"""Service late: the same backends, written while an agent is down."""


class Standing(NamedTuple):
    """A pod that runs from `up` to `down`."""

    name: str
    node: str


STANDING = (
    Standing("client", "node1"),
    Standing("web-1", "node1"),
    Standing("web-2", "node2"),
    Standing("web-3", "node2"),
)
BACKENDS = ("web-2", "web-3")
NAMESPACE = "demo"
"""Kubernetes namespace of all pods."""


@dataclass(frozen=True, slots=True)
class Lab:
    """The names of one lab."""

    name: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise LabError(f"{self.name!r} cannot name a lab: 'spl', then at most 12 small letters or digits")

    @property
    def state(self) -> str:
        """Folder of everything the lab writes."""
        return f"{STATE_ROOT}/{self.name}"

    @property
    def store(self) -> str:
        """The SQLite store that both agents share."""
        return f"{self.state}/store.db"

    @property
    def bpffs(self) -> str:
        """Mount point of the lab's own BPF file system."""
        return f"{self.state}/bpf"

    def netns(self, short: str) -> str:
        """Name of a network namespace: `node1`, `router`, a pod's name."""
        return f"{self.name}-{short}"

    def netns_path(self, short: str) -> str:
        """Path of a network namespace, as CNI_NETNS has it."""
        return f"/run/netns/{self.netns(short)}"

    def control(self, actor: str) -> str:
        """Control socket of an actor."""
        return f"{self.state}/actors/{actor}.sock"

    def log(self, process: str) -> str:
        """Log file of a process."""
        return f"{self.state}/log/{process}.log"

    def node(self, name: str) -> str:
        """Folder of what belongs to one node."""
        return f"{self.state}/{name}"

    def cni_bin(self, node: str) -> str:
        """The node's folder of our CNI executables."""
        return f"{self.node(node)}/cni"

    def queue(self, node: str) -> str:
        """The node's folder of DELs that wait for an agent."""
        return f"{self.node(node)}/queue"

    def socket(self, node: str) -> str:
        """The agent's socket."""
        return f"{self.node(node)}/cni.sock"

    def pins(self, node: str) -> str:
        """The node's folder in the BPF file system."""
        return f"{self.bpffs}/{node}"


def node_of(name: str) -> str:
    """The node on which a standing pod runs; a KeyError for others."""
    return {pod.name: pod.node for pod in STANDING}[name]
