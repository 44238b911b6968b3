"""What each program of the cluster is started with: pure functions from names to command lines.

etcd's clients come by a Unix socket in the cluster's folder, which only root may enter, so that no port of this machine
leads past the API server's authorization; its peers, of which there are none, would need a certificate of ours. The
controllers serve nothing. That leaves one port: the API server's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lab.kube.build import program
from lab.layout import Lab

ETCD, SERVER, CONTROLLERS = "etcd", "kube-apiserver", "kube-controller-manager"
SCHEDULER = "kube-scheduler"
"""Only where there are nodes."""
ORDER = (ETCD, SERVER, CONTROLLERS)
"""Each needs the one before it; they stop in the opposite order."""
HOST = "127.0.0.1"
SERVICE_CIDRS = "10.96.0.0/16,fd00:96::/112"
"""Addresses of services, of both families; lab/manifests has some of them."""
SERVER_NAMES = (HOST, "localhost", "10.96.0.1", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
ISSUER = "https://kubernetes.default.svc.cluster.local"
"""Who signs service-account tokens."""
STOP_WITHIN = 10.0
"""Seconds that a process has to stop by itself; then it is killed."""
_NOWHERE = "https://127.0.0.1:1"
"""What etcd tells other members about its address; there are none."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cluster's files are and what its port is."""

    lab: Lab
    port: int
    server_flags: tuple[str, ...] = ()
    """Flags of the API server besides ours; a later one wins."""

    @property
    def url(self) -> str:
        """Of the API server."""
        return f"https://{HOST}:{self.port}"

    @property
    def pki(self) -> str:
        """Folder of keys and certificates."""
        return f"{self.lab.state}/pki"

    @property
    def etcd(self) -> str:
        """Socket of etcd's clients."""
        return f"{self.lab.state}/etcd.sock"

    def kubeconfig(self, name: str) -> str:
        """Path of a client's configuration."""
        return f"{self.lab.state}/{name}.kubeconfig"


def argv(component: str, place: Place) -> list[str]:
    """The command line of a component. Raises LabError if it is not built."""
    flags = {ETCD: _etcd, SERVER: _server, CONTROLLERS: _controllers, SCHEDULER: _scheduler}[component](place)
    return [program(component), *flags]


def _etcd(place: Place) -> Sequence[str]:
    pki = place.pki
    return (
        "--name=lab",
        f"--data-dir={place.lab.state}/etcd",
        f"--listen-client-urls=unix://{place.etcd}",
        f"--advertise-client-urls={_NOWHERE}",
        f"--listen-peer-urls=unixs://{place.lab.state}/peer.sock",
        f"--initial-advertise-peer-urls={_NOWHERE}",
        f"--initial-cluster=lab={_NOWHERE}",
        "--peer-client-cert-auth",
        f"--peer-trusted-ca-file={pki}/ca.crt",
        f"--peer-cert-file={pki}/etcd.crt",
        f"--peer-key-file={pki}/etcd.key",
        # It elects itself without waiting a second for others; each heartbeat costs an idle cluster something.
        "--heartbeat-interval=50",
        "--election-timeout=250",
        "--log-level=warn",
    )


def _server(place: Place) -> Sequence[str]:
    pki = place.pki
    return (
        f"--etcd-servers=unix://{place.etcd}",
        f"--bind-address={HOST}",
        f"--advertise-address={HOST}",
        f"--secure-port={place.port}",
        # The lab holds the port until the server listens, so that nobody else can get it in between.
        "--permit-port-sharing",
        f"--tls-cert-file={pki}/server.crt",
        f"--tls-private-key-file={pki}/server.key",
        f"--client-ca-file={pki}/ca.crt",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged",
        f"--service-account-issuer={ISSUER}",
        f"--service-account-key-file={pki}/service-account.pub",
        f"--service-account-signing-key-file={pki}/service-account.key",
        f"--service-cluster-ip-range={SERVICE_CIDRS}",
        # Endpoints may not be loopback addresses, so the service `kubernetes` has none here.
        "--endpoint-reconciler-type=none",
        "--profiling=false",
        *place.server_flags,
    )


def _controllers(place: Place) -> Sequence[str]:
    return (
        f"--kubeconfig={place.kubeconfig('controllers')}",
        "--use-service-account-credentials",
        f"--service-account-private-key-file={place.pki}/service-account.key",
        f"--root-ca-file={place.pki}/ca.crt",
        "--leader-elect=false",
        # A node that is silent for so long is lost; tests of that need not wait for 50 s.
        "--node-monitor-period=1s",
        "--node-monitor-grace-period=10s",
        # Nodes that somebody makes by hand have no kubelet that would ever tell of them: they stay usable.
        "--node-startup-grace-period=24h",
        # The default of 20 requests a second makes it take two seconds longer to begin.
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
        "--secure-port=0",
        "--profiling=false",
    )


def _scheduler(place: Place) -> Sequence[str]:
    config = place.kubeconfig("system:kube-scheduler")
    return (f"--kubeconfig={config}", "--leader-elect=false", "--secure-port=0", "--profiling=false")
