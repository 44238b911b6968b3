"""The lab through its public surface: it comes up, proves every row, goes without a trace, and says what is wrong."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

LAB = os.path.join(os.path.dirname(sys.executable), "spiderpool-lab")
ROWS = {
    "addresses",
    "agents",
    "same-node",
    "cross-node",
    "outside",
    "host",
    "service-tcp",
    "service-udp",
    "service-host",
    "service-spread",
    "cni-check",
    "repair",
    "stolen",
    "dead-gateway",
    "exhaustion",
    "retry",
    "killed",
    "queued",
    "replayed",
    "gone",
}


def lab(name: str, *arguments: str, timeout: float = 110) -> subprocess.CompletedProcess[str]:
    """Run `spiderpool-lab --name NAME …`."""
    return subprocess.run(
        [LAB, "--name", name, *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


def succeed(name: str, *arguments: str) -> str:
    """Standard output of a lab command that must succeed."""
    done = lab(name, *arguments)
    assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def cgroup2() -> str:
    with open("/proc/mounts") as mounts:
        return next(fields[1] for fields in map(str.split, mounts) if fields[2] == "cgroup2")


def traces(name: str) -> list[str]:
    """Everything on this machine that carries the lab's name."""
    found = []
    if os.path.isdir("/run/netns"):
        found += [f"netns {entry}" for entry in os.listdir("/run/netns") if entry.startswith(f"{name}-")]
    found += [f"cgroup {path}" for path in (f"{cgroup2()}/{name}",) if os.path.exists(path)]
    found += [f"file {path}" for path in (f"/run/spiderpool-lab/{name}",) if os.path.exists(path)]
    with open("/proc/mounts") as mounts:
        found += [f"mount {line.split()[1]}" for line in mounts if f"/{name}/" in line]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                command = file.read().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"/{name}/" in command and int(pid) != os.getpid():
            found.append(f"process {pid} {command}")
    return found


@pytest.fixture
def name() -> Iterator[str]:
    """Name for a lab that is taken down however the test ends."""
    chosen = f"splt{secrets.token_hex(3)}"
    yield chosen
    lab(chosen, "down")


def test_proves_everything_and_leaves_nothing(name: str) -> None:
    assert f"spiderpool-lab --name {name} down" in succeed(name, "up")  # it says how to go on
    try:
        checked = lab(name, "check", "--json")
        rows = {row["name"]: row for row in json.loads(checked.stdout)["checks"]}
        assert {row: rows[row]["evidence"] for row in rows if not rows[row]["ok"]} == {}
        assert set(rows) == ROWS
        assert all(row["evidence"] for row in rows.values())
        assert (checked.returncode, json.loads(checked.stdout)["ok"]) == (0, True)

        again = lab(name, "up")
        assert (again.returncode, "up already" in again.stderr) == (2, True), again.stderr

        inside = succeed(name, "exec", "client", "--", "cat", "/proc/self/cgroup")
        assert f"0::/{name}/node1/pods/client" in inside.splitlines()
    finally:
        succeed(name, "down")
    assert traces(name) == []


def test_a_broken_lab_fails_its_check(name: str) -> None:
    """The table must be able to say no: cut the wire of one node."""
    succeed(name, "up")
    subprocess.run(["ip", "-n", f"{name}-segment", "link", "set", "node2", "down"], check=True)
    checked = lab(name, "check", "--json")
    rows = {row["name"]: row for row in json.loads(checked.stdout)["checks"]}
    assert checked.returncode == 1
    assert rows["same-node"]["ok"]
    assert not rows["cross-node"]["ok"]
    assert not rows["service-tcp"]["ok"]


def test_down_after_up_was_killed_leaves_nothing(name: str) -> None:
    with subprocess.Popen([LAB, "--name", name, "up"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as up:
        deadline = time.monotonic() + 60
        while not any(trace.startswith("process") and "agent" in trace for trace in traces(name)):
            assert time.monotonic() < deadline, "no agent was ever started"
            time.sleep(0.02)
        up.send_signal(signal.SIGKILL)
    refused = lab(name, "up")
    assert (refused.returncode, "half-way up" in refused.stderr) == (2, True), refused.stderr
    succeed(name, "down")
    assert traces(name) == []


def test_interrupted_up_cleans_up_itself(name: str) -> None:
    with subprocess.Popen([LAB, "--name", name, "up"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as up:
        deadline = time.monotonic() + 60
        while not any(trace.startswith("process") for trace in traces(name)):
            assert time.monotonic() < deadline, "nothing was ever started"
            time.sleep(0.02)
        up.send_signal(signal.SIGTERM)
        assert up.wait(30) == 130
    assert traces(name) == []


def test_agent_that_does_not_start_is_shown(name: str, tmp_path: os.PathLike[str]) -> None:
    environment = os.environ | {"SPIDERPOOL_LOG_LEVEL": "nonsense"}
    up = subprocess.run([LAB, "--name", name, "up"], env=environment, capture_output=True, text=True, check=False)
    assert up.returncode == 2
    assert "agent ended" in up.stderr
    assert "nonsense" in up.stderr  # the end of its log
    assert traces(name) == []


def test_two_labs_beside_each_other(name: str) -> None:
    other = f"{name}x"
    try:
        succeed(name, "up")
        succeed(other, "up")
    finally:
        succeed(other, "down")
    assert "172.20.0." in succeed(name, "exec", "client", "--", "ip", "-br", "address", "show", "eth0")
    assert traces(other) == []


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["down"], 0, "not up"),
        (["check"], 2, "is not up"),
        (["exec", "client", "--", "true"], 2, "is not up"),
    ],
)
def test_without_a_lab(name: str, arguments: list[str], status: int, text: str) -> None:
    done = lab(name, *arguments)
    assert done.returncode == status
    assert text in done.stdout + done.stderr


@pytest.mark.parametrize("bad", ["", "lab", "SPL", "spl-1", "spl/../x", "spl" + "x" * 20])
def test_names_that_could_be_somebody_elses_are_refused(bad: str) -> None:
    done = lab(bad, "down")
    assert done.returncode == 2
    assert "cannot name a lab" in done.stderr


def test_not_root(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lab", "--name", name, "up"],
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "must run as root" in done.stderr
