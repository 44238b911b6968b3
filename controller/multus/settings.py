"""Settings of SpiderMultusConfigs and of what is injected into pods."""

from __future__ import annotations

from dataclasses import dataclass, field

from daemon.limits import at_least
from daemon.upstream import upstream


@dataclass(frozen=True)
class MultusSettings:
    """SpiderMultusConfigs and the NetworkAttachmentDefinitions made of them. Times are in seconds."""

    enabled: bool = field(default=True, metadata=upstream(variable="SPIDERPOOL_MULTUS_CONFIG_ENABLED"))
    """Admit SpiderMultusConfigs and make NetworkAttachmentDefinitions of them."""
    resync: float = field(default=60.0, metadata=upstream(variable="SPIDERPOOL_MULTUS_CONFIG_INFORMER_RESYNC_PERIOD"))
    """How long a NetworkAttachmentDefinition that is rewritten again and again by somebody else stays so at most.
    Everything else is repaired at once: changes are watched."""

    def __post_init__(self) -> None:
        at_least(1, resync=self.resync)


@dataclass(frozen=True)
class InjectionSettings:
    """Networks and resources that created pods get by annotations."""

    enabled: bool = field(default=False, metadata=upstream(key="podResourceInject.enabled"))
    """Change pods at all."""
    namespaces_exclude: tuple[str, ...] = field(
        default=("kube-system", "spiderpool", "metallb-system", "istio-system"),
        metadata=upstream(key="podResourceInject.namespacesExclude"),
    )
    """Namespaces whose pods are left alone; they also come up when no controller is there to answer. That of the
    installation always is one."""
    namespaces_include: tuple[str, ...] = field(
        default=(), metadata=upstream(key="podResourceInject.namespacesInclude")
    )
    """The only namespaces whose pods are looked at; empty: all the others."""
    master_nics: bool = False
    """Let pods ask for a place at each master NIC of their networks. Where the nodes' device plugin advertises them."""
    sub_eni: str = ""
    """Resource of which pods ask one for each network whose VLAN the infrastructure provider chooses; empty: none."""
