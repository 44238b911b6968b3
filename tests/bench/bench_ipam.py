"""100 IPAM ADDs, 32 at a time, through executable, socket, agent and store, beside the `host-local` plugin.

Both are executed in the same way and alternate; every address is checked to be given once. Nothing but the ADDs is
timed: each round ends with the DELs. `host-local` keeps its files where our store keeps its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.integration.installation import ROOT, Installation, netns

CALLS, PARALLEL, ROUNDS = 100, 32, 15
HOST_LOCAL = "/usr/lib/cni/host-local"
SUBNET = "10.6.0.0/16"
POOL = f"""
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderIPPool
metadata: {{name: bench-v4}}
spec:
  subnet: {SUBNET}
  ips: [10.6.0.10-10.6.255.250]
  gateway: 10.6.0.1
"""


class Plugin:
    """One IPAM executable and its configuration."""

    def __init__(self, executable: str, folder: Path, ipam: dict[str, Any]) -> None:
        self._executable = executable
        self._stdin = str(folder / f"{Path(executable).name}.json")
        self._folder = folder
        config = {"cniVersion": "1.0.0", "name": "bench", "type": "macvlan", "ipam": ipam}
        Path(self._stdin).write_text(json.dumps(config))

    def run(self, command: str, netns_path: str, turn: int) -> tuple[float, list[float]]:
        """Execute CALLS calls; milliseconds in all, and of each. Checks the outcome."""
        devices = [(os.POSIX_SPAWN_OPEN, 0, self._stdin, os.O_RDONLY, 0)]
        outputs = [str(self._folder / f"out-{number}") for number in range(CALLS)]
        environments = [self._environment(command, netns_path, f"c{turn}x{number}") for number in range(CALLS)]
        started: dict[int, float] = {}
        durations: list[float] = []
        failed = 0
        began = time.perf_counter()
        number = 0
        while number < CALLS or started:
            while number < CALLS and len(started) < PARALLEL:
                output = (os.POSIX_SPAWN_OPEN, 1, outputs[number], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                now = time.perf_counter()
                process = os.posix_spawn(
                    self._executable, [self._executable], environments[number], file_actions=[*devices, output]
                )
                started[process] = now
                number += 1
            process, status = os.waitpid(-1, 0)
            if process not in started:
                raise RuntimeError("the agent died")
            durations.append((time.perf_counter() - started.pop(process)) * 1e3)
            failed += status != 0
        elapsed = (time.perf_counter() - began) * 1e3
        if failed:
            raise RuntimeError(f"{failed} calls of {self._executable} failed: {Path(outputs[0]).read_text()}")
        if command == "ADD":
            given = {json.loads(Path(output).read_bytes())["ips"][0]["address"] for output in outputs}
            if len(given) != CALLS:
                raise RuntimeError(f"{self._executable} gave {CALLS - len(given)} addresses twice")
        return elapsed, durations

    def _environment(self, command: str, netns_path: str, container: str) -> dict[str, str]:
        return {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container,
            "CNI_NETNS": netns_path,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/usr/lib/cni",
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME={container};K8S_POD_UID=uid-{container}",
        }


@contextmanager
def rivals(folder: Path) -> Iterator[tuple[Plugin, Plugin]]:
    """Ours, with a running agent, and host-local."""
    installation = Installation(folder)
    ctl = [sys.executable, "-m", "cli", "apply", "--store", str(folder / "store.db"), "-f", "-"]
    subprocess.run(ctl, input=POOL, text=True, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    host_local = {
        "type": "host-local",
        "dataDir": str(folder / "host-local"),
        "ranges": [[{"subnet": SUBNET, "rangeStart": "10.6.0.10", "rangeEnd": "10.6.255.250", "gateway": "10.6.0.1"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    with installation.agent("--dataplane-enabled=false", module="agent"):
        ours = Plugin(
            str(installation.bin / "spiderpool"), folder, {"type": "spiderpool", "default_ipv4_ippool": ["bench-v4"]}
        )
        yield ours, Plugin(HOST_LOCAL, folder, host_local)


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def rows() -> Iterator[dict[str, Any]]:
    """`ipam_add_x32_vs_host_local`: milliseconds for 100 ADDs, 32 at a time."""
    totals: tuple[list[float], list[float]] = ([], [])
    singles: tuple[list[float], list[float]] = ([], [])
    with (
        tempfile.TemporaryDirectory(prefix="spt-bench-") as folder,
        netns() as netns_path,
        rivals(Path(folder)) as plugins,
    ):
        for turn in range(ROUNDS + 1):
            for which in (0, 1) if turn % 2 else (1, 0):
                elapsed, durations = plugins[which].run("ADD", netns_path, turn)
                plugins[which].run("DEL", netns_path, turn)
                if turn:  # the first round warms both up
                    totals[which].append(elapsed)
                    singles[which].extend(durations)
    value, reference = (statistics.median(total) for total in totals)
    yield {
        "name": "ipam_add_x32_vs_host_local",
        "value": value,
        "reference": reference,
        "ratio": value / reference,
        "unit": "ms",
        "samples": ROUNDS,
        "one_median": statistics.median(singles[0]),
        "one_p99": percentile(singles[0], 0.99),
        "reference_one_median": statistics.median(singles[1]),
        "reference_one_p99": percentile(singles[1], 0.99),
    }
