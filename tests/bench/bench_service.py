"""pod → VIP → backend in another network namespace, against the backend's own address, with 10,000 services loaded.

One client process asks for a block of connects (or turns) at each of three destinations in every round, in an order
that rotates: the VIP, the backend, and the backend once more. A round gives a pair VIP/direct and, as its control,
a pair direct/direct; what disturbs the machine for longer than a block disturbs all alike. The services come into the
maps the shipped way: a store, and the agent's own task.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from agent.dataplane import Dataplane, DataplaneSettings
from agent.dataplane.hooks import find_cgroup
from api.meta import ObjectMeta
from api.service import (
    SERVICE_NAME_LABEL,
    EndpointSlice,
    Service,
    ServicePort,
    ServiceSpec,
    SliceEndpoint,
    SlicePort,
)
from store.sqlite import SqliteStore

SERVICES = 10_000
ROUNDS = 120
CONNECTS = 200
TURNS = 500
BOOTSTRAP = 2000
CLIENT, BACKEND, VIP = "10.201.0.1", "10.201.0.2", "10.96.255.1"
PORTS = ("8001", "8002", "8003")
JOIN = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"


class Block(NamedTuple):
    """One block's latencies in microseconds."""

    p50: float
    p99: float
    mean: float


class Asker:
    """The client program, in a namespace and perhaps in a cgroup."""

    def __init__(self, program: str, netns: str, cgroup: str | None, stack: ExitStack) -> None:
        command = [program, "ask"]
        if cgroup is not None:
            command = [sys.executable, "-I", "-S", "-c", JOIN, f"{cgroup}/cgroup.procs", *command]
        self._process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{netns}", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        stack.callback(end, self._process)

    def ask(self, what: str, address: str, port: str, count: int) -> Block:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what} {address} {port} {count}\n")
        self._process.stdin.flush()
        return Block(*(float(text) / 1000 for text in self._process.stdout.readline().split()))


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def place(directory: str) -> Iterator[tuple[str, str, str, ExitStack]]:
    """Client's and server's namespaces, joined by veth pairs and a bridge in a third, and a cgroup."""
    mark = secrets.token_hex(3)
    client, server, switch = (f"spt-{mark}-{role}" for role in ("c", "s", "b"))
    cgroup = f"{find_cgroup('')}/spt-{mark}"
    pins = f"{directory}/bpf/spiderpool"
    with ExitStack() as stack:
        os.mkdir(cgroup)
        stack.callback(os.rmdir, cgroup)
        unload = [sys.executable, "-m", "agent.dataplane.load", "unload", "--pins", pins]
        stack.callback(subprocess.run, unload, check=True, stdout=subprocess.DEVNULL)
        for name in (client, server, switch):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for name, address in ((client, CLIENT), (server, BACKEND)):
            port = f"p-{name[-1]}"
            ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", switch, "link", "set", port, "master", "br0", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield client, server, cgroup, stack


async def fill(store: SqliteStore) -> None:
    """10,000 services with three endpoints each, the measured one among them."""

    async def one(index: int) -> None:
        name = f"service-{index}"
        measured = index == SERVICES // 2
        vip = VIP if measured else f"10.96.{index // 250}.{index % 250 + 1}"
        spec = ServiceSpec(cluster_ip=vip, cluster_ips=[vip], ports=[ServicePort(name="p", port=80)])
        await store.create(Service(metadata=ObjectMeta(name=name, namespace="default"), spec=spec))
        labels = {SERVICE_NAME_LABEL: name}
        for number in range(3 if measured else 1):
            addresses = [BACKEND] if measured else [f"10.{100 + n}.{index // 250}.{index % 250 + 1}" for n in range(3)]
            await store.create(
                EndpointSlice(
                    metadata=ObjectMeta(name=f"{name}-{number}", namespace="default", labels=labels),
                    address_type="IPv4",
                    endpoints=[SliceEndpoint(addresses=[address]) for address in addresses],
                    ports=[SlicePort(name="p", port=int(PORTS[number]))],
                )
            )

    for start in range(0, SERVICES, 1000):
        await asyncio.gather(*(one(index) for index in range(start, start + 1000)))


