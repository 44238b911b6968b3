"""A node for the service tests: a network namespace with backends, a cgroup, and pins of its own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from socket import AF_INET, AF_INET6, inet_pton
from typing import Any, Self

from agent.dataplane.desired import PROTOCOLS, Backend, Frontend
from agent.dataplane.hooks import Pins, find_cgroup
from agent.dataplane.pack import Contents, Programmed
from agent.dataplane.plan import read_services
from agent.dataplane.settings import DataplaneSettings
from agent.dataplane.tables import ServiceTables

FOUR = ("10.0.1.1", "10.0.1.2", "10.0.1.3")
SIX = ("fd00:1::1", "fd00:1::2", "fd00:1::3")
PORT = 8080
VIP4, VIP6 = "10.96.0.10", "fd00:96::10"

_SERVER = """
import selectors, socket, sys
where = selectors.DefaultSelector()
for address in sys.argv[2:]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        s = socket.socket(family, kind)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((address, int(sys.argv[1])))
        if kind == socket.SOCK_STREAM:
            s.listen(128)
        where.register(s, selectors.EVENT_READ, address.encode())
print("up", flush=True)
connections = {}
while True:
    for key, _ in where.select():
        s = key.fileobj
        if s in connections:
            try:
                alive = s.recv(100) and s.send(key.data)
            except OSError:
                alive = 0
            if not alive:
                where.unregister(s); del connections[s]; s.close()
        elif s.type == socket.SOCK_DGRAM:
            _, peer = s.recvfrom(100)
            s.sendto(key.data, peer)
        else:
            c, _ = s.accept()
            connections[c] = True
            where.register(c, selectors.EVENT_READ, key.data)
"""
"""Answers everything with the address it came to."""

_PRELUDE = """
import ctypes, errno, json, os, socket, sys, time
if sys.argv[1]:
    open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
fd = os.open(sys.argv[2], os.O_RDONLY)
if ctypes.CDLL(None, use_errno=True).setns(fd, 0x40000000):
    raise OSError(ctypes.get_errno(), "setns")
socket.setdefaulttimeout(3)
A = json.loads(sys.argv[3])
"""


def frontend(address: str, port: int, protocol: str = "TCP") -> Frontend:
    """The frontend written as people write it."""
    return Frontend(packed(address), port, PROTOCOLS[protocol])


def backends(*addresses: str, port: int = PORT) -> tuple[Backend, ...]:
    """Backends at one port."""
    return tuple(sorted(Backend(packed(address), port) for address in addresses))


def packed(address: str) -> bytes:
    """An address as it is on the wire."""
    return inet_pton(AF_INET6 if ":" in address else AF_INET, address)


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for a condition; AssertionError after the deadline."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)


class Node:
    """What the tests have in place of a node."""

    def __init__(self, directory: str) -> None:
        self.name = f"spt-{secrets.token_hex(4)}"
        self.netns = f"/run/netns/{self.name}"
        self.cgroup = f"{find_cgroup('')}/{self.name}"
        self.bpffs = f"{directory}/{self.name}-bpf"
        self.pins = Pins(f"{self.bpffs}/spiderpool")
        self.settings = DataplaneSettings(
            cgroup=self.cgroup, bpffs=self.bpffs, headers_cache=f"{directory}/headers", drift_period=0.3
        )
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        try:
            os.mkdir(self.cgroup)
            subprocess.run(["ip", "netns", "add", self.name], check=True)
            commands = ["link set lo up", *(f"addr add {a}/32 dev lo" for a in FOUR)]
            commands += [f"addr add {a}/128 dev lo nodad" for a in SIX]
            text = "".join(f"{command}\n" for command in commands)
            subprocess.run(["ip", "-n", self.name, "-batch", "-"], input=text, text=True, check=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        subprocess.run(["ip", "netns", "delete", self.name], check=False)
        subprocess.run(
            [sys.executable, "-m", "agent.dataplane.load", "unload", "--pins", self.pins.directory], check=False
        )
        if os.path.ismount(self.bpffs):
            subprocess.run(["umount", self.bpffs], check=False)
        shutil.rmtree(self.bpffs, ignore_errors=True)
        with open(f"{self.cgroup}/cgroup.kill", "w") as kill:
            kill.write("1")
        until(lambda: "populated 0" in Path(self.cgroup, "cgroup.events").read_text())
        os.rmdir(self.cgroup)

    def serve(self, *addresses: str, port: int = PORT) -> subprocess.Popen[str]:
        """Start a server for both protocols, outside of the cgroup."""
        command = ["nsenter", f"--net={self.netns}", sys.executable, "-I", "-S", "-c", _SERVER, str(port), *addresses]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    def start(self, code: str, *, inside: bool = True, **values: object) -> subprocess.Popen[str]:
        """Start client code in the namespace; `values` are in the dictionary A."""
        arguments = [self.cgroup if inside else "", self.netns, json.dumps(values)]
        command = [sys.executable, "-I", "-S", "-c", _PRELUDE + code, *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._processes.append(process)
        return process

    def ask(self, code: str, *, inside: bool = True, **values: object) -> Any:
        """What the code printed, decoded from JSON."""
        output, _ = self.start(code, inside=inside, **values).communicate(timeout=20)
        return json.loads(output)

    def load(self, *arguments: str, action: str = "load", timeout: float = 60) -> dict[str, Any]:
        """Run the loader; returns its answer."""
        command = [sys.executable, "-m", "agent.dataplane.load", action, "--pins", self.pins.directory]
        command += ["--cgroup", self.cgroup, "--headers-cache", self.settings.headers_cache, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
        assert done.stdout.count("\n") == 1, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        assert result["ok"] == (done.returncode == 0)
        return result

    @contextmanager
    def tables(self) -> Iterator[ServiceTables]:
        """The service maps, reconciled with nothing."""
        tables = ServiceTables.open(self.pins)
        try:
            tables.reconcile({})
            yield tables
        finally:
            tables.close()

    def contents(self) -> Mapping[Frontend, tuple[Backend, ...]]:
        """The services that are really in the maps, with their backends; every stray entry is an error."""
        tables = ServiceTables.open(self.pins)
        try:
            have = tables.read()
        finally:
            tables.close()
        want = Contents()
        result: dict[Frontend, tuple[Backend, ...]] = {}
        for where, (number, slots) in read_services(have).items():
            whole = tuple(slot for slot in slots if slot is not None)
            assert len(whole) == len(slots), f"{where} misses a slot"
            want.add(where, Programmed(number, whole))
            result[where] = tuple(sorted(whole))
        assert have == want, "entries that no service names, or that are missing"
        return result
