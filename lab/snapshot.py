"""All that could be left behind, as a set of lines: two snapshots that are equal mean that nothing was."""

from __future__ import annotations

import os

from lab import nodes, topology
from lab.layout import NODES
from lab.process import cgroup2_root, run
from lab.state import State

LOOKS = (
    ("link", ["-o", "link", "show"]),
    ("route", ["-o", "-4", "route", "show", "table", "all"]),
    ("route", ["-o", "-6", "route", "show", "table", "all"]),
    ("rule", ["-o", "-4", "rule", "show"]),
    ("rule", ["-o", "-6", "rule", "show"]),
    ("neighbour", ["-o", "-4", "neighbour", "show", "nud", "permanent"]),
    ("neighbour", ["-o", "-6", "neighbour", "show", "nud", "permanent"]),
)
"""What `ip` is asked for in each node's namespace. Neighbours that the kernel learnt are its own affair."""


def of_kernel(state: State, node: str) -> set[str]:
    """Links, routes, rules, fixed neighbours of the node; its cgroups, pins and waiting DELs. Raises LabError."""
    lab = state.lab
    seen = set()
    for kind, arguments in LOOKS:
        for line in run(["ip", "-n", lab.netns(node), *arguments]).splitlines():
            # The state of a link's counters and queues is no trace, its name is.
            text = line.split(":")[1].strip() if kind == "link" else " ".join(line.split())
            # A link-local address gets its routes a second or two after its link is made, and loses them with it.
            if not ("fe80::" in text and "table local" in text):
                seen.add(f"{node}: {kind} {text}")
    for kind, root in (("cgroup", f"{cgroup2_root()}/{lab.name}/{node}"), ("pin", lab.pins(node))):
        for folder, _, files in os.walk(root):
            names = [os.path.relpath(folder, root), *(os.path.relpath(f"{folder}/{file}", root) for file in files)]
            seen.update(f"{node}: {kind} {name}" for name in (names[:1] if kind == "cgroup" else names))
    seen.update(f"{node}: queued {name}" for name in nodes.queued(lab, node))
    return seen


def of_store(state: State) -> set[str]:
    """Claims and endpoints. Raises LabError."""
    return {
        f"{kind} {item['metadata']['name']}"
        for kind in ("spideripclaims", "spiderendpoints")
        for item in nodes.ctl_list(state.lab, kind)
    }


def take(state: State) -> set[str]:
    """Everything, of both nodes, the store and the machine. Raises LabError."""
    seen = of_store(state) | {f"netns {name}" for name in topology.namespaces(state.lab)}
    for node in NODES:
        seen |= of_kernel(state, node.name)
    return seen


def open_files(state: State, node: str) -> list[str]:
    """What the descriptors of the node's agent point to, without the numbers in it. Raises OSError."""
    pid = state.processes[nodes.agent(node)].pid
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}").partition(":[")[0])
        except FileNotFoundError:
            continue
    return sorted(found)
