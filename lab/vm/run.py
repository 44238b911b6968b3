"""Runs one command in a virtual machine and ends the machine, whatever happens.

QEMU is killed by the kernel when this process dies (PDEATHSIG), and the guest switches itself off after its time, so
nothing outlives the run. What a killed run leaves is a folder of a few files in build/vm/runs; the next run removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from lab.layout import SOURCES, LabError
from lab.process import last_lines
from lab.vm.build import CACHE, PROVIDE, Image
from lab.vm.machine import NICS, PROGRAM, Share, command_line

RUNS = f"{CACHE}/runs"
PASSED_ON = ("PATH", "PYTHONPATH", "LANG")
"""Variables of ours that the command gets."""
TIMED_OUT, DIED = 124, 125
"""Exit status when the machine was ended at its deadline, and when it ended without telling how the command did."""
CLOSING = 15.0
"""Seconds that the guest may take to switch itself off once the command has ended."""


def run(
    image: Image,
    command: Sequence[str],
    *,
    memory: int,
    cpus: int,
    timeout: float,
    write: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> int:
    """The command's exit status; its output goes to standard output. `memory` in MiB, `timeout` in seconds.

    The command runs as root in a copy of this machine's file system, in the same working directory; what it writes
    there is lost, except in the folders `write`. Raises LabError if QEMU is missing or does not start.
    """
    if shutil.which(PROGRAM) is None:
        raise LabError(f"{PROGRAM} is not installed: {PROVIDE}")
    deadline = time.monotonic() + timeout
    with _folder() as folder:
        shares = [Share("host", "/", writable=False), Share("run", folder, writable=True)]
        shares += [Share(f"write{number}", os.path.abspath(path), writable=True) for number, path in enumerate(write)]
        for share in shares:
            if not os.path.isdir(share.path) or any(c in share.path for c in " \t\n"):
                raise LabError(f"{share.path!r} is no folder that the guest can be given")
        _settings(folder, image, shares, timeout)
        _command(folder, command, environment or {})
        with _Machine(image, folder, memory, cpus, shares) as machine:
            return machine.follow(deadline)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A folder for this run; those of runs that were killed are removed."""
    os.makedirs(RUNS, exist_ok=True)
    with open(f"{CACHE}/.runs-lock", "w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        for name in os.listdir(RUNS):
            with contextlib.suppress(BlockingIOError, NotADirectoryError), _locked(f"{RUNS}/{name}"):
                shutil.rmtree(f"{RUNS}/{name}")
        folder = tempfile.mkdtemp(dir=RUNS)
        lock = _locked(folder)
        lock.__enter__()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        lock.__exit__(None, None, None)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _settings(folder: str, image: Image, shares: Sequence[Share], timeout: float) -> None:
    """Write what init.sh reads."""
    settings = {
        "REPOSITORY": SOURCES,
        "MODULES": image.modules,
        "NICS": " ".join(f"{nic.mac}={nic.name}" for nic in NICS),
        "SECONDS_LEFT": str(int(timeout) + 5),
        "WRITE": " ".join(f"{share.tag}={share.path}" for share in shares if share.tag.startswith("write")),
    }
    with open(f"{folder}/settings", "w") as file:
        file.writelines(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())


def _command(folder: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | dict(environment)
    with open(f"{folder}/command", "w") as file:
        file.writelines(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
        file.write(f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)}\n")


class _Machine:
    """QEMU and the three sockets to it, from `__enter__` to `__exit__`."""

    def __init__(self, image: Image, folder: str, memory: int, cpus: int, shares: Sequence[Share]) -> None:
        self._console, self._complaints = f"{folder}/console.log", f"{folder}/qemu.log"
        pairs = [socket.socketpair() for _ in range(3)]
        self._output, self._control, self._monitor = (ours for ours, _ in pairs)
        theirs = [end for _, end in pairs]
        output, control, monitor = (end.fileno() for end in theirs)
        argv = command_line(
            image,
            memory=memory,
            cpus=cpus,
            shares=shares,
            console=self._console,
            output=output,
            control=control,
            monitor=monitor,
        )
        # setpriv has the kernel kill QEMU when we die, and becomes QEMU.
        with open(self._complaints, "wb") as complaints:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                stdout=complaints,
                stderr=complaints,
                pass_fds=(output, control, monitor),
                start_new_session=True,
            )
        for end in theirs:
            end.close()
        self._status: int | None = None
        self._lines: dict[socket.socket, bytes] = {self._control: b"", self._monitor: b""}
        self._links: list[str] = []
        self._monitor.sendall(b'{"execute": "qmp_capabilities"}\n')

    def __enter__(self) -> _Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for end in (self._output, self._control, self._monitor):
            end.close()

    def follow(self, deadline: float) -> int:
        """Pass on what the guest writes until the machine ends; the command's exit status."""
        open_ends: dict[socket.socket, Callable[[bytes], None]] = {
            self._output: _print,
            self._control: lambda data: self._each_line(self._control, data, self._asked),
            self._monitor: lambda data: self._each_line(self._monitor, data, self._answered),
        }
        while open_ends:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for end in select.select(list(open_ends), [], [], left)[0]:
                data = _receive(end)
                if data:
                    open_ends[end](data)
                else:
                    del open_ends[end]
            if self._status is not None:
                deadline = min(deadline, time.monotonic() + CLOSING)
        if self._status is not None:
            return self._status
        late = time.monotonic() >= deadline
        print(
            f"lab.vm: {'out of time' if late else 'the machine ended before the command'}; QEMU said:\n"
            f"{last_lines(self._complaints)}\nthe end of the guest's console:\n{last_lines(self._console, 60)}",
            file=sys.stderr,
        )
        return TIMED_OUT if late else DIED

    def _each_line(self, end: socket.socket, data: bytes, act: Callable[[bytes], None]) -> None:
        *lines, self._lines[end] = (self._lines[end] + data).split(b"\n")
        for line in lines:
            act(line)

    def _asked(self, line: bytes) -> None:
        """The guest tells the command's exit status, or wants a NIC's cable out or in."""
        match line.decode(errors="replace").split():
            case ["exit", status] if status.isdecimal():
                self._status = int(status)
            case ["cable", nic, ("in" | "out") as state] if any(nic == each.name for each in NICS):
                request = {"execute": "set_link", "arguments": {"name": nic, "up": state == "in"}, "id": nic}
                self._monitor.sendall(json.dumps(request).encode() + b"\n")
            case _:
                self._control.sendall(b"error: exit STATUS, or cable NIC in|out\n")

    def _answered(self, line: bytes) -> None:
        """QEMU did, or did not, what the guest wanted."""
        reply = json.loads(line)
        if "id" in reply:
            self._control.sendall(b"error: QEMU refused\n" if "error" in reply else b"done\n")


def _receive(end: socket.socket) -> bytes:
    try:
        return end.recv(65536)
    except ConnectionResetError:
        return b""


def _print(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
