"""spiderpool-controller of the cluster: one process on loopback, with the rights of its manifest and no others.

The API server asks it for admission by a URL, since the server is not in the pods' network.
"""

from __future__ import annotations

import contextlib
import http.client
import signal
import sys

import yaml

from lab.kube.cluster import Cluster, free_ports
from lab.kube.components import HOST
from lab.layout import SOURCES

NAME = "spiderpool-controller"
"""Of the process, its service account and the webhook configurations."""
NAMESPACE = "kube-system"
MANIFEST = f"{SOURCES}/deploy/rbac-controller.yaml"
_CONFIGURATIONS = "/apis/admissionregistration.k8s.io/v1"


def install(cluster: Cluster, cni_directory: str) -> None:
    """Its rights and its settings. Raises LabError, OSError."""
    cluster.kubectl("apply", "--server-side", "-f", MANIFEST)
    webhook, health, metrics = free_ports(3)
    settings = {
        "pod": {"name": NAME, "namespace": NAMESPACE},
        "kubernetes": {"kubeconfig": cluster.service_account(NAMESPACE, NAME)},
        "webhook": {"host": HOST, "port": webhook, "url": f"https://{HOST}:{webhook}", "drain": 0},
        "health": {"port": health, "metrics_port": metrics},
        "coordinator": {"cni_directory": cni_directory},
    }
    with open(_settings(cluster), "w") as file:
        yaml.safe_dump(settings, file, sort_keys=False)


def start(cluster: Cluster) -> None:
    """Start it; the API server asks it for admission when this returns. Raises LabError."""
    cluster.launch(
        NAME,
        [sys.executable, "-m", "controller", "--config", _settings(cluster)],
        lambda: get(cluster, "/v1/runtime/readiness")[0] == 200 and _asked(cluster),
        folder="controller",
    )


def stop(cluster: Cluster, number: signal.Signals = signal.SIGTERM) -> None:
    """End it with a signal, SIGKILL for a crash. Raises LabError."""
    cluster.stop(NAME, number)


def get(cluster: Cluster, path: str, server: str = "port") -> tuple[int, str]:
    """Status and text of its answer to a GET, by its health server or its `metrics_port`; 0 if there is none."""
    with open(_settings(cluster)) as file:
        port = int(yaml.safe_load(file)["health"][server])
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    return 0, ""


def _asked(cluster: Cluster) -> bool:
    kinds = ("mutatingwebhookconfigurations", "validatingwebhookconfigurations")
    return all(cluster.ask(f"{_CONFIGURATIONS}/{kind}/{NAME}")[0] == 200 for kind in kinds)


def _settings(cluster: Cluster) -> str:
    return f"{cluster.place.lab.state}/controller.yaml"
