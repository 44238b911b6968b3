"""A cluster that is up: what runs, where it is, and what a test or a person can do with it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import select
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import yaml

from lab.kube.build import program
from lab.kube.components import CONTROLLERS, ETCD, HOST, SCHEDULER, SERVER, SERVER_NAMES, STOP_WITHIN, Place, argv
from lab.kube.pki import Authority, new_key, write_secret
from lab.layout import SOURCES, Lab, LabError
from lab.nodes import entering
from lab.pods import cgroup
from lab.process import Started, alive, end, last_lines, record, run, spawn

CRDS = f"{SOURCES}/api/crds"
NETWORKS = f"{os.path.dirname(os.path.abspath(__file__))}/manifests/network-attachment-definition.yaml"
"""The definition of what Multus reads and our controller writes."""
_DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
ACCOUNTS_LAST = "24h"
"""For how long service accounts' tokens hold: longer than a lab."""
READY_WITHIN = 90.0
"""Seconds that a part of the cluster has until it is ready; on an idle machine it takes a few."""
_LOOK_EVERY = 0.02
"""Seconds between two looks at a part that is coming up."""
_PORTS = range(20000, 32000)
"""Below what Linux gives to outgoing connections (ip_local_port_range), so that a port stays free for a restart."""
RECORD = "cluster.json"
"""File name of the record, in the folder of the lab's state."""


