"""Resident memory of the node agents of a lab: all rooms furnished, pods attached, services loaded."""

from __future__ import annotations

import secrets
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from lab.layout import NODES, Lab
from lab.nodes import BIN, agent
from lab.state import State

LIMIT_MB = 120


def resident_mb(pid: int) -> float:
    """VmRSS of a process, in MB of 10^6 bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"process {pid} has no VmRSS")


def rows() -> list[dict[str, Any]]:
    """`agent_rss_mb`: the median over the lab's agents."""
    lab = Lab(f"splb{secrets.token_hex(3)}")
    command = [f"{BIN}/spiderpool-lab", "--name", lab.name]
    try:
        subprocess.run([*command, "up"], check=True, stdout=subprocess.DEVNULL, timeout=120)
        processes = State.load(lab).processes
        figures = [resident_mb(processes[agent(node.name)].pid) for node in NODES]
    finally:
        subprocess.run([*command, "down"], check=True, stdout=sys.stderr, timeout=60)
    return [
        {
            "name": "agent_rss_mb",
            "value": statistics.median(figures),
            "reference": LIMIT_MB,
            "ratio": None,
            "unit": "MB",
            "samples": len(figures),
            "max": max(figures),
        }
    ]