async def load(directory: str, cgroup: str) -> None:
    """Let the agent's task bring the services into the maps. What it attached stays when it ends."""
    store = await SqliteStore.open(f"{directory}/store.db")
    try:
        await fill(store)
        settings = DataplaneSettings(cgroup=cgroup, bpffs=f"{directory}/bpf", headers_cache=f"{directory}/headers")
        dataplane = Dataplane(store, settings)
        task = asyncio.create_task(dataplane.run())
        async with asyncio.timeout(120):
            await dataplane.ready()
        task.cancel()
        await asyncio.wait([task])
    finally:
        await store.close()


def upper_bound(ratios: list[float], chance: random.Random) -> float:
    """Upper end of the 95 % confidence interval of the median, by bootstrap."""
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(BOOTSTRAP))
    return medians[int(BOOTSTRAP * 0.975)]


def compare(name: str, blocks: Mapping[str, Callable[[], Block]], rounds: int) -> dict[str, Any]:
    """One row; `blocks` are vip, direct, again (direct once more) and unhooked."""
    seen: dict[str, list[Block]] = {key: [] for key in blocks}
    for block in blocks.values():  # neighbour entries, caches
        block()
    orders = itertools.cycle(itertools.permutations(blocks))
    for _ in range(rounds):
        for key in next(orders):
            seen[key].append(blocks[key]())
    p50 = {key: [block.p50 for block in found] for key, found in seen.items()}
    ratios = [vip / direct for vip, direct in zip(p50["vip"], p50["direct"], strict=True)]
    control = [again / direct for again, direct in zip(p50["again"], p50["direct"], strict=True)]
    chance = random.Random(1)
    value, reference = statistics.median(ratios), statistics.median(control)
    return {
        "name": name,
        "value": value,
        "reference": reference,
        "ratio": value / reference,
        "unit": "x",
        "samples": rounds,
        "upper": upper_bound(ratios, chance),
        "control_upper": upper_bound(control, chance),
        "vip_p50_us": statistics.median(p50["vip"]),
        "direct_p50_us": statistics.median(p50["direct"]),
        "unhooked_p50_us": statistics.median(p50["unhooked"]),
        "vip_p99_us": statistics.median(block.p99 for block in seen["vip"]),
        "direct_p99_us": statistics.median(block.p99 for block in seen["direct"]),
    }


def rows() -> list[dict[str, Any]]:
    """Value: median of VIP/direct over paired blocks; reference: the same of direct/direct."""
    with tempfile.TemporaryDirectory(prefix="spt-bench-") as directory:
        program = f"{directory}/latency"
        source = Path(__file__).with_name("latency.c")
        subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
        with place(directory) as (client, server, cgroup, stack):
            asyncio.run(load(directory, cgroup))
            command = ["nsenter", f"--net=/run/netns/{server}", program, "serve", BACKEND, *PORTS]
            serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.callback(end, serving)
            assert serving.stdout is not None
            assert serving.stdout.readline() == "up\n"
            hooked = Asker(program, client, cgroup, stack)
            unhooked = Asker(program, client, None, stack)
            result = []
            for name, what, count in (("connect", "connect", CONNECTS), ("rr", "rr", TURNS)):
                to_backend = partial(hooked.ask, what, BACKEND, PORTS[0], count)
                blocks = {
                    "vip": partial(hooked.ask, what, VIP, "80", count),
                    "direct": to_backend,
                    "again": to_backend,
                    "unhooked": partial(unhooked.ask, what, BACKEND, PORTS[0], count),
                }
                result.append(compare(f"{name}_vip_vs_direct_10k", blocks, ROUNDS))
            return result
