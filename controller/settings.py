"""All settings of the controller: one frozen dataclass for each room. `daemon.sources` tells where values come from.

`docs/settings-controller.md` is generated from the docstrings here and in the rooms:

    python -m controller.settings --markdown     print the page
    python -m controller.settings --check        compare it with docs/settings-controller.md
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from urllib.parse import urlsplit

from api.ranges import Family
from api.validate.labels import is_subdomain
from controller.admission.configurations import Address
from controller.admission.rules import Features
from controller.adoption.settings import AdoptionSettings
from controller.certificates.plan import RENEWED_AT, Policy
from controller.certificates.serving import authorities_of
from controller.certificates.x509 import as_certified
from controller.coordinator.settings import CoordinatorStatusSettings
from controller.election import LeaderSettings
from controller.multus.settings import InjectionSettings, MultusSettings
from controller.reclaim.settings import ReclaimSettings
from controller.status.settings import StatusSettings
from controller.subnets.settings import SubnetSettings
from daemon.limits import at_least
from daemon.settings import HealthSettings, LogSettings
from daemon.sources import Sources
from daemon.upstream import upstream
from store.provider import ProviderSettings

_MOST_DAYS = 36500
"""Days that a certificate may hold: its end must have a year of four digits (RFC 5280 section 4.1.2.5)."""


def _named(**names: str) -> None:
    """Raise ValueError for the first of the settings that can be no object's name."""
    for setting, name in names.items():
        if not (len(name) <= 253 and is_subdomain(name)):
            raise ValueError(f"{setting} is {name!r}; it must be a name of lower-case letters, digits, '-' and '.'")


@dataclass(frozen=True)
class PodSettings:
    """Who this process is, and where Spiderpool is installed."""

    name: str = ""
    """Name of this pod, which makes the leader known by name. Empty: the host name."""
    namespace: str = "kube-system"
    """Namespace of the installation: of the Lease, the Secret and the Service."""

    def __post_init__(self) -> None:
        _named(namespace=self.namespace)

    def resolve(self) -> str:
        """The name to use."""
        return self.name or socket.gethostname()


@dataclass(frozen=True)
class KubernetesSettings:
    """The API server."""

    kubeconfig: str = ""
    """Path of a kubeconfig file. Empty: the pod's service account, or $KUBECONFIG and ~/.kube/config outside of a
    pod."""
    context: str = ""
    """Context of the kubeconfig file; empty: its current one."""


@dataclass(frozen=True)
class ControllerHealthSettings(HealthSettings):
    """The HTTP servers for health checks and metrics. Addresses are the local machine's unless set otherwise: nothing
    listens to the network that was not asked to."""

    port: int = 5720
    """TCP port of the health checks; 0: no health server."""
    metrics_port: int = field(default=5721, metadata=upstream(variable="SPIDERPOOL_METRIC_HTTP_PORT", required=True))
    """TCP port of the metrics; 0: no metrics server."""


@dataclass(frozen=True)
class WebhookSettings:
    """The TLS server that the API server asks for admission, and how the API server finds it."""

    host: str = ""
    """Address to listen on; empty: all addresses, for the API server is elsewhere."""
    port: int = 5722
    """Its TCP port."""
    configuration: str = field(
        default="spiderpool-controller", metadata=upstream(variable="SPIDERPOOL_CONTROLLER_DEPLOYMENT_NAME")
    )
    """Name of the MutatingWebhookConfiguration and the ValidatingWebhookConfiguration, which the leading controller
    writes."""
    service: str = field(
        default="spiderpool-controller", metadata=upstream(variable="SPIDERPOOL_CONTROLLER_DEPLOYMENT_NAME")
    )
    """Name of the Service, in the namespace of the installation, by which the API server reaches the replicas. (In
    upstream's chart it is called as the Deployment is, and has the port that the pods listen on.)"""
    service_port: int = field(default=5722, metadata=upstream(variable="SPIDERPOOL_WEBHOOK_PORT"))
    """Port of that Service."""
    url: str = ""
    """`https://HOST:PORT` by which the API server reaches this process, in place of the Service: for an API server
    that is outside of the cluster's network, as in a lab."""
    drain: float = 5.0
    """How long, in seconds, to go on answering when asked to stop: until nobody is sent here any more."""

    def __post_init__(self) -> None:
        at_least(0, drain=self.drain)
        _named(configuration=self.configuration, service=self.service)
        for name, port in (("port", self.port), ("service_port", self.service_port)):
            if not 1 <= port <= 65535:
                raise ValueError(f"{name} is {port}; it must be between 1 and 65535")
        parts = urlsplit(self.url)
        if self.url and (parts.scheme != "https" or not parts.hostname or parts.path.strip("/") or parts.query):
            raise ValueError(f"url is {self.url!r}; it must be https://HOST:PORT")

    def address(self, namespace: str) -> Address:
        """Where the API server reaches the server."""
        return Address(self.url, self.service, namespace, self.service_port)


