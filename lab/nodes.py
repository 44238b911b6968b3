"""A node: its agent as a daemon of its own, with everything that two nodes on one machine must not share."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from typing import Any

import yaml

from lab.layout import DEFAULT_NAME, SOURCES, Lab, LabError
from lab.pods import cgroup
from lab.process import alive, end, in_netns, last_lines, record, run, spawn
from lab.state import State

READY_WITHIN = 40
"""Seconds that an agent has until it is ready; compiling the eBPF programs on a slow machine is most of it."""
STOP_WITHIN = 10
"""Seconds that an agent has to stop by itself."""
HEALTH_PORT = 5710
METRICS_PORT = 5711
"""The agent's own defaults: each node has a network namespace of its own."""
BIN = os.path.dirname(os.path.abspath(sys.executable))
"""Where the console scripts are, beside the interpreter."""
CNI_BUILT = f"{SOURCES}/build/cni"
HEADERS = f"{SOURCES}/build/headers"
"""Where agents keep what BCC compiles with; it outlives a lab, as a package's cache does."""


def command_line(lab: Lab, words: str, program: str = "spiderpool-lab") -> str:
    """What a person types to run one of our programs: short from within the checkout, right from everywhere else."""
    folder = os.path.relpath(BIN) if os.getcwd() == SOURCES else BIN
    name = f" --name {lab.name}" if program == "spiderpool-lab" and lab.name != DEFAULT_NAME else ""
    return f"{folder}/{program}{name} {words}"


def agent(node: str) -> str:
    """Name of the node's agent among the lab's processes."""
    return f"{node}-agent"


def settings(lab: Lab, node: str) -> dict[str, dict[str, object]]:
    """The agent's settings file."""
    return {
        "node": {"name": node},
        "server": {"socket": lab.socket(node)},
        "queue": {"directory": lab.queue(node)},
        "store": {"path": lab.store},
        "ipam": {"enable_ip_conflict_detection": True, "enable_gateway_detection": True},
        "dataplane": {
            "cgroup": cgroup(lab, node),
            "bpffs": lab.pins(node),
            "headers_cache": f"{SOURCES}/build/headers",
        },
    }


def prepare(lab: Lab, node: str) -> None:
    """The node's folders, its CNI executables and its agent's settings file. Raises LabError."""
    for folder in (lab.node(node), lab.cni_bin(node), lab.queue(node), lab.pins(node)):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    for name in ("spiderpool", "coordinator"):
        source, target = f"{CNI_BUILT}/{name}", f"{lab.cni_bin(node)}/{name}"
        if not os.access(source, os.X_OK):
            raise LabError(f"{source} is missing: run plugins/shim/build.sh")
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copy(source, target)
    with open(f"{lab.cni_bin(node)}/.spiderpool.paths", "w") as paths:
        paths.write(f"{lab.socket(node)}\n{lab.queue(node)}\n")
    with open(f"{lab.node(node)}/agent.yaml", "w") as file:
        yaml.safe_dump(settings(lab, node), file, sort_keys=False)


def entering(folder: str) -> list[str]:
    """What to put in front of a command so that it runs in a cgroup, and ends with the lab whatever becomes of us."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "enter.py")
    return [sys.executable, "-I", "-S", script, f"{folder}/cgroup.procs"]


def start_agent(state: State, node: str) -> float:
    """Start the node's agent and wait until it is ready; the seconds it took. Raises LabError with the log's end."""
    lab = state.lab
    begin = time.monotonic()
    name, log = agent(node), lab.log(agent(node))
    told = f"{lab.node(node)}/notify.sock"
    program = [f"{BIN}/spiderpool-agent", "--config", f"{lab.node(node)}/agent.yaml"]
    with contextlib.suppress(FileNotFoundError):
        os.unlink(told)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(told)
        process = spawn(
            [*entering(cgroup(lab, node, "agent")), *program],
            netns=lab.netns_path(node),
            log=log,
            NOTIFY_SOCKET=told,
        )
        started = record(process)
        state.add_process(name, started)
        fd = os.pidfd_open(started.pid)
        try:
            while b"READY=1" not in _told(notify, fd, begin + READY_WITHIN, name, log):
                pass
        finally:
            os.close(fd)
    status, body = http_get(lab, node, HEALTH_PORT, "/v1/runtime/readiness")
    if status != 200:
        raise LabError(f"{name} says that it is ready and answers {status} {body!r}:\n{last_lines(log)}")
    return time.monotonic() - begin


def _told(notify: socket.socket, process: int, deadline: float, name: str, log: str) -> bytes:
    """The next message of the agent. Raises LabError when it ends, or stays silent until the deadline."""
    readable, _, _ = select.select([notify.fileno(), process], [], [], max(0, deadline - time.monotonic()))
    if notify.fileno() in readable:
        return notify.recv(4096)
    what = "ended" if readable else f"was not ready within {READY_WITHIN} s"
    raise LabError(f"{name} {what}; the end of {log}:\n{last_lines(log)}")


def stop_agent(state: State, node: str, number: signal.Signals = signal.SIGTERM) -> None:
    """End the node's agent, if it runs. Raises LabError when it does not end."""
    process = state.processes.get(agent(node))
    if process is not None and not end(process, number, STOP_WITHIN):
        raise LabError(f"{agent(node)} does not stop on {number.name}; its log is {state.lab.log(agent(node))}")
    state.remove_process(agent(node))


def agent_runs(state: State, node: str) -> bool:
    """Whether the node's agent runs."""
    process = state.processes.get(agent(node))
    return process is not None and alive(process)


def http_get(lab: Lab, node: str, port: int, path: str) -> tuple[int, str]:
    """Status and body of an HTTP GET at the node's loopback. Raises LabError."""

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), timeout=5)

    try:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.sock = in_netns(lab.netns_path(node), connect)
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise LabError(f"no answer from {node} port {port} {path}: {error}") from None


def metric(lab: Lab, node: str, name: str) -> float:
    """A metric without labels, as the node's agent tells it. Raises LabError."""
    status, body = http_get(lab, node, METRICS_PORT, "/metrics")
    for line in body.splitlines():
        found, _, value = line.partition(" ")
        if found == name:
            return float(value)
    raise LabError(f"the agent of {node} has no metric {name} (status {status})")


def queued(lab: Lab, node: str) -> list[str]:
    """The DELs that wait for the node's agent, and those that it gave up (below `failed/`)."""
    return sorted(
        os.path.relpath(os.path.join(folder, name), lab.queue(node))
        for folder, _, names in os.walk(lab.queue(node))
        for name in names
        if not name.startswith(".")
    )


def ctl(lab: Lab, *arguments: str, stdin: str = "") -> str:
    """Output of `spiderpoolctl` on the lab's store. Raises LabError with what it said."""
    argv = [f"{BIN}/spiderpoolctl", *arguments, "--store", lab.store]
    return run(argv, before=entering(cgroup(lab, "elsewhere")), stdin=stdin)


def ctl_list(lab: Lab, kind: str) -> list[dict[str, Any]]:
    """All objects of a kind. Raises LabError."""
    items: list[dict[str, Any]] = json.loads(ctl(lab, "get", kind, "-A", "-o", "json"))["items"]
    return items