class Cluster:
    """A control plane on loopback, as its record has it. Not for several threads at once."""

    def __init__(self, place: Place, processes: dict[str, Started], *, complete: bool) -> None:
        self.place = place
        self.processes = processes
        """What was started, and not stopped by `stop`."""
        self.complete = complete
        """Whether `up` came to its end."""

    @classmethod
    def load(cls, lab: Lab) -> Cluster:
        """The cluster of that name. Raises LabError if there is none."""
        try:
            with open(f"{lab.state}/{RECORD}") as file:
                content = json.load(file)
        except FileNotFoundError:
            raise LabError(f"there is no cluster {lab.name!r}; python -m lab.kube --name {lab.name} up") from None
        place = Place(lab, content["port"], tuple(content["server_flags"]))
        processes = {name: Started(*process) for name, process in content["processes"].items()}
        return cls(place, processes, complete=content["complete"])

    def save(self) -> None:
        """Write the record, so that it is never half written."""
        content = {
            "complete": self.complete,
            "port": self.place.port,
            "processes": self.processes,
            "server_flags": self.place.server_flags,
        }
        write_secret(f"{self.place.lab.state}/{RECORD}", json.dumps(content, indent=1).encode())

    @property
    def admin(self) -> str:
        """Path of the kubeconfig of a member of system:masters."""
        return self.place.kubeconfig("admin")

    def runs(self, component: str) -> bool:
        """Whether `etcd`, `kube-apiserver` or `kube-controller-manager` runs."""
        process = self.processes.get(component)
        return process is not None and alive(process)

    def start(self, component: str) -> None:
        """Start a part and wait until it is ready. Raises LabError with its log's end."""
        if self.runs(component):
            return
        with held(self.place.port) if component == SERVER else contextlib.nullcontext():
            ready: Callable[[], bool] = {
                ETCD: self._etcd_is_ready,
                SERVER: self._server_is_ready,
                CONTROLLERS: self._controllers_are_ready,
                SCHEDULER: lambda: True,  # nobody waits for it, but pods
            }[component]
            self.launch(component, argv(component, self.place), ready, folder=component)

    def launch(self, name: str, command: Sequence[str], ready: Callable[[], bool], *, folder: str) -> None:
        """Start a process in a cgroup of the cluster and wait until it is ready. Raises LabError with its log's end."""
        lab = self.place.lab
        started = record(spawn([*entering(cgroup(lab, folder)), *command], log=lab.log(name)))
        self.processes[name] = started
        self.save()
        _await(ready, started, name, lab.log(name))

    def stop(self, component: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End a part with a signal, `SIGKILL` for a crash. Raises LabError when it does not end in its time."""
        process = self.processes.get(component)
        if process is not None and not end(process, number, STOP_WITHIN):
            raise LabError(
                f"{component} does not end on {number.name} within {STOP_WITHIN:g} s; "
                f"the end of its log:\n{last_lines(self.place.lab.log(component))}"
            )
        self.processes.pop(component, None)
        self.save()

    def kubectl(self, *arguments: str, stdin: str = "", user: str = "admin", timeout: float = 60) -> str:
        """What kubectl prints, run as a user who has a kubeconfig. Raises LabError with what it complains about."""
        place = self.place
        flags = [f"--kubeconfig={place.kubeconfig(user)}", f"--cache-dir={place.lab.state}/kubectl-cache"]
        return run([program("kubectl"), *flags, *arguments], stdin=stdin, timeout=timeout)

    def kubeconfig(self, user: str, groups: Sequence[str] = ()) -> str:
        """Path of a new kubeconfig for a user, known by a client certificate; their rights are RBAC's to give."""
        authority, name = Authority(self.place.pki), f"user-{user}"
        authority.issue(name, user, groups=groups)
        return self._write_kubeconfig(authority, name, user)

    def service_account(self, namespace: str, name: str) -> str:
        """Path of a kubeconfig for a service account that exists, with a new token. Raises LabError."""
        path = self.place.kubeconfig(name)
        token = self.kubectl("create", "token", name, "--namespace", namespace, "--duration", ACCOUNTS_LAST)
        content = Authority(self.place.pki).token_kubeconfig(name, token.strip(), self.place.url)
        write_secret(path, yaml.safe_dump(content, sort_keys=False).encode())
        return path

    def apply_crds(self) -> None:
        """Apply our CRDs and that of networks, as kubectl would, and wait until they are served. Raises LabError."""
        paths = []
        for document in _definitions():
            path = f"{_DEFINITIONS}/{document['metadata']['name']}?fieldManager=kubectl&force=true"
            status, answer = self._send("PATCH", path, json.dumps(document), "application/apply-patch+yaml")
            if status not in (200, 201):
                raise LabError(f"{path}: {status} {answer}")
            spec = document["spec"]
            versions = (version["name"] for version in spec["versions"])
            paths += [f"/apis/{spec['group']}/{version}/{spec['names']['plural']}" for version in versions]
        # The server opens the storage of a kind when it is first asked, and says 429 until its watch cache is filled.
        deadline = time.monotonic() + READY_WITHIN
        for path in paths:
            while (status := self.ask(path)[0]) != 200:
                if time.monotonic() > deadline:
                    raise LabError(f"{path} is answered with {status}, {READY_WITHIN:g} s after it was defined")
                time.sleep(_LOOK_EVERY)

    def compact(self) -> int:
        """Make etcd forget everything before now; the revision that is now the oldest. Raises LabError.

        The API server's watch cache does not know of it: restart the server as well, or start it with
        `--watch-cache=false`, to have watches and continued lists from before refused with 410.
        """
        revision = int(_etcd_call(self.place.etcd, "kv/range", {"key": "AA=="})["header"]["revision"])
        _etcd_call(self.place.etcd, "kv/compaction", {"revision": str(revision), "physical": True})
        return revision

    def prepare(self) -> None:
        """Folders, keys, certificates and configurations, before anything is started."""
        lab, pki = self.place.lab, self.place.pki
        for folder in (pki, f"{lab.state}/log"):
            os.makedirs(folder, mode=0o700)
        self.save()
        authority = Authority(pki)
        authority.create()
        new_key(f"{pki}/service-account")
        authority.issue("etcd", "etcd", hosts=[HOST])
        authority.issue("server", "kube-apiserver", hosts=SERVER_NAMES)
        authority.issue("admin", "admin", groups=["system:masters"])
        authority.issue("controllers", "system:kube-controller-manager")
        for user in ("admin", "controllers"):
            self._write_kubeconfig(authority, user, user)

    def _write_kubeconfig(self, authority: Authority, certificate: str, user: str) -> str:
        path = self.place.kubeconfig(user)
        content = authority.kubeconfig(certificate, self.place.url)
        write_secret(path, yaml.safe_dump(content, sort_keys=False).encode())
        return path

    def _etcd_is_ready(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return _ask(_UnixConnection(self.place.etcd), "GET", "/health") == (200, {"health": "true", "reason": ""})
        return False

    def _server_is_ready(self) -> bool:
        return self.ask("/readyz")[0] == 200

    def _controllers_are_ready(self) -> bool:
        # They serve nothing to ask, so look at what they do: nothing can run before this account exists.
        return self.ask("/api/v1/namespaces/default/serviceaccounts/default")[0] == 200

    def ask(self, path: str, accept: str = "application/json") -> tuple[int, Any]:
        """Status and answer of a GET by the administrator; 0 if the server does not answer."""
        return self._send("GET", path, accept=accept)

    def _send(
        self, verb: str, path: str, body: str | None = None, content: str = "application/json", accept: str = "*/*"
    ) -> tuple[int, Any]:
        pki = self.place.pki
        context = ssl.create_default_context(cafile=f"{pki}/ca.crt")
        context.load_cert_chain(f"{pki}/admin.crt", f"{pki}/admin.key")
        connection = http.client.HTTPSConnection(HOST, self.place.port, timeout=5, context=context)
        with contextlib.suppress(OSError, http.client.HTTPException):
            return _ask(connection, verb, path, body, {"Content-Type": content, "Accept": accept})
        return 0, None


def _definitions() -> Iterator[Any]:
    for path in (*(f"{CRDS}/{name}" for name in sorted(os.listdir(CRDS))), NETWORKS):
        with open(path) as file:
            yield from filter(None, yaml.safe_load_all(file))


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has. Raises LabError if there are not so many."""
    found: list[int] = []
    for port in random.sample(_PORTS, 100):
        # Without SO_REUSEPORT, by which the port of another cluster's API server could be shared.
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((HOST, port))
            found.append(port)
        if len(found) == count:
            return found
    raise LabError(f"too few free ports from {_PORTS.start} to {_PORTS.stop}")


@contextlib.contextmanager
def held(port: int) -> Iterator[None]:
    """Keep others from a port: a socket that is bound and does not listen gets no connections (SO_REUSEPORT)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((HOST, port))
        yield


def _await(ready: Callable[[], bool], process: Started, name: str, log: str) -> None:
    deadline = time.monotonic() + READY_WITHIN
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        raise LabError(f"{name} ended at once; the end of its log:\n{last_lines(log)}") from None
    try:
        while not ready():
            if select.select([fd], [], [], _LOOK_EVERY)[0]:
                raise LabError(f"{name} ended; the end of its log:\n{last_lines(log)}")
            if time.monotonic() > deadline:
                raise LabError(
                    f"{name} was not ready within {READY_WITHIN:g} s; the end of its log:\n{last_lines(log)}"
                )
    finally:
        os.close(fd)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        """As http.client has it."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _etcd_call(path: str, method: str, body: dict[str, Any]) -> dict[str, Any]:
    """What etcd answers to a call of its JSON gateway. Raises LabError."""
    try:
        status, answer = _ask(_UnixConnection(path), "POST", f"/v3/{method}", json.dumps(body))
    except (OSError, http.client.HTTPException) as error:
        raise LabError(f"etcd does not answer {method}: {error}") from error
    if status != 200 or not isinstance(answer, dict):
        raise LabError(f"etcd refuses {method}: {status} {answer}")
    return answer


def _ask(
    connection: http.client.HTTPConnection,
    verb: str,
    path: str,
    body: str | None = None,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> tuple[int, Any]:
    """Status and answer, parsed if it is JSON. Raises OSError and HTTPException."""
    with contextlib.closing(connection):
        connection.request(verb, path, body, headers)
        response = connection.getresponse()
        content = response.read()
    try:
        return response.status, json.loads(content)
    except ValueError:
        return response.status, content
