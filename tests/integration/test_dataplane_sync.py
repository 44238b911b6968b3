"""The daemon's task: from a real store into real maps, through restarts, damage and shortage."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import Gauge, generate_latest

from agent.dataplane import Dataplane, bpf, metrics
from agent.dataplane.hooks import HOOKS, is_attached
from agent.dataplane.pack import SERVICE, SLOT, pack_backend, pack_frontend, unpack_frontend
from agent.dataplane.settings import DataplaneSettings
from agent.dataplane.tables import ServiceTables
from api.meta import ObjectMeta
from api.service import (
    SERVICE_NAME_LABEL,
    EndpointConditions,
    EndpointSlice,
    Service,
    ServicePort,
    ServiceSpec,
    SliceEndpoint,
    SlicePort,
)
from store.sqlite import SqliteStore
from tests.integration.dataplane_node import FOUR, PORT, SIX, VIP4, VIP6, Node, backends, frontend
from tests.integration.test_dataplane_load import attached


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(str(tmp_path)) as node:
        yield node


@asynccontextmanager
async def running(
    node: Node, store: SqliteStore, settings: DataplaneSettings | None = None
) -> AsyncIterator[Dataplane]:
    dataplane = Dataplane(store, settings or node.settings)
    task = asyncio.create_task(dataplane.run())
    try:
        yield dataplane
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


@asynccontextmanager
async def opened(node: Node) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(f"{os.path.dirname(node.bpffs)}/store.db")
    try:
        yield store
    finally:
        await store.close()


async def soon(node: Node, expected: object, seconds: float = 10) -> None:
    """The maps hold what is expected, before the deadline."""
    end = time.monotonic() + seconds
    while (seen := await asyncio.to_thread(_contents, node)) != expected:
        assert time.monotonic() < end, f"{seen} is still not {expected}"
        await asyncio.sleep(0.02)


async def counted(gauge: Gauge, value: float, seconds: float = 10) -> None:
    """The gauge says so, before the deadline: it is set after the maps were written."""
    end = time.monotonic() + seconds
    while (seen := gauge._value.get()) != value:
        assert time.monotonic() < end, f"{seen} is still not {value}"
        await asyncio.sleep(0.02)


def _contents(node: Node) -> object:
    try:
        return node.contents()
    except AssertionError as error:  # in the middle of a change, or wrong: the deadline tells
        return str(error)


def service(name: str, *addresses: str, port: int = 80, protocol: str = "TCP") -> Service:
    ports = [ServicePort(name="main", port=port, protocol=protocol)]
    return Service(
        metadata=ObjectMeta(name=name, namespace="default"),
        spec=ServiceSpec(cluster_ip=addresses[0], cluster_ips=list(addresses), ports=ports),
    )


def part(
    name: str, of: str, *addresses: str, ready: bool = True, port: int = PORT, protocol: str = "TCP"
) -> EndpointSlice:
    endpoints = [SliceEndpoint(addresses=[a], conditions=EndpointConditions(ready=ready)) for a in addresses]
    return EndpointSlice(
        metadata=ObjectMeta(name=name, namespace="default", labels={SERVICE_NAME_LABEL: of}),
        address_type="IPv6" if ":" in addresses[0] else "IPv4",
        endpoints=endpoints,
        ports=[SlicePort(name="main", port=port, protocol=protocol)],
    )


def test_maps_follow_services_and_endpoints(node: Node) -> None:
    async def scenario() -> None:
        async with opened(node) as store, running(node, store) as dataplane:
            async with asyncio.timeout(20):
                await dataplane.ready()
            await store.create(service("web", VIP4, VIP6))
            await soon(node, {frontend(VIP4, 80): (), frontend(VIP6, 80): ()})
            await store.create(part("web-4", "web", *FOUR[:2]))
            await store.create(part("web-6", "web", *SIX))
            both = {frontend(VIP4, 80): backends(*FOUR[:2]), frontend(VIP6, 80): backends(*SIX)}
            await soon(node, both)
            await store.create(part("web-4b", "web", FOUR[1], FOUR[2]))
            await soon(node, both | {frontend(VIP4, 80): backends(*FOUR)})
            await store.update(part("web-4b", "web", FOUR[1], FOUR[2], ready=False))
            await soon(node, both)
            await store.update(part("web-4", "web", *FOUR[:2], port=81))
            await soon(node, both | {frontend(VIP4, 80): backends(*FOUR[:2], port=81)})
            await store.update(part("web-4", "other", *FOUR[:2]))  # it moves to another service
            await store.create(service("other", "10.96.0.11"))
            moved = {frontend(VIP4, 80): (), frontend("10.96.0.11", 80): backends(*FOUR[:2])}
            await soon(node, moved | {frontend(VIP6, 80): backends(*SIX)})
            await store.delete(EndpointSlice, "web-6", "default")
            await store.delete(Service, "other", "default")
            await soon(node, {frontend(VIP4, 80): (), frontend(VIP6, 80): ()})
            await store.update(service("web", VIP4, port=443))
            await soon(node, {frontend(VIP4, 443): ()})
            await store.delete(Service, "web", "default")
            await soon(node, {})

    asyncio.run(scenario())


def test_restart_repairs_wrong_and_stale_contents_and_keeps_the_rest(node: Node) -> None:
    async def scenario() -> None:
        async with opened(node) as store:
            for index, address in enumerate(FOUR):
                await store.create(service(f"s{index}", f"10.96.1.{index}"))
                await store.create(part(f"p{index}", f"s{index}", address, *SIX[:0]))
            good = {frontend(f"10.96.1.{index}", 80): backends(address) for index, address in enumerate(FOUR)}
            async with running(node, store) as dataplane:
                await dataplane.ready()
                await soon(node, good)
            before = _ids(node)
            _damage(node)
            with pytest.raises(AssertionError):
                node.contents()
            await store.delete(Service, "s2", "default")
            del good[frontend("10.96.1.2", 80)]
            async with running(node, store) as dataplane:
                await dataplane.ready()
                await soon(node, good)
            after = _ids(node)
            assert after == {where: before[where] for where in good}

    asyncio.run(scenario())


def _ids(node: Node) -> dict[object, int]:
    tables = ServiceTables.open(node.pins)
    try:
        have = tables.read()
    finally:
        tables.close()
    return {unpack_frontend(key): SERVICE.unpack(value)[0] for key, value in have.services.items()}


def _damage(node: Node) -> None:
    """Strays, a wrong backend, a missing member, a service that nobody wants, a counter of a service long gone."""
    ids = _ids(node)
    first = ids[frontend("10.96.1.0", 80)]
    names = ("services", "slots", "members", "chosen")
    opened = {name: bpf.Map.open(f"{node.pins.maps}/{name}", per_cpu=name == "chosen") for name in names}
    foreign = pack_backend(backends("192.0.2.1")[0])
    opened["slots"].set(SLOT.pack(first, 0), foreign)
    opened["slots"].set(SLOT.pack(first, 5), foreign)
    opened["slots"].set(SLOT.pack(4711, 0), foreign)
    opened["services"].set(pack_frontend(frontend("10.96.9.9", 80)), SERVICE.pack(4711, 3))
    opened["chosen"].set((4712).to_bytes(4, "little"), bytes(opened["chosen"].value_size))
    opened["members"].delete([key for key, _ in opened["members"].items()])
    for each in opened.values():
        each.close()


def test_drift_is_repaired_while_running(node: Node) -> None:
    async def scenario() -> None:
        async with opened(node) as store, running(node, store) as dataplane:
            for index, address in enumerate(FOUR):
                await store.create(service(f"s{index}", f"10.96.1.{index}"))
                await store.create(part(f"p{index}", f"s{index}", address))
            good = {frontend(f"10.96.1.{index}", 80): backends(address) for index, address in enumerate(FOUR)}
            await dataplane.ready()
            await soon(node, good)
            repairs = metrics.REPAIRS._value.get()
            _damage(node)
            end = time.monotonic() + 10
            while metrics.REPAIRS._value.get() == repairs:
                assert time.monotonic() < end
                await asyncio.sleep(0.02)
            await soon(node, good)

    asyncio.run(scenario())


def test_hooks_that_were_removed_come_back(node: Node) -> None:
    async def scenario() -> None:
        async with opened(node) as store, running(node, store) as dataplane:
            await dataplane.ready()
            os.unlink(node.pins.link(HOOKS[-1]))
            assert not is_attached(node.cgroup, node.pins)
            end = time.monotonic() + 15
            while not is_attached(node.cgroup, node.pins):
                assert time.monotonic() < end
                await asyncio.sleep(0.05)

    asyncio.run(scenario())


def test_older_service_keeps_a_frontend_that_two_claim(node: Node) -> None:
    async def scenario() -> None:
        async with opened(node) as store, running(node, store) as dataplane:
            await dataplane.ready()
            await store.create(service("b-first", VIP4))
            await store.create(part("pb", "b-first", FOUR[0]))
            await soon(node, {frontend(VIP4, 80): backends(FOUR[0])})
            await asyncio.sleep(1.1)  # creation times are whole seconds
            await store.create(service("a-second", VIP4))
            await store.create(part("pa", "a-second", FOUR[1]))
            await store.create(service("marker", "10.96.0.99"))
            await soon(node, {frontend(VIP4, 80): backends(FOUR[0]), frontend("10.96.0.99", 80): ()})
            await counted(metrics.CONFLICTS, 1)
            await store.delete(Service, "b-first", "default")
            await soon(node, {frontend(VIP4, 80): backends(FOUR[1]), frontend("10.96.0.99", 80): ()})

    asyncio.run(scenario())


def test_full_map_is_told_and_spares_what_is_there(node: Node) -> None:
    settings = replace(node.settings, max_services=4)

    async def scenario() -> None:
        async with opened(node) as store, running(node, store, settings) as dataplane:
            for index in range(4):
                await store.create(service(f"s{index}", f"10.96.1.{index}"))
                await store.create(part(f"p{index}", f"s{index}", FOUR[0]))
            good = {frontend(f"10.96.1.{index}", 80): backends(FOUR[0]) for index in range(4)}
            await dataplane.ready()
            await soon(node, good)
            await store.create(service("one-too-many", "10.96.1.9"))
            await store.create(part("p9", "one-too-many", FOUR[1]))
            await counted(metrics.UNPROGRAMMED, 1)
            await soon(node, good)
            await store.update(part("p0", "s0", FOUR[2]))  # what is there can still change
            await soon(node, good | {frontend("10.96.1.0", 80): backends(FOUR[2])})
            await store.delete(Service, "s0", "default")
            del good[frontend("10.96.1.0", 80)]
            await soon(node, good | {frontend("10.96.1.9", 80): backends(FOUR[1])})
            await counted(metrics.UNPROGRAMMED, 0)

    asyncio.run(scenario())


def test_it_waits_for_a_load_balancer_to_go(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with opened(node) as store, running(node, store) as dataplane:
            with attached(node.cgroup, "cil_sock4_conne", 2):
                end = time.monotonic() + 10
                while "is served by Cilium" not in caplog.text:
                    assert time.monotonic() < end
                    await asyncio.sleep(0.02)
                assert not dataplane.is_ready
                assert metrics.READY._value.get() == 0
            async with asyncio.timeout(10):
                await dataplane.ready()

    asyncio.run(scenario())


def test_shortage_that_ended_while_nobody_looked_is_forgotten(node: Node) -> None:
    settings = replace(node.settings, max_services=1)

    async def became(value: object, what: str) -> None:
        end = time.monotonic() + 10
        while getattr(metrics, what)._value.get() != value:
            assert time.monotonic() < end, what
            await asyncio.sleep(0.02)

    async def scenario() -> None:
        async with opened(node) as store, running(node, store, settings) as dataplane:
            await dataplane.ready()
            for index in range(2):
                await store.create(service(f"s{index}", f"10.96.1.{index}"))
            await became(1, "UNPROGRAMMED")
            with attached(node.cgroup, "cil_sock4_conne", 2):
                os.unlink(node.pins.link(HOOKS[-1]))
                await became(0, "READY")
                for index in range(2):
                    await store.delete(Service, f"s{index}", "default")
                end = time.monotonic() + 10
                while list(dataplane._services.values()):
                    assert time.monotonic() < end
                    await asyncio.sleep(0.01)
            async with asyncio.timeout(20):
                await dataplane.ready()
            await became(0, "UNPROGRAMMED")

    asyncio.run(scenario())


def test_loader_that_hangs_is_ended_and_told(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    settings = replace(node.settings, loader_deadline=0.01)

    async def scenario() -> None:
        async with opened(node) as store, running(node, store, settings):
            end = time.monotonic() + 10
            while "the loader did not end within" not in caplog.text:
                assert time.monotonic() < end
                await asyncio.sleep(0.02)

    asyncio.run(scenario())


def test_prometheus_sees_what_the_kernel_counted(node: Node) -> None:
    connect = "s = socket.socket(); print(json.dumps(s.connect_ex((A['vip'], A['port']))))"

    async def scenario() -> str:
        async with opened(node) as store, running(node, store) as dataplane:
            await store.create(service("web", VIP4))
            await store.create(part("web-p", "web", FOUR[0]))
            await store.create(service("none", VIP4, port=81))
            await dataplane.ready()
            await soon(node, {frontend(VIP4, 80): backends(FOUR[0]), frontend(VIP4, 81): ()})
            assert await asyncio.to_thread(node.ask, connect, vip=VIP4, port=80) == 0
            assert await asyncio.to_thread(node.ask, connect, vip=VIP4, port=81) == errno.ECONNREFUSED
            return generate_latest().decode()

    node.serve(FOUR[0])
    text = asyncio.run(scenario())
    labels = 'frontend="10.96.0.10:80/TCP",namespace="default",service="web"'
    assert f"spiderpool_dataplane_service_chosen_total{{{labels}}} 1.0\n" in text
    assert text.count("spiderpool_dataplane_service_chosen_total{") == 1
    assert 'spiderpool_dataplane_hook_errors_total{error="no_backend"} 1.0\n' in text
    assert "spiderpool_dataplane_service_chosen_total{" not in generate_latest().decode()


DAEMON = """
import asyncio, sys
from agent.dataplane import Dataplane, DataplaneSettings
from store.sqlite import SqliteStore

