"""Run a test command and see to it that it leaves nothing on the machine, however it ends.

    python tests/run.py COMMAND...

Before and after, the machine's labs, network namespaces, links, cgroups and eBPF pins are listed. What is new and has a
name that only tests and labs give is printed, removed, and makes the run fail. Other new things may be a container's
that started meanwhile: they are only printed, but in continuous integration (CI=true), where nobody else is at work,
they make the run fail as well. Processes that outlive their parents are adopted (child subreaper), so exactly those
that the command started are found and ended, and no others are touched: a new lab that still lives after that is
somebody else's, and so is everything that has its name. One run at a time works on a machine; the next one waits.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
LOCK = "/run/spiderpool-tests.lock"
OURS = re.compile(r"spt|spl[a-z0-9]*(-|/|$)")
"""How the names begin that tests and labs give."""
GRACE = 5.0
"""Seconds that adopted processes have to end by themselves after the command ended."""


def cgroup2_root() -> Path:
    """Where cgroup v2 is mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    return Path("/sys/fs/cgroup")


LABS = Path("/run/spiderpool-lab")
"""One folder for each lab, named like it."""


def labs() -> set[str]:
    """Labs and clusters that were not taken down."""
    return {entry.name for entry in LABS.iterdir()} if LABS.exists() else set()


def lives(lab: str) -> bool:
    """Whether a process is in one of the lab's cgroups."""
    members = (cgroup2_root() / lab).rglob("cgroup.procs")
    return any(path.read_text().strip() for path in members)


def remove_lab(name: str) -> None:
    """Take a lab or a cluster down, with its mounts and files."""
    module = "lab.kube" if (LABS / name / "cluster.json").exists() else "lab"
    command = [sys.executable, "-m", module, "--name", name, "down"]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, timeout=60)


def netns() -> set[str]:
    """Named network namespaces."""
    root = Path("/run/netns")
    return {entry.name for entry in root.iterdir()} if root.exists() else set()


def links() -> set[str]:
    """Links of this network namespace."""
    return set(os.listdir("/sys/class/net"))


def cgroups() -> set[str]:
    """All cgroup v2 folders, deepest names included."""
    root = cgroup2_root()
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir()}


def pins() -> set[str]:
    """Everything pinned in the BPF file system."""
    root = Path("/sys/fs/bpf")
    return {str(path.relative_to(root)) for path in root.rglob("*")} if root.exists() else set()


def remove_netns(name: str) -> None:
    """Delete a network namespace."""
    subprocess.run(["ip", "netns", "delete", name], check=False)


def remove_link(name: str) -> None:
    """Delete a link."""
    subprocess.run(["ip", "link", "delete", name], check=False)


def remove_cgroup(name: str) -> None:
    """Delete an empty cgroup."""
    (cgroup2_root() / name).rmdir()


def remove_pin(name: str) -> None:
    """Unpin an object, or remove a folder with what is in it."""
    path = Path("/sys/fs/bpf") / name
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


KINDS: tuple[tuple[str, Callable[[], set[str]], Callable[[str], None]], ...] = (
    ("lab", labs, remove_lab),
    ("netns", netns, remove_netns),
    ("link", links, remove_link),
    ("pin", pins, remove_pin),
    ("cgroup", cgroups, remove_cgroup),
)


def children() -> list[int]:
    """Processes whose parent is this one."""
    me = os.getpid()
    path = Path(f"/proc/{me}/task/{me}/children")
    return [int(pid) for pid in path.read_text().split()]


def reap(pid: int) -> None:
    """Collect exit states of children without waiting."""
    try:
        while os.waitpid(pid, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def command_line(pid: int) -> str:
    """What the process runs, for the report."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "?"


def end_orphans() -> list[str]:
    """Wait shortly for adopted processes, then end them and what they leave behind; tells which there were."""
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        reap(-1)
        if not children():
            return []
        time.sleep(0.05)
    left: list[str] = []
    while orphans := children():
        for pid in orphans:
            left.append(f"process {pid} {command_line(pid)[:120]}")
            os.kill(pid, signal.SIGKILL)
        for pid in orphans:
            os.waitpid(pid, 0)
    return left


def main(argv: list[str]) -> int:
    """Run `argv`; its exit status, or 1 when it left something."""
    if not argv:
        print(__doc__, file=sys.stderr)
        return 2
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another test run is at work on this machine, waiting for it", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = {kind: look() for kind, look, _ in KINDS}
    command = subprocess.Popen(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: command.send_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the command as well
    status = command.wait()
    status = status if status >= 0 else 128 - status
    left, foreign = end_orphans(), []
    living = tuple(name for name in labs() - before["lab"] if lives(name))
    for kind, look, remove in KINDS:
        for name in sorted(look() - before[kind], key=len, reverse=True):
            if name.startswith(living):
                continue
            if not OURS.match(name):
                foreign.append(f"{kind} {name}")
                continue
            left.append(f"{kind} {name}")
            try:
                remove(name)
            except OSError as error:
                left[-1] += f" (cannot be removed: {error})"
    if foreign:
        print("\nNew on this machine since the tests began:\n  " + "\n  ".join(foreign), file=sys.stderr)
        if os.environ.get("CI") == "true":
            status = status or 1
    if left:
        print("\nLeft behind by the tests, and removed now:\n  " + "\n  ".join(left), file=sys.stderr)
        return status or 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
