"""What an operator may set about the coordinator: the node's defaults of what a network configuration may say."""

from __future__ import annotations

from dataclasses import dataclass

from daemon.limits import at_least


@dataclass(frozen=True)
class CoordinatorSettings:
    """A member of the network configuration goes before the setting of the same meaning; lists replace, not merge."""

    mode: str = "auto"
    """`auto`, `underlay`, `overlay` or `disable` (also `disabled`). `auto` suits a node that runs several kinds."""
    overlay_pod_cidr: tuple[str, ...] = ()
    """Networks of the cluster's overlay pods, which underlay pods reach through their node. CIDRs."""
    service_cidr: tuple[str, ...] = ()
    """Networks of the cluster's services, handed to the node where its proxy serves them. CIDRs."""
    hijack_cidr: tuple[str, ...] = ()
    """Further networks that pods reach through their node, for example a node-local DNS cache. CIDRs."""
    policy_routes: tuple[str, ...] = ()
    """Routes of every pod over its own NIC, each written `DESTINATION via GATEWAY`."""
    pod_mac_prefix: str = ""
    """First two bytes, `0a:1b`, of MAC addresses made from the pod's address; empty leaves the NIC's own."""
    pod_default_cni_nic: str = "eth0"
    """Name of a pod's first NIC, as container runtimes give it."""
    tune_pod_routes: bool = True
    """Move the routes of further NICs to tables of their own."""
    pod_default_route_nic: str = ""
    """The NIC that keeps the pod's default route; empty: the first one."""
    veth_link_address: str = ""
    """IPv4 address put on the pod's end of the veth pair; empty: none. Some meshes and eBPF programs want one."""
    veth_mtu: int = 1500
    """MTU of the veth pair in bytes. 1500 as upstream: it suits every network that the node forwards to."""
    host_rule_table: int = 500
    """The node's routing table that holds the routes to its pods. Upstream's number."""
    pod_rp_filter: int = 0
    """Reverse path filter inside the pod: 0 off, 1 strict, 2 loose, negative leaves it alone. Off, because a pod with
    several ways out gets packets on one that it would answer on another."""
    tx_queue_len: int = 0
    """Transmit queue length of the pod's NIC in packets; 0 leaves it alone."""
    concurrency: int = 1
    """How many NICs are attached at the same time. The kernel makes one change of links at a time, and threads of one
    Python process wait for each other at every system call: with 8 at a time fifty pods that start at once cost
    two thirds more CPU, and are not ready sooner."""
    workers: int = 8
    """How many NICs are detached at the same time. Each waits tens of milliseconds for the kernel to let go of a
    link."""
    kernel_timeout: float = 5.0
    """Seconds to wait for the kernel's answer to one batch. Batches take a millisecond, and tens when a link is
    deleted; only a kernel in trouble takes longer."""
    repair_interval: float = 120.0
    """Seconds between two comparisons of all pods of the node with what should be there. The kernel tells of most
    changes at once; this finds the rest, for 2 to 6 ms of CPU for each pod. 0: nothing is repaired."""
    repair_gather: float = 0.2
    """Seconds for which news of changes are gathered before they are looked into. What is taken away again and again is
    restored after twice as long each time, at most after `repair_interval`."""

    def __post_init__(self) -> None:
        at_least(1, concurrency=self.concurrency, workers=self.workers)
        at_least(0.01, kernel_timeout=self.kernel_timeout, repair_gather=self.repair_gather)
        at_least(0, repair_interval=self.repair_interval)
