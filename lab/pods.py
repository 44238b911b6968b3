"""Pods and other actors: a namespace, a process in the right cgroup, and the chain that connects them."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import uuid
from typing import Any, NoReturn

from lab import chain, topology
from lab.layout import NODES, PORT, Lab, LabError
from lab.process import Control, cgroup2_root, end, enter_netns, last_lines, record, run, spawn
from lab.state import Attachment, State

READY_WITHIN = 15
"""Seconds that an actor has until its sockets are open."""


def cgroup(lab: Lab, *path: str) -> str:
    """A cgroup of the lab, made if it is absent."""
    folder = os.path.join(cgroup2_root(), lab.name, *path)
    os.makedirs(folder, exist_ok=True)
    return folder


def start_actor(state: State, name: str, netns: str, folder: str) -> None:
    """Start the actor `name` in the namespace `netns` (short name) and the cgroup `folder`, and wait for its sockets.

    Raises LabError.
    """
    lab = state.lab
    with contextlib.suppress(FileNotFoundError):
        os.unlink(lab.control(name))
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "actor.py")
    argv = [sys.executable, "-I", "-S", script, name, f"{folder}/cgroup.procs", lab.control(name), str(PORT)]
    process = spawn(argv, netns=lab.netns_path(netns), log=lab.log(name), stdout=subprocess.PIPE)
    state.add_process(name, record(process))
    with process.stdout or open(os.devnull, "rb") as output:
        ready = select.select([output], [], [], READY_WITHIN)[0] and output.readline()
    if not ready:
        raise LabError(f"the process of {name} did not start:\n{last_lines(lab.log(name))}")


def stop_actor(state: State, name: str) -> None:
    """End the actor, if it runs."""
    process = state.processes.get(name)
    if process is not None:
        end(process, signal.SIGKILL, 10)
        state.remove_process(name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(state.lab.control(name))


def create(state: State, pod: str, node: str, network: str = "underlay") -> Attachment:
    """A running pod, attached to the network. What a failure leaves is removed. Raises ChainError, LabError."""
    attachment = sandbox(state, pod, node, network)
    try:
        return attach(state, attachment)
    except LabError as error:
        try:
            destroy(state, pod)
        except LabError as second:
            raise LabError(f"{error}; then its DEL failed: {second}") from None
        raise


def sandbox(state: State, pod: str, node: str, network: str, *, uid: str = "", netns: str = "") -> Attachment:
    """A pod with a running process and no network yet but `lo`; a new pod unless `uid` says which. Raises LabError.

    `netns` is the namespace's short name if it is not the pod's.
    """
    lab = state.lab
    netns = netns or pod
    attachment = Attachment(
        pod=pod,
        node=node,
        network=network,
        container_id=secrets.token_hex(32),
        uid=uid or str(uuid.uuid4()),
        netns=lab.netns_path(netns),
    )
    state.put(attachment)
    run(["ip", "netns", "add", lab.netns(netns)])
    run(["ip", "-n", lab.netns(netns), "link", "set", "lo", "up"])
    start_actor(state, pod, netns, cgroup(lab, node, "pods", pod))
    return attachment


def attach(state: State, attachment: Attachment) -> Attachment:
    """ADD; remembers the result. Raises ChainError, LabError."""
    attachment = chain.add(state.lab, attachment)
    state.put(attachment)
    return attachment


def destroy(state: State, pod: str) -> None:
    """End the pod as a runtime does: its process, DEL, its namespace. Raises ChainError, LabError."""
    attachment = state.attachments[pod]
    stop_actor(state, pod)
    chain.delete(state.lab, attachment)
    run(["ip", "netns", "delete", os.path.basename(attachment.netns)])
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(os.path.join(cgroup2_root(), state.lab.name, attachment.node, "pods", pod))
    state.drop(pod)


def ask(lab: Lab, actor: str, op: str, **arguments: Any) -> dict[str, Any]:
    """What the actor answers to one request; `error` is in it if that failed. Raises LabError."""
    try:
        with Control(lab.control(actor)) as control:
            return control(op, **arguments)
    except OSError as error:
        raise LabError(f"the process of {actor} does not answer ({error}):\n{last_lines(lab.log(actor))}") from None


def become(state: State, place: str, argv: list[str]) -> NoReturn:
    """Turn this process into a command inside a pod or on a node: its network namespace and its cgroup.

    `ip netns exec` does the first only, and services are a matter of the cgroup. Raises LabError.
    """
    lab = state.lab
    if place in state.attachments:
        folder = cgroup(lab, state.attachments[place].node, "pods", place)
    elif place in (node.name for node in NODES):
        folder = cgroup(lab, place, "host")
    elif place in topology.MEMBERS:
        folder = cgroup(lab, "elsewhere")
    else:
        known = [*state.attachments, *(node.name for node in NODES), *topology.MEMBERS]
        raise LabError(f"there is no {place!r} in the lab; there are {', '.join(dict.fromkeys(known))}")
    with open(f"{folder}/cgroup.procs", "w") as procs:
        procs.write("0")
    enter_netns(lab.netns_path(place))
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - the user's own command, for the user
    except OSError as error:
        raise LabError(f"{argv[0]}: {error.strerror}") from None
