"""Settings of subnets and automatic pools."""

from __future__ import annotations

from dataclasses import dataclass, field

from api.ranges import Family
from daemon.limits import at_least
from daemon.upstream import upstream


@dataclass(frozen=True)
class SubnetSettings:
    """Whether pools are cut from subnets, and how large. Times are in seconds."""

    enabled: bool = field(default=True, metadata=upstream(key="enableSpiderSubnet"))
    """Keep subnets: pools of their network belong to them, and inherit gateway and routes."""
    auto_pools: bool = field(default=True, metadata=upstream(key="enableAutoPoolForApplication"))
    """Make pools for applications whose pods ask for a subnet's addresses."""
    spare_addresses: int = field(
        default=0,
        metadata=upstream(
            key=("clusterSubnetAutoPoolDefaultRedundantIPNumber", "clusterSubnetDefaultFlexibleIPNumber")
        ),
    )
    """How many addresses an automatic pool has beside one for each pod, if the application does not say."""
    enable_ipv4: bool = field(default=True, metadata=upstream(key="enableIPv4"))
    """Make automatic pools of IPv4 addresses."""
    enable_ipv6: bool = field(default=True, metadata=upstream(key="enableIPv6"))
    """Make automatic pools of IPv6 addresses."""
    workers: int = field(
        default=5, metadata=upstream(variable="SPIDERPOOL_SUBNET_APPLICATION_CONTROLLER_WORKERS", required=True)
    )
    """How many applications are looked at at a time; those of one subnet take turns."""
    settle: float = 0.5
    """How long released addresses, and what pools say, are collected before they are looked at together."""
    patience: float = 30.0
    """After how long to look again at an application that waits for addresses, for a subnet or for its own end.
    Changes in the cluster are seen at once; this is for what cannot be watched, as third parties' controllers."""

    def __post_init__(self) -> None:
        at_least(0, spare_addresses=self.spare_addresses, settle=self.settle)
        at_least(1, workers=self.workers, patience=self.patience)

    def families(self) -> frozenset[Family]:
        """Enabled address families."""
        switches: dict[Family, bool] = {4: self.enable_ipv4, 6: self.enable_ipv6}
        return frozenset(family for family, on in switches.items() if on)