@dataclass(frozen=True)
class TlsSettings:
    """The certificates of admission. By default the controller has an authority of its own, kept in a Secret, and
    renews everything before it expires, when a third of its life is left."""

    server_cert: str = ""
    """File of a serving certificate from elsewhere (PEM), read again when it is replaced. Empty: our own."""
    server_key: str = ""
    """File of its key (PEM)."""
    server_ca: str = ""
    """File of the authorities (PEM) that the API server shall trust for it. Empty: `ca.crt` beside the certificate, or
    if that is missing or empty, what has signed itself in the chain of `server_cert`."""
    secret: str = "spiderpool-controller-server-certs"  # noqa: S105 (a name)
    """Name of the Secret with our own, in the namespace of the installation."""
    authority_days: int = 3650
    """For how many days an authority of ours holds."""
    server_days: int = 90
    """For how many days a serving certificate of ours holds."""
    overlap: float = 3600.0
    """For how many seconds the API server knows a new authority before it signs, and an old one after it last did."""
    check: float = 60.0
    """Seconds between two looks whether something is to be renewed or was changed."""
    names: tuple[str, ...] = ()
    """Further DNS names and addresses for the serving certificate."""

    def __post_init__(self) -> None:
        at_least(1, authority_days=self.authority_days, server_days=self.server_days)
        at_least(0, overlap=self.overlap)
        at_least(0.05, check=self.check)
        _named(secret=self.secret)
        as_certified(self.names)
        for name, days in (("authority_days", self.authority_days), ("server_days", self.server_days)):
            if days > _MOST_DAYS:
                raise ValueError(f"{name} is {days}; it must be at most {_MOST_DAYS}")
        if self.overlap * 2 > (longest := self.authority_days * 86400 * RENEWED_AT):
            raise ValueError(
                f"overlap is {self.overlap}; twice as long must fit into the last third of an authority's life, "
                f"{longest:.0f} s, or it would end before the next one signs"
            )
        if bool(self.server_cert) != bool(self.server_key):
            raise ValueError("server_cert and server_key must be given together")
        for name, path in (("server_cert", self.server_cert), ("server_key", self.server_key)):
            if path and not os.path.isfile(path):
                raise ValueError(f"{name} is {path!r}; there is no such file")
        if self.server_cert:
            try:
                authorities_of(self.server_cert, self.authorities())
            except (OSError, ValueError) as error:
                raise ValueError(f"server_ca is {self.server_ca!r}: {error}") from None

    def policy(self) -> Policy:
        """How long our own certificates hold."""
        return Policy(
            authority=timedelta(days=self.authority_days),
            server=timedelta(days=self.server_days),
            overlap=timedelta(seconds=self.overlap),
        )

    def authorities(self) -> str:
        """File of the authorities of a certificate from elsewhere."""
        return self.server_ca or os.path.join(os.path.dirname(self.server_cert), "ca.crt")


@dataclass(frozen=True)
class AdmissionSettings:
    """What is admitted."""

    enable_ipv4: bool = field(default=True, metadata=upstream(key="enableIPv4"))
    """Pools, subnets and reserved addresses may be IPv4's."""
    enable_ipv6: bool = field(default=True, metadata=upstream(key="enableIPv6"))
    """Pools, subnets and reserved addresses may be IPv6's."""
    guard_deletion: bool = field(default=False, metadata=upstream(key="enableValidatingResourcesDeletedWebhook"))
    """Refuse to delete pools and subnets whose addresses are in use, rather than let them wait for their release."""

    def families(self) -> frozenset[Family]:
        """The enabled address families."""
        enabled: list[tuple[Family, bool]] = [(4, self.enable_ipv4), (6, self.enable_ipv6)]
        return frozenset(family for family, on in enabled if on)


@dataclass(frozen=True)
class Settings:
    """Everything, by room."""

    pod: PodSettings = field(default_factory=PodSettings)
    log: LogSettings = field(default_factory=LogSettings)
    health: ControllerHealthSettings = field(default_factory=ControllerHealthSettings)
    kubernetes: KubernetesSettings = field(default_factory=KubernetesSettings)
    leader: LeaderSettings = field(default_factory=LeaderSettings)
    webhook: WebhookSettings = field(default_factory=WebhookSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    reclaim: ReclaimSettings = field(default_factory=ReclaimSettings)
    provider: ProviderSettings = field(default_factory=ProviderSettings)
    status: StatusSettings = field(default_factory=StatusSettings)
    adoption: AdoptionSettings = field(default_factory=AdoptionSettings)
    subnets: SubnetSettings = field(default_factory=SubnetSettings)
    multus: MultusSettings = field(default_factory=MultusSettings)
    injection: InjectionSettings = field(default_factory=InjectionSettings)
    coordinator: CoordinatorStatusSettings = field(default_factory=CoordinatorStatusSettings)

    def features(self) -> Features:
        """What admission asks of all rooms' settings."""
        return Features(
            families=self.admission.families(),
            subnets=self.subnets.enabled,
            guard_deletion=self.admission.guard_deletion,
        )


SOURCES = Sources(
    Settings,
    "spiderpool-controller",
    "Spiderpool's cluster controller.",
    "controller.settings",
    "settings-controller.md",
)
"""Where they come from."""

if __name__ == "__main__":
    sys.exit(SOURCES.main(sys.argv[1:]))
