"""How the store on the Kubernetes API reaches its server, and how long it waits for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KubeSettings:
    """Settings of `store.kube.KubeStore`. Times are in seconds."""

    kubeconfig: str = ""
    """Path of a kubeconfig file, or several separated by colons. Empty: the pod's service account if this process is
    in one (KUBERNETES_SERVICE_HOST is set), else $KUBECONFIG or ~/.kube/config as for kubectl."""
    context: str = ""
    """Context of the kubeconfig file; empty: its current one."""
    service_account: str = "/var/run/secrets/kubernetes.io/serviceaccount"
    """Folder of a pod's token and CA."""
    look: float = 30.0
    """Between two looks whether token, CA and certificates were replaced on disk. A 401 or a server certificate that
    cannot be verified makes it look at once."""
    connect: float = 5.0
    """For a connection, TLS included; nothing was sent if it takes longer."""
    attempt: float = 10.0
    """For one answer. Above the time that the API server gives a slow admission webhook by default."""
    deadline: float = 30.0
    """For one call of the port with all its attempts, while the server cannot be reached or is overloaded. Half of an
    ADD's 60 s, so that a caller can still say why; ten times what an API server needs for a restart."""
    page: int = 500
    """Objects of a list asked for in one request: the API server's own tools do the same, and an answer stays small."""
    points: int = 64
    """Requests for single objects under way at the same time; more wait, for as long as their deadline allows."""
    scans: int = 4
    """Lists under way at the same time. They have places of their own: no request for one object waits for a list."""
    watch_least: float = 300.0
    """The server ends each watch after a random time from here on, so that watches spread over several servers."""
    watch_most: float = 600.0
    """Until here."""
    watch_grace: float = 30.0
    """After the time agreed upon, until a watch that the server has not ended counts as dead. A peer that is gone is
    found out sooner, by TCP keepalive; this is for one that is there and silent."""
    backoff_first: float = 0.1
    """Before the second attempt at anything; doubled for each further one, and half to all of it is waited."""
    backoff_most: float = 5.0
    """Between attempts at most; also the most that a server's Retry-After is obeyed by a watch."""
