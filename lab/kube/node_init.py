"""The first process of a lab's node: `python node_init.py NETNS PORT [FROM TO]…`.

It has the node's mount namespace, in which each folder TO is the node's own folder FROM, so that container runtime and
kubelet find everything where it is on any node, and two nodes of one machine share nothing. And it is the node's door
to the API server: who connects to 127.0.0.1:PORT in the node's network namespace gets to 127.0.0.1:PORT of the
machine, so one kubeconfig is right everywhere and the server need not listen on more than loopback.

It says READY on standard output when both are there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, MS_SHARED = 0x1000, 0x4000, 1 << 18, 1 << 20
MNT_DETACH = 2
FOREIGN = ("/run/netns", "/run/spiderpool-lab/")
"""Where others mount what must not live on in our copy: network namespaces and eBPF pins."""
BPFFS = "/sys/fs/bpf"
HOST = "127.0.0.1"
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, flags: int, kind: str | None = None) -> None:
    type_ = None if kind is None else kind.encode()
    result = _libc.mount(os.fsencode(source), os.fsencode(target), type_, ctypes.c_ulong(flags), None)
    _checked(result, f"mount {target}")


def _listen(netns: str, port: int) -> socket.socket:
    """A listening socket in the network namespace; only the calling thread goes there."""
    with open(netns, "rb") as namespace:
        _checked(_libc.setns(namespace.fileno(), CLONE_NEWNET), netns)
    return socket.create_server((HOST, port), backlog=256)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _serve(door: socket.socket, port: int) -> None:
    async def through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answers, requests = await asyncio.open_connection(HOST, port)
        except OSError:  # the server is away: so is its door
            writer.transport.abort()
            return
        await asyncio.gather(_copy(reader, requests), _copy(answers, writer))

    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    server = await asyncio.start_server(through, sock=door)
    print("READY", flush=True)
    await stopped.wait()
    server.close()


def main(netns: str, port: int, folders: list[str]) -> None:
    """Take the place described above, until SIGTERM. Raises OSError."""
    with ThreadPoolExecutor(1) as fresh:  # before the folder of namespaces is another one
        door = fresh.submit(_listen, netns, port).result()
    _checked(_libc.unshare(CLONE_NEWNS), "unshare")
    _mount("none", "/", MS_REC | MS_PRIVATE)
    with open("/proc/self/mounts") as file:
        mounted = [line.split()[1] for line in file]
    for target in reversed(mounted):
        if target.startswith(FOREIGN):
            _checked(_libc.umount2(os.fsencode(target), MNT_DETACH), f"umount {target}")
    for source, target in zip(folders[::2], folders[1::2], strict=True):
        _mount(source, target, MS_BIND)
        if os.path.isdir(source):
            _mount("none", target, MS_SHARED)  # volumes and network namespaces reach containers that ask for it
    _mount("bpf", BPFFS, 0, "bpf")  # what is pinned there ends with the node
    asyncio.run(_serve(door, port))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
