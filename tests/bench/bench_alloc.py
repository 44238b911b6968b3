"""Agents that allocate for pods from a pool of exactly as many addresses, beside raw creation of as many objects.

Real agent processes with the Kubernetes store, called over their sockets as the CNI executables do, one call at a time
each; against them as many processes that do nothing but POST a claim. Both alternate on the same API server. Pods are
there beforehand, bound to the agents' nodes. Every address must have been given exactly once.

Requests and bytes are what went over the agents' connections to the server while they allocated, watches and views
included.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from agent.wire import HEADER, encode_frame
from lab.kube.cluster import Cluster
from lab.kube.components import CONTROLLERS
from tests.bench.bench_ipam import percentile
from tests.bench.processor import clock, per_thousand
from tests.integration.installation import ROOT, Agent, Installation, netns
from tests.kube.conftest import running
from tests.kube.store_rig import raw_session

NAMESPACE = "bench"
STARTING = 4
"""Agents that start at a time: a start is a second of computing, and one that has to wait too long gives up."""
_pool_numbers = itertools.count(1)
_raw_numbers = itertools.count(0, 100_000)


@dataclass(frozen=True)
class Node:
    """One agent."""

    name: str
    socket: str
    agent: Agent


@dataclass(frozen=True)
class Campaign:
    """What a round of allocations cost."""

    rate: float
    """Allocations a second."""
    durations: list[float]
    """Of each, in milliseconds."""
    bytes: float
    """On the wire, both ways, for one allocation."""
    writes: float
    """Claims' POST, PUT, PATCH and DELETE requests for one allocation, as the server counts them."""
    reads: float
    """Claims' and pools' GET and LIST requests for one allocation."""
    lag: float
    """Seconds after the last allocation until all SpiderEndpoints were there."""
    processor: dict[str, float]
    """Processor seconds of server, etcd and all agents for 1,000 allocations, endpoints apart."""


@contextmanager
def agents(cluster: Cluster, count: int) -> Iterator[list[Node]]:
    """Running agents, each with a node object of its own."""
    flags = [
        "--dataplane-enabled=false",
        "--collector-enabled=false",
        "--store-kind=kubernetes",
        f"--store-kubeconfig={cluster.admin}",
    ]
    with tempfile.TemporaryDirectory(prefix="spt-alloc-") as folder, ExitStack() as stack:
        nodes: list[Node] = []
        for number in range(count):
            name = f"bench-{count}-{number}"
            root = Path(folder) / name
            root.mkdir()
            installation = Installation(root)
            agent = stack.enter_context(
                installation.agent(
                    *flags, f"--node-name={name}", "--ipam-endpoint-queue=4096", module="agent", ready=False
                )
            )
            nodes.append(Node(name, str(installation.socket), agent))
            if number >= STARTING:
                nodes[number - STARTING].agent.wait_for("READY=1", 60)
        for node in nodes[-STARTING:]:
            node.agent.wait_for("READY=1", 60)
        yield nodes


def add(node: Node, pool: str, pod: str, uid: str, netns_fd: int) -> tuple[str, float]:
    """One ADD; the address and the milliseconds. Raises RuntimeError."""
    environment = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": f"c-{uid}",
        "CNI_NETNS": f"/proc/{os.getpid()}/fd/{netns_fd}",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={pod};K8S_POD_UID={uid}",
        "SPIDERPOOL_PLUGIN": "spiderpool",
    }
    ipam = {"type": "spiderpool", "default_ipv4_ippool": [pool]}
    config = msgspec.json.encode({"cniVersion": "1.0.0", "name": "bench", "type": "macvlan", "ipam": ipam})
    frame = encode_frame(environment, config)
    began = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(90)
        connection.connect(node.socket)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", netns_fd))]
        sent = connection.sendmsg([frame], rights)
        if sent < len(frame):  # a quick agent has answered and hung up by now
            connection.sendall(frame[sent:])
        reply = bytearray()
        while chunk := connection.recv(65536):
            reply += chunk
    elapsed = (time.perf_counter() - began) * 1e3
    _, status, _ = HEADER.unpack(reply[: HEADER.size])
    body = bytes(reply[HEADER.size :])
    if status:
        raise RuntimeError(f"{pod}: {body.decode()}\n{node.agent.log()[-2000:]}")
    return msgspec.json.decode(body)["ips"][0]["address"], elapsed