async def main():
    store = await SqliteStore.open(sys.argv[1])
    settings = DataplaneSettings(cgroup=sys.argv[2], bpffs=sys.argv[3], headers_cache=sys.argv[4],
                                 max_udp_flows=int(sys.argv[5]))
    dataplane = Dataplane(store, settings)
    task = asyncio.create_task(dataplane.run())
    await dataplane.ready()
    print("ready", flush=True)
    await task

asyncio.run(main())
"""

LOAD = """
# New connections, one connection that stays, one conversation: until told to stop.
import select
keep = socket.create_connection((A["vip"], 80))
udp = socket.socket(type=socket.SOCK_DGRAM)
counts = {"connects": 0, "datagrams": 0}
failures, keepers, talkers = [], set(), set()
print("started", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    try:
        s = socket.create_connection((A["vip"], 80))
        s.send(b"?")
        if s.getpeername() != (A["vip"], 80):
            failures.append(["peer", *s.getpeername()])
        s.recv(100)
        s.close()
        counts["connects"] += 1
        udp.sendto(b"?", (A["vip"], 53))
        data, peer = udp.recvfrom(100)
        talkers.add(data.decode())
        if peer != (A["vip"], 53):
            failures.append(["from", *peer])
        counts["datagrams"] += 1
        keep.send(b"?")
        keepers.add(keep.recv(100).decode())
    except OSError as error:
        failures.append(str(error))
print(json.dumps({"counts": counts, "failures": failures[:5], "keepers": len(keepers), "talkers": len(talkers)}))
"""


ONLY_CONNECTS = """
import select
counts, failures = {"connects": 0}, []
print("started", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    try:
        with socket.create_connection((A["vip"], 80)) as s:
            s.send(b"?")
            s.recv(100)
        with socket.socket(type=socket.SOCK_DGRAM) as s:
            s.sendto(b"?", (A["vip"], 53))
            s.recv(100)
        counts["connects"] += 1
    except OSError as error:
        failures.append(str(error))
print(json.dumps({"counts": counts, "failures": failures[:5]}))
"""


def _daemon(node: Node, flows: int) -> subprocess.Popen[str]:
    directory = os.path.dirname(node.bpffs)
    command = [
        sys.executable,
        "-c",
        DAEMON,
        f"{directory}/store.db",
        node.cgroup,
        node.bpffs,
        node.settings.headers_cache,
    ]
    process = subprocess.Popen([*command, str(flows)], stdout=subprocess.PIPE, text=True)
    node._processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_forwarding_survives_the_daemon_and_its_upgrade(node: Node) -> None:
    """kill -9, restart with the same maps, kill -9, restart with others: no call fails, no answer is untranslated."""

    async def fill() -> None:
        async with opened(node) as store:
            await store.create(service("web", VIP4))
            await store.create(part("web-p", "web", *FOUR))
            await store.create(service("dns", VIP4, port=53, protocol="UDP"))
            await store.create(part("dns-p", "dns", *FOUR, protocol="UDP"))

    asyncio.run(fill())
    node.serve(*FOUR)
    first = _daemon(node, 1000)
    client = node.start(LOAD, vip=VIP4)
    assert client.stdout is not None
    assert client.stdout.readline() == "started\n"
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert node.ask("s = socket.create_connection((A['vip'], 80)); print(json.dumps(s.getpeername()))", vip=VIP4) == [
        VIP4,
        80,
    ]
    second = _daemon(node, 1000)
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    # Other programs over the same maps, four times: what an upgrade does.
    for _ in range(4):
        os.unlink(f"{node.pins.programs}/spider_connect4")
        assert node.load("--max-udp-flows=1000")["programs"] == "loaded"
    seen = json.loads(client.communicate("stop\n", timeout=20)[0])
    assert seen["failures"] == []
    assert seen["counts"]["connects"] > 100
    assert (seen["keepers"], seen["talkers"]) == (1, 1)
    # Maps of another size are filled before the hooks change over to them.
    client = node.start(ONLY_CONNECTS, vip=VIP4)
    assert client.stdout is not None
    assert client.stdout.readline() == "started\n"
    third = _daemon(node, 2000)
    seen = json.loads(client.communicate("stop\n", timeout=20)[0])
    assert seen["failures"] == []
    assert seen["counts"]["connects"] > 100
    assert os.listdir(node.pins.directory) == ["v1"]
    third.terminate()
    third.wait()
    assert is_attached(node.cgroup, node.pins)  # nothing is removed at the end


def test_ten_thousand_services(node: Node) -> None:
    count = 10_000

    async def scenario() -> None:
        async with opened(node) as store:

            async def both(index: int) -> None:
                address = f"10.97.{index // 250}.{index % 250 + 1}"
                await store.create(service(f"s{index}", address))
                await store.create(part(f"p{index}", f"s{index}", *FOUR))

            for start in range(0, count, 1000):
                await asyncio.gather(*(both(index) for index in range(start, start + 1000)))
            async with running(node, store, replace(node.settings, drift_period=60)) as dataplane:
                async with asyncio.timeout(30):
                    await dataplane.ready()
                contents = node.contents()
                assert len(contents) == count
                assert set(contents.values()) == {backends(*FOUR)}
                await store.update(part("p9999", "s9999", FOUR[0]))
                await soon(node, {**contents, frontend("10.97.39.250", 80): backends(FOUR[0])})

    asyncio.run(scenario())
    tables = ServiceTables.open(node.pins)
    try:
        desired = dict(node.contents())
        tables.reconcile({})
        start = time.monotonic()
        report = tables.reconcile(desired)
        took = time.monotonic() - start
        assert len(report.unprogrammed) == 0
        assert report.writes > 3 * count
        assert took < 5  # about 0.3 s when nothing else runs
    finally:
        tables.close()
