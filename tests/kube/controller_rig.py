"""Controllers as processes on a real API server, and requests whose refusals are looked at to the letter."""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api.meta import GROUP, VERSION
from lab.kube.cluster import Cluster, free_ports

ROOT = Path(__file__).parents[2]
NAMESPACE = "kube-system"
API = f"/apis/{GROUP}/{VERSION}"
CONFIGURATIONS = "/apis/admissionregistration.k8s.io/v1"
LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/spiderpool-controller-leases"
SECRET = f"/api/v1/namespaces/{NAMESPACE}/secrets/spiderpool-controller-server-certs"
Json = dict[str, Any]
POOLS, RESERVED, SUBNETS = "spiderippools", "spiderreservedips", "spidersubnets"
KINDS = {POOLS: "SpiderIPPool", RESERVED: "SpiderReservedIP", SUBNETS: "SpiderSubnet"}


def eventually(seconds: float, done: Callable[[], object], what: str) -> float:
    """Wait until `done` is true; how long it took. A refused connection counts as false."""
    began = time.monotonic()
    while True:
        try:
            if done():
                return time.monotonic() - began
        except OSError:
            pass
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def manifest(plural: str, name: str, **spec: object) -> Json:
    """An object of ours."""
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KINDS[plural],
        "metadata": {"name": name},
        "spec": spec,
    }


class Requests:
    """The administrator's requests to the API server."""

    def __init__(self, cluster: Cluster) -> None:
        pki = cluster.place.pki
        self._tls = ssl.create_default_context(cafile=f"{pki}/ca.crt")
        self._tls.load_cert_chain(f"{pki}/admin.crt", f"{pki}/admin.key")
        self._port = cluster.place.port

    def __call__(
        self, method: str, path: str, body: object = None, content: str = "application/json"
    ) -> tuple[int, Json]:
        connection = http.client.HTTPSConnection("127.0.0.1", self._port, context=self._tls, timeout=30)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": content})
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        try:
            return answer.status, json.loads(text)
        except ValueError:  # of a kind that is not served, for one
            return answer.status, {"message": text}

    def create(self, plural: str, name: str, **spec: object) -> tuple[int, Json]:
        return self("POST", f"{API}/{plural}", manifest(plural, name, **spec))

    def merge(self, plural: str, name: str, patch: Mapping[str, object]) -> tuple[int, Json]:
        return self("PATCH", f"{API}/{plural}/{name}", patch, "application/merge-patch+json")

    def remove(self, plural: str, name: str) -> None:
        """Delete it, finalizers notwithstanding, and wait until it is gone."""
        path = f"{API}/{plural}/{name}"
        self("DELETE", path)
        status, answer = self.merge(plural, name, {"metadata": {"finalizers": None}})
        assert status in (200, 404), answer
        eventually(10, lambda: self("GET", path)[0] == 404, f"{path} is gone")


@dataclass
class Replica:
    """One controller process."""

    name: str
    process: subprocess.Popen[bytes]
    webhook: int
    health: int
    metrics: int
    log: Path

    def probe(self, page: str = "readiness") -> int:
        """The status that a probe gets; 0 without an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.health, timeout=5)
        try:
            connection.request("GET", f"/v1/runtime/{page}")
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def exported(self) -> dict[str, float]:
        """Its metrics, labels as the text format writes them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics, timeout=5)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        pairs = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def lines(self, message: str) -> list[Json]:
        """What it logged with `message` in it."""
        found = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in found if message in line.get("message", "")]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(20)


def start(cluster: Cluster, folder: Path, name: str, *flags: str) -> Replica:
    """A controller; it is not waited for."""
    webhook, health, metrics = free_ports(3)
    log = folder / f"{name}.log"
    command = [
        *(sys.executable, "-m", "controller"),
        *("--kubernetes-kubeconfig", cluster.admin),
        *("--pod-name", name, "--pod-namespace", NAMESPACE),
        *("--webhook-host", "127.0.0.1", "--webhook-port", str(webhook)),
        *("--webhook-url", f"https://127.0.0.1:{webhook}", "--webhook-drain", "0"),
        *("--health-port", str(health), "--health-metrics-port", str(metrics)),
        *("--leader-duration", "5", "--leader-renew-deadline", "3", "--leader-retry-period", "0.5"),
        *flags,
    ]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "/nonexistent"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, cwd=ROOT, env=environment)
    return Replica(name, process, webhook, health, metrics, log)


def forget(cluster: Cluster) -> None:
    """Remove what controllers leave behind on purpose: without them the API server would wait for their admission."""
    ask = Requests(cluster)
    for kind in ("mutatingwebhookconfigurations", "validatingwebhookconfigurations"):
        ask("DELETE", f"{CONFIGURATIONS}/{kind}/spiderpool-controller")
    for path in (LEASE, SECRET):
        ask("DELETE", path)
    probe, path = manifest(POOLS, "probe", subnet="nonsense"), f"{API}/{POOLS}?dryRun=All"
    # It hears of that a moment later. Where they cleaned up, there are no kinds of ours.
    eventually(10, lambda: ask("POST", path, probe)[0] in (201, 404), "admission is not asked any more")


@contextmanager
def controllers(cluster: Cluster, folder: Path) -> Iterator[Callable[..., Replica]]:
    """Starts controllers, and ends and removes what is left of them; prints their logs, which pytest shows if the test
    failed."""
    replicas: list[Replica] = []

    def launch(name: str, *flags: str) -> Replica:
        replica = start(cluster, folder, name, *flags)
        replicas.append(replica)
        return replica

    try:
        yield launch
    finally:
        for replica in replicas:
            if replica.process.poll() is None:
                replica.process.terminate()
        for replica in replicas:
            try:
                replica.process.wait(10)
            except subprocess.TimeoutExpired:
                replica.process.kill()
                replica.process.wait()
            print(f"--- {replica.name}\n{replica.log.read_text()}")
        with suppress(OSError):  # the server may be what has failed
            forget(cluster)