def wire_bytes(nodes: list[Node], port: int) -> int:
    """Bytes that the agents' present connections to the server have carried, both ways."""
    pids = {str(node.agent.process.pid) for node in nodes}
    lines = subprocess.run(
        ["ss", "-tinpHO", "dport", "=", f":{port}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    total = 0
    for line in lines:
        owner = re.search(r"pid=(\d+)", line)
        if owner and owner[1] in pids:
            total += sum(int(count) for count in re.findall(r"bytes_(?:sent|received):(\d+)", line))
    return total


async def requests(session: aiohttp.ClientSession) -> tuple[int, int]:
    """Writes to claims, reads of claims and pools, as the server has counted them so far."""
    async with session.get("/metrics") as answer:
        text = await answer.text()
    writes = reads = 0
    for line in text.splitlines():
        if line.startswith("apiserver_request_total{") and 'group="spiderpool.spidernet.io"' in line:
            resource, verb = (re.search(f'{name}="([^"]*)"', line) for name in ("resource", "verb"))
            if resource is None or verb is None:
                raise RuntimeError(f"not understood: {line}")
            count = int(float(line.rsplit(" ", 1)[1]))
            if resource[1] == "spideripclaims" and verb[1] in ("POST", "PUT", "PATCH", "DELETE"):
                writes += count
            elif resource[1] in ("spideripclaims", "spiderippools") and verb[1] in ("GET", "LIST"):
                reads += count
    return writes, reads


async def post(session: aiohttp.ClientSession, path: str, document: dict[str, Any]) -> Any:
    """Create an object; what the server made of it."""
    async with session.post(path, json=document) as answer:
        found = await answer.json()
        if answer.status not in (200, 201, 409):
            raise RuntimeError(f"{path}: {answer.status}: {found}")
        return found


def make_namespace(cluster: Cluster) -> None:
    """Where the pods are."""
    cluster.kubectl("create", "namespace", NAMESPACE)
    cluster.kubectl("wait", "--for=create", "serviceaccount/default", "-n", NAMESPACE, "--timeout=30s")


async def make_pods(session: aiohttp.ClientSession, nodes: list[Node], count: int, run: int) -> list[tuple[str, str]]:
    """Bound pods, round robin; name and UID of each."""
    left = iter(range(count))
    found: list[tuple[str, str]] = [("", "")] * count

    async def worker() -> None:
        for number in left:
            name = f"pod-{run}-{number}"
            spec = {
                "nodeName": nodes[number % len(nodes)].name,
                "containers": [{"name": "c", "image": "lab.invalid/none:1"}],
                "automountServiceAccountToken": False,
            }
            meta = {"name": name, "namespace": NAMESPACE, "annotations": {"k": "v" * 200}}
            document = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}
            made = await post(session, f"/api/v1/namespaces/{NAMESPACE}/pods", document)
            found[number] = name, made["metadata"]["uid"]

    await asyncio.gather(*(worker() for _ in range(16)))
    return found


async def make_pool(session: aiohttp.ClientSession, size: int) -> str:
    """A pool of exactly `size` addresses."""
    number = next(_pool_numbers)
    first = (10 << 24) + (number << 16) + 256
    last = first + size - 1
    text = [".".join(str(value >> shift & 255) for shift in (24, 16, 8, 0)) for value in (first, last)]
    spec = {"subnet": f"10.{number}.0.0/16", "ips": ["-".join(text)], "ipVersion": 4}
    document = {
        "apiVersion": "spiderpool.spidernet.io/v2beta1",
        "kind": "SpiderIPPool",
        "metadata": {"name": f"bench-{number}"},
        "spec": spec,
    }
    await post(session, "/apis/spiderpool.spidernet.io/v2beta1/spiderippools", document)
    return f"bench-{number}"


async def allocate(cluster: Cluster, nodes: list[Node], count: int, size: int, netns_fd: int) -> Campaign:
    """Allocate for `count` new pods from a new pool of `size` addresses."""
    async with raw_session(cluster) as session:
        pool = await make_pool(session, size)
        pods = await make_pods(session, nodes, count, next(_pool_numbers) + 1000)
        endpoints = await _endpoints(session)
        # the agents hear of pods and pool by their watches; what is measured is not how fast that is
        await asyncio.to_thread(add, nodes[0], *(await _warm(session, nodes[0])), netns_fd)
        writes, reads = await requests(session)
        before = wire_bytes(nodes, cluster.place.port)
        results: list[tuple[str, float]] = []
        failures: list[BaseException] = []

        def work(index: int) -> None:
            try:
                for name, uid in pods[index :: len(nodes)]:
                    results.append(add(nodes[index], pool, name, uid, netns_fd))
            except BaseException as error:  # seen by the main thread
                failures.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(nodes))]
        began = time.perf_counter()
        consumed = clock(cluster, {"agents": [node.agent.process.pid for node in nodes]})
        consumed_before = consumed()
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        elapsed = time.perf_counter() - began
        processor = per_thousand(consumed_before, consumed(), count)
        carried = wire_bytes(nodes, cluster.place.port) - before
        writes_after, reads_after = await requests(session)
        if not failures:
            await _until_endpoints(session, endpoints + count + 1)
        lag = time.perf_counter() - began - elapsed
    if failures:
        raise RuntimeError(f"{len(failures)} agents failed") from failures[0]
    if len({address for address, _ in results}) != count:
        raise RuntimeError(f"{count} pods got {len({address for address, _ in results})} addresses")
    return Campaign(
        rate=count / elapsed,
        durations=[duration for _, duration in results],
        bytes=carried / count,
        writes=(writes_after - writes) / count,
        reads=(reads_after - reads) / count,
        lag=lag,
        processor=processor,
    )


