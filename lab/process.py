"""Processes and namespaces: work inside a network namespace, processes that outlive us, and their end.

Only processes of the lab are ever signalled: by pid and start time as recorded, through a pidfd so that the pid
cannot be reused in between, or because they are in the lab's cgroup.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from lab.layout import LabError

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def enter_netns(path: str) -> None:
    """Move the calling thread into the network namespace at `path`. Raises OSError."""
    with open(path, "rb") as namespace:
        if _libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}", path)


def in_netns(path: str, work: Callable[[], T]) -> T:
    """The result of `work`, run in a thread of its own that has entered the network namespace at `path`.

    What `work` starts or opens stays in that namespace. Raises OSError, and what `work` raises.
    """

    def enter() -> T:
        enter_netns(path)
        return work()

    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(enter).result()


def run(
    argv: Sequence[str], *, before: Sequence[str] = (), stdin: str = "", netns: str = "", timeout: float = 20
) -> str:
    """Standard output of a command. Raises LabError with what it said if it fails or takes too long.

    `before` is a program that becomes the command, and not worth a mention.
    """

    def work() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*before, *argv], input=stdin, capture_output=True, text=True, timeout=timeout, check=False
        )

    try:
        result = in_netns(netns, work) if netns else work()
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(argv)} took longer than {timeout:g} s") from None
    except FileNotFoundError:
        raise LabError(f"{argv[0]} is not installed; lab/provision.sh run installs what is needed") from None
    if result.returncode:
        raise LabError(f"{' '.join(argv)} failed: {(result.stderr or result.stdout).strip()}")
    return result.stdout


def cgroup2_root() -> str:
    """Where cgroup v2 is mounted. Raises LabError."""
    with open("/proc/mounts") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[2] == "cgroup2":
                return fields[1]
    raise LabError(
        "no cgroup v2 file system is mounted, and service access hangs on it: mount -t cgroup2 none /sys/fs/cgroup"
    )


class Started(NamedTuple):
    """A process of the lab; pid and start time together are never reused."""

    pid: int
    start: int
    """Clock ticks after boot (proc(5), /proc/pid/stat, field 22)."""


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks after boot; None if it is gone or only waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@contextlib.contextmanager
def pidfd(process: Started) -> Iterator[int | None]:
    """A descriptor of exactly this process, or None if it is gone."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield fd if start_time(process.pid) == process.start else None
    finally:
        os.close(fd)


def end(process: Started, number: signal.Signals, timeout: float) -> bool:
    """Signal the process if it lives, and wait; whether it has ended."""
    with pidfd(process) as fd:
        if fd is None:
            return True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, number)
        ended = bool(select.select([fd], [], [], timeout)[0])
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)
    return ended


def alive(process: Started) -> bool:
    """Whether exactly this process still runs."""
    return start_time(process.pid) == process.start


def kill_cgroup(path: str, timeout: float = 10) -> None:
    """Kill everything in a cgroup and below, and remove the folders. Raises LabError when they do not go."""
    if not os.path.isdir(path):
        return
    deadline = time.monotonic() + timeout
    with open(f"{path}/cgroup.kill", "w") as kill:
        kill.write("1")
    with open(f"{path}/cgroup.events") as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        while "populated 1" in events.read():
            if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
                raise LabError(f"processes in {path} do not end")
            events.seek(0)
    for folder, _, _ in os.walk(path, topdown=False):
        os.rmdir(folder)


def spawn(
    argv: Sequence[str], *, netns: str = "", log: str, stdout: int | None = None, **environment: str
) -> subprocess.Popen[bytes]:
    """A process in the network namespace at `netns` (ours if it is empty), in a session of its own: it outlives us.

    It writes to `log`, and its standard output to `stdout` if that is given. `environment` is added to ours.
    """
    with open(log, "ab") as output:

        def work() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                argv,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output if stdout is None else stdout,
                stderr=output,
                start_new_session=True,
                cwd="/",
            )

        return in_netns(netns, work) if netns else work()


def record(process: subprocess.Popen[bytes]) -> Started:
    """The process as a record. Raises LabError if it is gone already."""
    start = start_time(process.pid)
    if start is None:
        raise LabError(f"{process.args!r} ended at once")
    return Started(process.pid, start)


def last_lines(path: str, count: int = 12) -> str:
    """The end of a log file, indented."""
    try:
        with open(path, errors="replace") as log:
            lines = log.read().splitlines()[-count:]
    except FileNotFoundError:
        return "    (no log)"
    return "\n".join(f"    {line[:400]}" for line in lines) or "    (the log is empty)"


class Control:
    """A connection to an actor's control socket. Not for several threads at once."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(15)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rwb")

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def __call__(self, op: str, **arguments: Any) -> dict[str, Any]:
        """What the actor answers to one request; `error` is in it if that failed. Raises OSError."""
        self._lines.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
        self._lines.flush()
        line = self._lines.readline()
        if not line:
            raise ConnectionResetError("the actor has ended")
        reply: dict[str, Any] = json.loads(line)
        return reply


def which(name: str, folders: Sequence[str]) -> str:
    """Path of an executable in the first of `folders` that has it. Raises LabError."""
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise LabError(f"{name} is in none of {', '.join(folders)}")
    return found
