"""Settings of the reclaim."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

from api.reclaim import Switches
from daemon.limits import at_least
from daemon.upstream import upstream


@dataclass(frozen=True)
class ReclaimSettings:
    """Which addresses are taken back, when, and how fast. Times are in seconds."""

    enabled: bool = field(default=True, metadata=upstream(variable="SPIDERPOOL_GC_IP_ENABLED", required=True))
    """Take back addresses of pods that are gone or have ended. Quarantines end in any case."""
    stateful_sets: bool = field(default=True, metadata=upstream(key="enableStatefulSet"))
    """Pods of StatefulSets keep their addresses until the StatefulSet will not have them again."""
    virtual_machines: bool = field(default=True, metadata=upstream(key="enableKubevirtStaticIP"))
    """KubeVirt virtual machines keep their addresses."""
    clean_outdated_endpoints: bool = field(default=False, metadata=upstream(key="enableCleanOutdatedEndpoint"))
    """Remove SpiderEndpoints whose pod is gone and whose addresses are nobody's or somebody else's."""
    ended_on_ready_node: bool = field(
        default=True,
        metadata=upstream(variable="SPIDERPOOL_GC_STATELESS_TERMINATING_POD_ON_READY_NODE_ENABLED", required=True),
    )
    """Take back the addresses of pods that have ended, or are past their grace period, on nodes that are ready."""
    ended_on_lost_node: bool = field(
        default=True,
        metadata=upstream(variable="SPIDERPOOL_GC_STATELESS_TERMINATING_POD_ON_NOT_READY_NODE_ENABLED", required=True),
    )
    """The same on nodes that are not ready, or gone. Such a node may be alive and cut off: then its pods still use
    their addresses, which the probe before each new use is to find out."""
    running_without_ips_on_lost_node: bool = field(
        default=False,
        metadata=upstream(variable="SPIDERPOOL_GC_ENABLE_STATELESS_RUNNING_POD_ON_EMPTY_POD_STATUS_IPS", required=True),
    )
    """Take back the addresses of running pods that have none in their status, if their node is not ready, or gone."""
    additional_delay: float = field(
        default=0.0, metadata=upstream(variable="SPIDERPOOL_GC_ADDITIONAL_GRACE_DELAY", required=True)
    )
    """Wait so much longer after the grace period."""
    teardown: float = 30.0
    """How long after a pod's grace period its kubelet has to kill what did not end, and to tear the sandbox down.
    Taken back earlier, an address would be in two network namespaces; the kubelet's own release is not waited for
    with it, which comes when it comes."""
    lost_node: float = 300.0
    """How long a node must be gone until addresses of containers without a pod on it are taken back: who removes a
    Node object by hand often wants the node to come back."""
    interval: float = field(
        default=600.0, metadata=upstream(variable="SPIDERPOOL_GC_DEFAULT_INTERVAL_DURATION", required=True)
    )
    """Time between two scans of all claims. They cost no requests unless something is wrong: what is right is seen
    in the caches."""
    settle: float = 2.0
    """How long a pod's end is left alone, so that its own release comes first: most pods need no reclaim."""
    workers: int = field(default=16, metadata=upstream(variable="SPIDERPOOL_GC_IP_WORKER_NUM", required=True))
    """How many claims are deleted at a time."""
    rate: float = 1000.0
    """How many claims are deleted in a second at most."""

    def __post_init__(self) -> None:
        at_least(0, additional_delay=self.additional_delay, teardown=self.teardown, lost_node=self.lost_node)
        at_least(0, settle=self.settle)
        at_least(1, interval=self.interval, workers=self.workers, rate=self.rate)

    def switches(self) -> Switches:
        """What the decision needs of them."""
        return Switches(
            stateful_sets=self.stateful_sets,
            virtual_machines=self.virtual_machines,
            ended_on_ready_node=self.ended_on_ready_node,
            ended_on_lost_node=self.ended_on_lost_node,
            running_without_ips_on_lost_node=self.running_without_ips_on_lost_node,
            delay=timedelta(seconds=self.additional_delay + self.teardown),
            lost_node=timedelta(seconds=self.lost_node),
        )