async def _endpoints(session: aiohttp.ClientSession) -> int:
    """How many there are."""
    path = f"/apis/spiderpool.spidernet.io/v2beta1/namespaces/{NAMESPACE}/spiderendpoints?limit=1"
    async with session.get(path) as answer:
        found = await answer.json()
    return len(found["items"]) + int(found["metadata"].get("remainingItemCount", 0))


async def _until_endpoints(session: aiohttp.ClientSession, count: int) -> None:
    """Return when there are `count`: else writing them would weigh on what is measured next. Raises TimeoutError."""
    async with asyncio.timeout(300):
        while await _endpoints(session) < count:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.1)


async def _warm(session: aiohttp.ClientSession, node: Node) -> tuple[str, str, str]:
    """A pool and a pod for one ADD: after it, everything made before is known to be in the server's watch caches."""
    pool = await make_pool(session, 1)
    ((name, uid),) = await make_pods(session, [node], 1, next(_pool_numbers) + 1000)
    return pool, name, uid


@contextmanager
def creators(cluster: Cluster, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Raw clients that wait for orders."""
    command = [sys.executable, "-m", "tests.bench.raw_creator", cluster.place.url, cluster.place.pki]
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a raw client does not start")
        yield processes


def create_raw(processes: list[subprocess.Popen[str]], count: int) -> float:
    """Objects that the raw clients create a second."""
    each = count // len(processes)
    began = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{each} {next(_raw_numbers)}\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline() != "done\n":
            raise RuntimeError("a raw client failed")
    return each * len(processes) / (time.perf_counter() - began)


def _compared(
    name: str, cluster: Cluster, count: int, clients: int, rounds: int, netns_fd: int
) -> Iterator[dict[str, Any]]:
    ours: list[Campaign] = []
    raw: list[float] = []
    raw_processor: list[dict[str, float]] = []
    with agents(cluster, clients) as nodes, creators(cluster, clients) as processes:
        create_raw(processes, clients * 10)
        consumed = clock(cluster, {"clients": [process.pid for process in processes]})
        for _ in range(rounds):
            before = consumed()
            raw.append(create_raw(processes, count))
            raw_processor.append(per_thousand(before, consumed(), count // clients * clients))
            ours.append(asyncio.run(allocate(cluster, nodes, count, count, netns_fd)))
    durations = [duration for campaign in ours for duration in campaign.durations]
    yield {
        "name": name,
        "value": statistics.median(campaign.rate for campaign in ours),
        "reference": statistics.median(raw),
        "ratio": statistics.median(campaign.rate / rate for campaign, rate in zip(ours, raw, strict=True)),
        "unit": "/s",
        "samples": rounds,
        "agents": clients,
        "pods": count,
        "one_median": statistics.median(durations),
        "one_p99": percentile(durations, 0.99),
        "claim_writes": statistics.median(campaign.writes for campaign in ours),
        "reads": statistics.median(campaign.reads for campaign in ours),
        "bytes": statistics.median(campaign.bytes for campaign in ours),
        "endpoints_lag": max(campaign.lag for campaign in ours),
        **_medians("cpu", [campaign.processor for campaign in ours]),
        **_medians("raw_cpu", raw_processor),
    }


def _medians(prefix: str, found: list[dict[str, float]]) -> dict[str, float]:
    """Members of a row: processor seconds for 1,000, by who spent them."""
    return {f"{prefix}_{name}": statistics.median(each[name] for each in found) for name in found[0]}


def _grows(cluster: Cluster, netns_fd: int) -> Iterator[dict[str, Any]]:
    """Bytes of an allocation from a pool of 50,000 addresses beside one of 1,000, both nearly empty."""
    found: dict[int, list[Campaign]] = {1_000: [], 50_000: []}
    with agents(cluster, 10) as nodes:
        for _ in range(3):
            for size, campaigns in found.items():
                campaigns.append(asyncio.run(allocate(cluster, nodes, 500, size, netns_fd)))
    small, large = (statistics.median(campaign.bytes for campaign in found[size]) for size in found)
    yield {
        "name": "alloc_bytes_50k_vs_1k",
        "value": large,
        "reference": small,
        "ratio": large / small,
        "unit": "B",
        "samples": 3,
        "writes_50k": statistics.median(campaign.writes for campaign in found[50_000]),
        "writes_1k": statistics.median(campaign.writes for campaign in found[1_000]),
        "reads_50k": statistics.median(campaign.reads for campaign in found[50_000]),
        "reads_1k": statistics.median(campaign.reads for campaign in found[1_000]),
        **_medians("cpu_50k", [campaign.processor for campaign in found[50_000]]),
        **_medians("cpu_1k", [campaign.processor for campaign in found[1_000]]),
    }


def rows() -> Iterator[dict[str, Any]]:
    """1,000 and 10,000 pods by 10 agents, 1,000 by 5 and by 50, and how an allocation grows with its pool."""
    with netns() as path, running() as cluster:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            make_namespace(cluster)
            cluster.stop(CONTROLLERS)  # which would delete pods of nodes that do not exist
            yield from _compared("alloc_rate_vs_raw_create_1k", cluster, 1_000, 10, 3, descriptor)
            yield from _grows(cluster, descriptor)
            yield from _compared("alloc_rate_5_agents", cluster, 1_000, 5, 2, descriptor)
            yield from _compared("alloc_rate_50_agents", cluster, 1_000, 50, 2, descriptor)
            yield from _compared("alloc_rate_vs_raw_create_10k", cluster, 10_000, 10, 1, descriptor)
        finally:
            os.close(descriptor)
