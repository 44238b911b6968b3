"""What an operator may set about IPAM."""

from __future__ import annotations

from dataclasses import dataclass, field

from daemon.limits import at_least
from daemon.upstream import upstream


@dataclass(frozen=True)
class IpamSettings:
    """Times are in seconds."""

    enable_ipv4: bool = field(default=True, metadata=upstream(key="enableIPv4"))
    """Give IPv4 addresses. Candidate pools of a family that is off are passed over, so that the same network
    configuration serves single-stack and dual-stack nodes."""
    enable_ipv6: bool = field(default=True, metadata=upstream(key="enableIPv6"))
    """Give IPv6 addresses."""
    enable_ip_conflict_detection: bool = field(default=False, metadata=upstream(key="enableIPConflictDetection"))
    """Ask the network whether somebody uses an address before a pod gets it, for pools that do not say
    (`spec.detectIPConflict`) in a cluster that does not say (SpiderCoordinator). Off as upstream: it costs each ADD
    the probe's wait."""
    enable_gateway_detection: bool = field(default=False, metadata=upstream(key="enableGatewayDetection"))
    """Refuse an ADD whose pool has a gateway that does not answer, likewise (`spec.detectGateway`). Off as
    upstream."""
    enable_statefulset: bool = field(default=True, metadata=upstream(key="enableStatefulSet"))
    """A StatefulSet's pod keeps its addresses when it is made anew. Needs Kubernetes, as all that follows up to
    `auto_pool_wait`."""
    enable_kubevirt_static_ip: bool = field(default=True, metadata=upstream(key="enableKubevirtStaticIP"))
    """A KubeVirt virtual machine keeps its addresses over restarts and live migrations."""
    enable_spider_subnet: bool = field(default=True, metadata=upstream(key="enableSpiderSubnet"))
    """Obey the annotations `ipam.spidernet.io/subnet` and `subnets`; off, they are not looked at."""
    enable_auto_pools: bool = field(default=True, metadata=upstream(key="enableAutoPoolForApplication"))
    """The controller makes pools for applications with those annotations. Off, such pods are refused."""
    multus_cluster_network: str = field(default="", metadata=upstream(variable="MULTUS_CLUSTER_NETWORK"))
    """`namespace/name` of the NetworkAttachmentDefinition of pods' first NIC where the pod does not name another, for
    pools with `multusName`. Empty: not known."""
    namespace: str = field(default="kube-system", metadata=upstream(variable="SPIDERPOOL_POD_NAMESPACE"))
    """Namespace of the installation: where NetworkAttachmentDefinitions live that `multusName` or the annotation
    `v1.multus-cni.io/default-network` name without a namespace."""
    auto_pool_wait: float = field(
        default=50.0,
        metadata=upstream(
            factors=(
                ("SPIDERPOOL_WAIT_SUBNET_POOL_TIME_IN_SECOND", 2),
                ("SPIDERPOOL_WAIT_SUBNET_POOL_MAX_RETRIES", 25),
            )
        ),
    )
    """How long an ADD waits for the controller to make or enlarge the application's pool: upstream's 25 looks with 2 s
    between them. At most nine tenths of `add_deadline`."""
    add_deadline: float = 55.0
    """How long one ADD, DEL or CHECK may take in all; then the runtime is asked to try again. Shorter than
    `server.add_deadline`, so that the error tells what was waited for. What an ADD then undoes has a time of its own,
    which no end of the server's cuts short."""
    rollback_deadline: float = 10.0
    """How long a failed ADD may take to delete its claims in the store before that is left to the background. With
    `server.add_deadline` it must fit into the executable's 115 s, after which the runtime believes the ADD ended."""
    max_collisions: int = 128
    """How many addresses one ADD may lose to other nodes before it gives up and asks the runtime to try again. With
    addresses picked at random a handful is rare; the limit only keeps a fault from spinning."""
    conflict_moves: int = 3
    """How often one ADD goes on with another address after the network showed that one is in use."""
    predecessor_wait: float = 3.0
    """How long an ADD waits for the pod before to leave an address that the new one takes over (a StatefulSet's), when
    somebody still answers for it: its network namespace may just be going, on another node."""
    quarantine_time: float = 600.0
    """How long an address that somebody else uses stays out of use. Long enough to find the culprit, short enough
    that a mistake heals by itself."""
    quarantine_cap: int = 8
    """How many addresses of one pool may be in quarantine; beyond that a conflict costs a try and nothing more. A
    router that answers for every address (proxy ARP) must not eat the pool."""
    quarantine_cap_per_mac: int = 3
    """How many addresses of one pool may be in quarantine on account of one MAC address, for the same reason."""
    partial_grace: float = 300.0
    """Age after which an incomplete set of claims, left by a crash, is collected. Longer than `add_deadline` and
    than kubelet's 4 minutes to the retry that would complete it."""
    view_idle: float = 900.0
    """A pool that this node has not used for so long is not followed any more."""
    endpoint_queue: int = 4096
    """How many pods may wait for their SpiderEndpoint to be written; further ones are dropped and logged, since
    endpoints are a view."""

    def __post_init__(self) -> None:
        at_least(0.01, add_deadline=self.add_deadline, rollback_deadline=self.rollback_deadline)
        at_least(0.1, partial_grace=self.partial_grace, view_idle=self.view_idle)
        at_least(1, max_collisions=self.max_collisions, endpoint_queue=self.endpoint_queue)
        at_least(0, auto_pool_wait=self.auto_pool_wait, predecessor_wait=self.predecessor_wait)
        at_least(0, conflict_moves=self.conflict_moves, quarantine_time=self.quarantine_time)
        at_least(0, quarantine_cap=self.quarantine_cap, quarantine_cap_per_mac=self.quarantine_cap_per_mac)
