"""What the tests of shim and agent share: executables installed in a folder of their own, and real agents."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("spiderpool", "coordinator", "ifacer", "vlan")
CONFIG: dict[str, Any] = {"cniVersion": "1.0.0", "name": "net", "type": "spiderpool"}


@dataclass(frozen=True)
class Outcome:
    """What a caller of a CNI executable sees."""

    status: int
    stdout: bytes

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object."""
        document = json.loads(self.stdout)
        assert isinstance(document, dict)
        return document

    def error(self, code: int, version: str = "1.0.0") -> dict[str, Any]:
        """Assert that it is a well-formed error of that code and version; returns it."""
        assert self.status == 1, self
        document = self.json
        assert document.keys() == {"cniVersion", "code", "msg", "details"}
        assert document["code"] == code, document
        assert document["cniVersion"] == version, document
        assert document["msg"]
        return document

    def empty(self) -> None:
        """Assert success with nothing said."""
        assert (self.status, self.stdout) == (0, b"")


class Agent:
    """A running agent process."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket, log: Path) -> None:
        self.process = process
        self._channel = channel
        self._log = log

    def wait_for(self, state: str, deadline: float = 15.0) -> None:
        """Until the agent notified `state`."""
        while True:
            readable, _, _ = select.select([self._channel], [], [], deadline)
            assert readable, f"no {state} within {deadline} s; {self.log()}"
            if self._channel.recv(1024).decode() == state:
                return

    def stop(self, deadline: float = 15.0) -> int:
        """SIGTERM and wait; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(deadline)

    def kill(self) -> None:
        """SIGKILL and wait."""
        self.process.kill()
        self.process.wait(5)

    def log(self) -> str:
        """Everything on standard error."""
        return self._log.read_text()

    def lines(self) -> list[dict[str, Any]]:
        """The log's lines; each must be a JSON object."""
        return [json.loads(line) for line in self.log().splitlines()]


class Installation:
    """Executables, socket path, queue and store below one folder."""

    def __init__(self, root: Path, source: Path = ROOT / "build/cni") -> None:
        self.root = root
        self.socket = root / "run/cni.sock"
        self.queue = root / "state/queue"
        self.record = root / "record"
        self.bin = root / "bin"
        self.bin.mkdir()
        for name in NAMES:
            (self.bin / name).write_bytes((source / "spiderpool").read_bytes())
            (self.bin / name).chmod(0o755)
        self.settle(f"{self.socket}\n{self.queue}\n")

    def settle(self, text: str) -> None:
        """Write the sidecar file."""
        (self.bin / ".spiderpool.paths").write_text(text)

    def environment(self, command: str | None, netns: str = "", **more: str) -> dict[str, str]:
        """CNI_* for one call."""
        env = {"CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_PATH": str(self.bin), **more}
        if command is not None:
            env["CNI_COMMAND"] = command
        if netns:
            env["CNI_NETNS"] = netns
        return {key: value for key, value in env.items() if value != "(unset)"}

    def start(
        self, command: str | None, stdin: bytes | Mapping[str, Any] = CONFIG, *, name: str = "spiderpool", **env: str
    ) -> subprocess.Popen[bytes]:
        """Execute `name`; the caller collects it."""
        data = stdin if isinstance(stdin, bytes) else json.dumps(stdin).encode()
        process = subprocess.Popen(
            [self.bin / name], env=self.environment(command, **env), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None
        try:
            process.stdin.write(data)
            process.stdin.close()
        except BrokenPipeError:
            pass
        process.stdin = None
        return process

    def call(
        self,
        command: str | None,
        stdin: bytes | Mapping[str, Any] = CONFIG,
        *,
        name: str = "spiderpool",
        timeout: float = 20.0,
        **env: str,
    ) -> Outcome:
        """Execute `name` and wait."""
        return collect(self.start(command, stdin, name=name, **env), timeout)

    def queued(self) -> list[Path]:
        """Finished queue files, in order; asserts that nothing unfinished is there."""
        if not self.queue.exists():
            return []
        names = sorted(path for path in self.queue.iterdir() if path.name != "failed")
        assert all(path.suffix == ".call" for path in names), names
        return names

    def recorded(self) -> list[str]:
        """What the stub plugin executed, in order."""
        return self.record.read_text().splitlines() if self.record.exists() else []

    def flags(self, *more: str) -> list[str]:
        """Settings that keep an agent inside this folder."""
        return [
            f"--server-socket={self.socket}",
            f"--queue-directory={self.queue}",
            f"--store-path={self.root}/store.db",
            "--health-port=0",
            "--health-metrics-port=0",
            *more,
        ]

    @contextmanager
    def agent(
        self, *flags: str, module: str = "tests.integration.stub_agent", ready: bool = True, env: Mapping[str, str] = {}
    ) -> Iterator[Agent]:
        """An agent process; killed at the end if it still runs."""
        log = self.root / f"agent-{secrets.token_hex(4)}.log"
        notify = str(self.root / f"notify-{secrets.token_hex(4)}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, log.open("wb") as stderr:
            channel.bind(notify)
            process = subprocess.Popen(
                [sys.executable, "-m", module, *self.flags(*flags)],
                cwd=ROOT,
                stderr=stderr,
                env={**os.environ, "NOTIFY_SOCKET": notify, "STUB_RECORD": str(self.record), **env},
            )
            try:
                agent = Agent(process, channel, log)
                if ready:
                    agent.wait_for("READY=1")
                yield agent
            finally:
                process.kill()
                process.wait(5)


def collect(process: subprocess.Popen[bytes], timeout: float = 20.0) -> Outcome:
    """Wait for a started executable."""
    try:
        stdout, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)
        raise
    return Outcome(process.returncode, stdout)


@contextmanager
def netns() -> Iterator[str]:
    """Path of a fresh network namespace. It has no name: it cannot outlive this process, nor be deleted by others."""
    opened: list[int] = []

    def leave() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x40000000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNET
        opened.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    try:
        yield f"/proc/{os.getpid()}/fd/{opened[0]}"
    finally:
        os.close(opened[0])


def build(*flags: str, out: Path) -> Path:
    """The shim compiled with other constants, in folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    source = ROOT / "plugins/shim/spiderpool.c"
    subprocess.run(["musl-gcc", "-static", "-O1", *flags, "-o", out / "spiderpool", source], check=True)
    return out


def variables(frame: bytes) -> tuple[dict[str, str], bytes]:
    """Environment and standard input of a request frame."""
    assert frame[:4] == b"SPD1"
    size = int.from_bytes(frame[4:8], "big")
    assert int.from_bytes(frame[8:12], "big") == len(frame) - 12 - size
    pairs: Sequence[str] = [entry.decode() for entry in frame[12 : 12 + size].split(b"\0")[:-1]]
    return dict(pair.split("=", 1) for pair in pairs), frame[12 + size :]
