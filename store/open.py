"""Which store a daemon works on."""

from __future__ import annotations

from dataclasses import dataclass

from store.port import Store
from store.sqlite import SqliteStore


@dataclass(frozen=True)
class StoreSettings:
    """Where pools, claims, services and endpoints live."""

    kind: str = "sqlite"
    """`sqlite`: in a file of this machine. `kubernetes`: in the cluster that this machine is a node of."""
    path: str = "/var/lib/spidernet/store.db"
    """The SQLite file; made if it is missing."""
    kubeconfig: str = ""
    """Path of a kubeconfig file for `kubernetes`. Empty: the pod's service account, or $KUBECONFIG and ~/.kube/config
    outside of a pod."""
    context: str = ""
    """Context of the kubeconfig file; empty: its current one."""

    def __post_init__(self) -> None:
        if self.kind not in ("sqlite", "kubernetes"):
            raise ValueError(f"kind is {self.kind!r}; it must be sqlite or kubernetes")


async def open_store(settings: StoreSettings) -> Store:
    """The store that the settings name. Raises StoreError."""
    if settings.kind == "kubernetes":
        from store.kube import KubeStore  # noqa: PLC0415 (24 MB with its HTTP client, only for clusters)
        from store.kube_settings import KubeSettings  # noqa: PLC0415

        return await KubeStore.open(KubeSettings(kubeconfig=settings.kubeconfig, context=settings.context))
    return await SqliteStore.open(settings.path)
