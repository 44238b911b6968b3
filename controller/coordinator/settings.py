"""Settings of the SpiderCoordinator's status."""

from __future__ import annotations

from dataclasses import dataclass, field

from api.coordinator import DEFAULT_NAME
from daemon.limits import at_least
from daemon.upstream import upstream


@dataclass(frozen=True)
class CoordinatorStatusSettings:
    """Where the cluster's networks are found out from. Times are in seconds."""

    enabled: bool = field(default=True, metadata=upstream(variable="SPIDERPOOL_COORDINATOR_ENABLED"))
    """Admit SpiderCoordinators and keep the status of one."""
    name: str = field(default=DEFAULT_NAME, metadata=upstream(variable="SPIDERPOOL_COORDINATOR_DEAFULT_NAME"))
    """Name of the SpiderCoordinator whose status is kept. (The variable's spelling is upstream's.)"""
    cni_directory: str = field(default="/etc/cni/net.d", metadata=upstream(variable="SPIDERPOOL_CNI_CONFIG_DIR"))
    """Directory of the CNI configurations of the node that the controller runs on; `podCIDRType: auto` looks there."""
    cilium_config: str = field(
        default="kube-system/cilium-config",
        metadata=upstream(variable="SPIDERPOOL_CILIUM_CONFIGMAP_NAMESPACE_NAME"),
    )
    """Cilium's ConfigMap, `namespace/name`."""
    resync: float = field(default=60.0, metadata=upstream(variable="SPIDERPOOL_COORDINATOR_INFORMER_RESYNC_PERIOD"))
    """How often to look although nothing has been heard of: for a directory that appears, or a kind that the API
    server starts to serve without objects. Everything else is watched."""

    def __post_init__(self) -> None:
        at_least(1, resync=self.resync)
        namespace, slash, name = self.cilium_config.partition("/")
        if not (slash and namespace and name):
            raise ValueError(f"cilium_config is {self.cilium_config!r}; it must be NAMESPACE/NAME")
