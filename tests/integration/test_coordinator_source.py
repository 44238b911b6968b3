"""Settings from the SpiderCoordinator and wishes from the pod, out of a real store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from api.coordinator import ClusterCoordinatorSpec, Coordinator, CoordinatorStatus
from api.core import Pod
from api.meta import ObjectMeta
from api.pool import Route
from plugins.coordinator import source as source_module
from plugins.coordinator.config import parse_config
from plugins.coordinator.settings import CoordinatorSettings
from plugins.coordinator.source import ClusterSource, Wishes, over
from plugins.errors import InvalidConfigError, TryAgainLaterError
from store.sqlite import SqliteStore

AGENT = CoordinatorSettings(veth_mtu=9000, service_cidr=("10.1.0.0/16",), tx_queue_len=7, pod_rp_filter=2)


class Pods:
    def __init__(self, **annotations: str) -> None:
        self._annotations = annotations

    async def pod(self, namespace: str, name: str, uid: str) -> Pod | None:
        return Pod(metadata=ObjectMeta(name=name, namespace=namespace, annotations=self._annotations)) if uid else None


def within(path: Path, work: Callable[[SqliteStore, ClusterSource], Awaitable[None]], **annotations: str) -> None:
    async def main() -> None:
        store = await SqliteStore.open(str(path / "store.db"))
        source = ClusterSource(store, AGENT, Pods(**annotations))
        task = asyncio.create_task(source.run())
        try:
            async with asyncio.timeout(20):
                await work(store, source)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await store.close()

    asyncio.run(main())


async def becomes(source: ClusterSource, holds: Callable[[CoordinatorSettings], bool]) -> CoordinatorSettings:
    while True:
        try:
            settings = await source.settings()
            if holds(settings):
                return settings
        except TryAgainLaterError:
            pass
        await asyncio.sleep(0.01)


def test_the_cluster_goes_before_the_agent(tmp_path: Path) -> None:
    async def work(store: SqliteStore, source: ClusterSource) -> None:
        with pytest.raises(TryAgainLaterError, match="coordinator config not found"):
            await source.settings()
        made = await store.create(
            Coordinator(metadata=ObjectMeta(name="default"), spec=ClusterCoordinatorSpec(veth_mtu=1400))
        )
        async with asyncio.timeout(5):
            while True:
                with pytest.raises(TryAgainLaterError) as caught:
                    await source.settings()
                if "spidercoordinator: default no ready" in str(caught.value):
                    break
                await asyncio.sleep(0.01)
        status = CoordinatorStatus(phase="Synced", overlay_pod_cidr=["10.244.0.0/16"], service_cidr=[])
        await store.update_status(Coordinator(metadata=made.metadata, spec=made.spec, status=status))
        settings = await becomes(source, lambda s: True)
        assert (settings.veth_mtu, settings.tx_queue_len) == (1400, 7)
        assert (settings.overlay_pod_cidr, settings.service_cidr) == (("10.244.0.0/16",), ("10.1.0.0/16",))
        assert parse_config({"vethMTU": 1300}, settings).veth_mtu == 1300
        current = await store.get(Coordinator, "default")
        await store.update(Coordinator(metadata=current.metadata, spec=ClusterCoordinatorSpec(mode="disabled")))
        assert (await becomes(source, lambda s: s.mode == "disable")).veth_mtu == 9000

    within(tmp_path, work)


def test_what_it_does_not_hear_of_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_SYNC_DEADLINE", 0.05)

    async def main() -> None:
        store = await SqliteStore.open(str(tmp_path / "store.db"))
        try:
            with pytest.raises(TryAgainLaterError, match="could not be read yet"):
                await ClusterSource(store, AGENT, Pods()).settings()
        finally:
            await store.close()

    asyncio.run(main())


SPEC: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"mode": "auto", "veth_mtu": 9000, "pod_rp_filter": 2, "tune_pod_routes": True}),
    ({"pod_rp_filter": 0, "tune_pod_routes": False}, {"pod_rp_filter": 0, "tune_pod_routes": False}),
    ({"hijack_cidr": ["169.254.25.10", "fd00::1"]}, {"hijack_cidr": ("169.254.25.10/32", "fd00::1/128")}),
    ({"policy_routes": [Route(dst="10.0.0.0/8", gw="10.1.0.1")]}, {"policy_routes": ("10.0.0.0/8 via 10.1.0.1",)}),
    ({"host_rule_table": 0, "veth_link_address": ""}, {"host_rule_table": 500, "veth_link_address": ""}),
]


@pytest.mark.parametrize(("spec", "expected"), SPEC)
def test_every_member(spec: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = over(Coordinator(metadata=ObjectMeta(name="x"), spec=ClusterCoordinatorSpec(**spec)), AGENT)
    assert {name: getattr(settings, name) for name in expected} == expected
    parse_config({}, settings)


def test_what_is_no_network_is_named() -> None:
    wrong = over(
        Coordinator(metadata=ObjectMeta(name="x"), spec=ClusterCoordinatorSpec(hijack_cidr=["nonsense"])), AGENT
    )
    with pytest.raises(InvalidConfigError, match=r"hijackCIDR\[0\]"):
        parse_config({}, wrong)


@pytest.mark.upstream("A00012")
@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ({}, Wishes()),
        ({"ipam.spidernet.io/default-route-nic": " net1 "}, Wishes("net1")),
        ({"k8s.v1.cni.cncf.io/networks": "a, ns/b@data0, c"}, Wishes("", frozenset(("net1", "data0", "net3")))),
        ({"k8s.v1.cni.cncf.io/networks": "[{"}, Wishes()),
    ],
)
def test_wishes(tmp_path: Path, annotations: dict[str, str], expected: Wishes) -> None:
    async def work(_: SqliteStore, source: ClusterSource) -> None:
        assert await source.wishes("ns", "pod", "uid") == expected
        assert await source.wishes("", "", "") == Wishes()

    within(tmp_path, work, **annotations)
