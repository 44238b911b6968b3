"""NetworkAttachmentDefinitions are what the SpiderMultusConfigs say, on a real API server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from msgspec.structs import replace

from api.meta import ObjectMeta, OwnerReference
from api.multusconfig import MultusConfig
from api.nad import NetworkAttachmentDefinition, NetworkSpec
from controller import caches
from lab.kube.cluster import NETWORKS, Cluster
from store.errors import ConflictError, NotFoundError, NotServedError
from store.kube import KubeStore
from store.kube_settings import KubeSettings
from tests.kube.controller_rig import API, Requests
from tests.kube.multus_rig import World, becomes, leading, multus, until, world
from tests.unit.test_api_netconf import SAMPLES, chain

POOLS = {"ipv4": ["web-v4"]}
CR_NAME = "multus.spidernet.io/cr-name"
IPVLAN = {"cniType": "ipvlan", "ipvlan": {"master": ["eth0"]}}
OTHER_SHAPES: list[dict[str, Any]] = [
    {"cniType": "ipvlan", "ipvlan": {"master": ["ens224"], "ippools": POOLS}},
    {"cniType": "vlan", "vlan": {"master": ["ens224"], "vlanMode": "manual", "vlanID": 100}},
    {"cniType": "vlan", "vlan": {"master": ["ens224"], "vlanMode": "auto"}},
    {
        "cniType": "sriov",
        "sriov": {
            "resourceName": "spidernet.io/sriov-a",
            "vlanID": 0,
            "mtu": 8000,
            "minTxRateMbps": 100,
            "maxTxRateMbps": 1000,
            "rdmaIsolation": True,
            "ippools": POOLS | {"matchMasterSubnet": True},
        },
    },
    {
        "cniType": "ib-sriov",
        "ibsriov": {
            "resourceName": "spidernet.io/ib-a",
            "pkey": "0x12",
            "linkState": "enable",
            "rdmaIsolation": True,
            "enableIbKubernetes": False,
        },
    },
    {"cniType": "ipoib", "ipoib": {"master": "ibs2", "ippools": POOLS}},
    {"cniType": "ovs", "ovs": {"bridge": "br1", "vlan": 0, "trunk": [{"minID": 1, "maxID": 10}, {"id": 20}]}},
    {"cniType": "custom", "customCNI": '{"cniVersion":"0.3.1","name":"x","plugins":[{"type":"loopback"}]}'},
    {},
]
AT_ONCE = 5.0
"""Seconds: by a watch, and not by the look for missing kinds (10 s) or the resync. Less would not do: in the first two
seconds of a kind the API server keeps those waiting for two who create its objects (k8s.io/apiextensions-apiserver
customresource_handler.go, justCreated)."""
COLLECTED = 60.0
"""Seconds: Kubernetes' garbage collector looks every 30 s for kinds that it does not know yet."""


@pytest.mark.upstream(
    *("M00001", "M00002", "M00003", "M00004", "M00006", "M00017", "M00019", "M00021"),
    *("M00033", "M00034", "M00035", "M00038", "M00039"),
)
def test_every_shape_is_accepted_and_made_into_its_definition(kube: Cluster) -> None:
    async def scenario() -> None:
        async with world(kube) as it:
            for i, (spec, plugins) in enumerate(SAMPLES):
                await it.config(f"sample{i}", spec)
                await becomes(partial(it.text, f"sample{i}"), chain(f"sample{i}", *plugins), AT_ONCE)
            for i, spec in enumerate(OTHER_SHAPES):
                made = await it.config(f"shape{i}", spec)
                found = await until(partial(it.network, f"shape{i}"), AT_ONCE)
                (owner,) = found.metadata.owner_references
                assert (owner.uid, owner.controller) == (made.metadata.uid, True)
            assert await it.text("shape7") == OTHER_SHAPES[7]["customCNI"]
            assert await it.text("shape8") is None

    asyncio.run(scenario())


@pytest.mark.upstream("M00016", "M00038")
@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"cniType": "bridge"}, "spec.cniType"),
        ({"cniType": "macvlan", "macvlan": {"master": ["a"], "bond": {"name": "bond0"}}}, "spec.macvlan.bond.mode"),
        ({"cniType": "macvlan", "macvlan": {}}, "spec.macvlan.master"),
        ({"cniType": "macvlan", "macvlan": {"master": ["a"], "vlanID": 4095}}, "spec.macvlan.vlanID"),
        ({"cniType": "vlan", "vlan": {"master": ["a"], "vlanID": -1}}, "spec.vlan.vlanID"),
        ({"cniType": "ipvlan", "ipvlan": {"master": ["a"], "mtu": -1}}, "spec.ipvlan.mtu"),
        ({"cniType": "vlan", "vlan": {"master": ["a"], "vlanMode": "x"}}, "spec.vlan.vlanMode"),
        ({"coordinator": {"mode": "disable"}}, "spec.coordinator.mode"),
    ],
)
def test_the_servers_schema_refuses(kube: Cluster, spec: dict[str, Any], text: str) -> None:
    raw = {
        "apiVersion": "spiderpool.spidernet.io/v2beta1",
        "kind": "SpiderMultusConfig",
        "metadata": {"name": "refused", "namespace": "default"},
        "spec": spec,
    }
    status, answer = _post(kube, raw)
    assert (status, answer["reason"]) == (422, "Invalid")
    assert text in answer["message"]


def _post(kube: Cluster, document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return Requests(kube)("POST", f"{API}/namespaces/default/spidermultusconfigs", document)


@pytest.mark.upstream("M00007", "M00009", "M00010", "M00012")
def test_drift_and_changes_are_followed_at_once(kube: Cluster) -> None:
    async def scenario() -> None:
        async with world(kube) as it:
            annotations = {CR_NAME: "real", "multus.spidernet.io/cni-version": "0.4.0", "mine": "yes"}
            await it.config("net", {"cniType": "macvlan", "macvlan": {"master": ["eth0"]}}, **annotations)
            made = await until(lambda: it.network("real"), AT_ONCE)
            assert await it.network("net") is None
            right = made.spec.config
            assert right is not None
            assert right.startswith('{"cniVersion":"0.4.0","name":"real"')
            assert made.metadata.annotations == annotations

            await it.store.delete(NetworkAttachmentDefinition, "real", it.namespace)
            took = [await becomes(lambda: it.text("real"), right, AT_ONCE)]
            await it.patch("net-attach-def", "real", {"spec": {"config": "{}"}})
            took.append(await becomes(lambda: it.text("real"), right, AT_ONCE))
            await it.patch("net-attach-def", "real", {"metadata": {"annotations": {"odd": "one", "mine": None}}})

            async def annotated() -> dict[str, str]:
                found = await it.network("real")
                return found.metadata.annotations if found else {}

            took.append(await becomes(annotated, annotations, AT_ONCE))
            print("repaired after", [f"{seconds * 1000:.0f} ms" for seconds in took])

            bonded = {"master": ["eth0", "eth1"], "bond": {"name": "bond0", "mode": 1}, "vlanID": 7}
            await it.patch("smc", "net", {"spec": {"macvlan": bonded}})

            async def bond() -> bool:
                text = await it.text("real") or ""
                return '"type":"ifacer"' in text and '"master":"bond0.7"' in text

            await until(bond, AT_ONCE)

    asyncio.run(scenario())


@pytest.mark.upstream("M00014")
def test_a_definition_that_is_there_is_adopted(kube: Cluster) -> None:
    async def scenario() -> None:
        async with world(kube) as it:
            stranger = OwnerReference(api_version="v1", kind="ConfigMap", name="x", uid="no-such-uid")
            for name, owners in (("plain", []), ("owned", [stranger])):
                metadata = ObjectMeta(
                    name=name, namespace=it.namespace, labels={"their": "label"}, owner_references=owners
                )
                await it.store.create(NetworkAttachmentDefinition(metadata=metadata, spec=NetworkSpec(config="{}")))
                made = await it.config(name, IPVLAN)

                async def ours(name: str = name, uid: str = made.metadata.uid) -> bool:
                    found = await it.network(name)
                    return found is not None and [o.uid for o in found.metadata.owner_references] == [uid]

                await until(ours, AT_ONCE)
                found = await it.network(name)
                assert found is not None
                assert '"type":"ipvlan"' in (found.spec.config or "")

            async def told() -> list[str]:
                return await it.events("plain", "NetworkTakenOver")

            await until(told)
            plain = await it.network("plain")
            assert plain is not None
            assert plain.metadata.labels == {"their": "label"}

    asyncio.run(scenario())


def test_two_that_want_the_same_do_not_fight(kube: Cluster) -> None:
    async def scenario() -> None:
        async with world(kube) as it:
            first = await it.config("first", IPVLAN, **{CR_NAME: "shared"})
            made = await until(lambda: it.network("shared"), AT_ONCE)
            second = await it.config(
                "second", {"cniType": "macvlan", "macvlan": {"master": ["e"]}}, **{CR_NAME: "shared"}
            )
            (text,) = await until(lambda: it.events("second", "NetworkConflict"))
            assert f"{it.namespace}/shared is made of the SpiderMultusConfig first" in text
            await it.patch("smc", "second", {"metadata": {"annotations": {"touched": "yes"}}})
            await asyncio.sleep(0.5)
            assert await it.network("shared") == made
            await it.store.delete(MultusConfig, "first", it.namespace)

            async def owner() -> str:
                found = await it.network("shared")
                return found.metadata.owner_references[0].uid if found else ""

            await becomes(owner, second.metadata.uid)
            assert first.metadata.uid != second.metadata.uid
            await asyncio.sleep(1.0)  # the garbage collector may have had its eye on it
            assert await becomes(owner, second.metadata.uid) < AT_ONCE

    asyncio.run(scenario())


def test_an_invalid_configuration_breaks_nothing_but_itself(kube: Cluster) -> None:
    async def scenario() -> None:
        async with world(kube) as it:
            await it.config("broken", {"cniType": "macvlan"})
            (text,) = await until(lambda: it.events("broken", "InvalidConfiguration"))
            assert "spec.macvlanConfig: Required value" in text
            await it.config("fine", IPVLAN)
            await until(lambda: it.network("fine"), AT_ONCE)
            assert await it.network("broken") is None
            await it.patch("smc", "broken", {"spec": {"macvlan": {"master": ["eth0"]}}})
            await until(lambda: it.network("broken"), AT_ONCE)
            before = await it.text("broken")
            await it.patch("smc", "broken", {"spec": {"macvlan": {"master": []}}})
            await asyncio.sleep(0.5)
            assert await it.text("broken") == before, "what was right stays"

    asyncio.run(scenario())


def test_a_terminating_definition_is_waited_for(kube: Cluster) -> None:
    async def scenario() -> None:
        async with world(kube) as it:
            metadata = ObjectMeta(name="net", namespace=it.namespace, finalizers=["example.com/keep"])
            old = await it.store.create(NetworkAttachmentDefinition(metadata=metadata))
            await it.store.delete(NetworkAttachmentDefinition, "net", it.namespace)
            await it.config("net", IPVLAN)
            await asyncio.sleep(0.5)
            held = await it.network("net")
            assert held is not None
            assert (held.metadata.uid, held.spec.config) == (old.metadata.uid, None)
            await it.patch("net-attach-def", "net", {"metadata": {"finalizers": None}})

            async def anew() -> bool:
                found = await it.network("net")
                return found is not None and found.metadata.uid != old.metadata.uid

            await until(anew, AT_ONCE)

    asyncio.run(scenario())


def test_a_quarrel_gets_slower(kube: Cluster) -> None:
    """Somebody else who writes the definition whenever we have must not keep the API server busy."""

    async def quarrel(it: World, seconds: float) -> int:
        written = 0
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = await it.network("net")
            if found is not None and found.spec.config != "{}":
                try:
                    await it.store.update(replace(found, spec=NetworkSpec(config="{}")))
                except (ConflictError, NotFoundError):
                    continue
                written += 1
            await asyncio.sleep(0.01)
        return written

    async def scenario() -> None:
        async with world(kube) as it:
            await it.config("net", IPVLAN)
            await until(lambda: it.network("net"), AT_ONCE)
            count = await quarrel(it, 4.0)
            assert 5 <= count <= 8, count

    asyncio.run(scenario())


def test_a_new_leader_finds_everything(kube: Cluster) -> None:
    async def scenario() -> None:
        async with world(kube, None) as it:
            await it.config("net", IPVLAN)
            async with leading(it.store, multus):
                await until(lambda: it.network("net"), AT_ONCE)
            await it.store.delete(NetworkAttachmentDefinition, "net", it.namespace)
            async with leading(it.store, multus):
                await until(lambda: it.network("net"), AT_ONCE)

    asyncio.run(scenario())


def test_a_kind_that_may_not_be_listed_is_looked_for_again(kube: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rights come after the controller, as its new role does in an upgrade."""
    monkeypatch.setattr(caches, "UNSERVED_SECONDS", 0.2)

    async def scenario() -> None:
        store = await KubeStore.open(KubeSettings(kubeconfig=kube.kubeconfig("stranger")))
        kept = caches.Caches(store)
        networks = kept.optional(NetworkAttachmentDefinition)
        task = asyncio.create_task(kept.run())
        try:
            async with asyncio.timeout(10):
                await kept.synced()
                assert not networks.served
                kube.kubectl(
                    "create", "clusterrolebinding", "stranger", "--clusterrole=cluster-admin", "--user=stranger"
                )
                await networks.informer.synced()
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await store.close()

    asyncio.run(scenario())


@pytest.mark.upstream("M00008")
def test_the_definition_goes_with_its_configuration(kube: Cluster) -> None:
    async def scenario() -> None:
        async with world(kube) as it:
            await it.config("net", IPVLAN)
            await until(lambda: it.network("net"), AT_ONCE)
            await it.store.delete(MultusConfig, "net", it.namespace)
            await becomes(lambda: it.network("net"), None, COLLECTED)

    asyncio.run(scenario())


@pytest.fixture
def no_networks(kube: Cluster) -> Iterator[None]:
    """The server's definition of them is away; and there again for other modules."""
    kube.kubectl("delete", "-f", NETWORKS, timeout=60)
    yield
    kube.apply_crds()


@pytest.mark.usefixtures("no_networks")
def test_without_the_definition_of_networks_nothing_else_stops(kube: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multus is installed after the controller, and removed and installed again while it runs."""
    monkeypatch.setattr(caches, "UNSERVED_SECONDS", 0.3)

    async def scenario() -> None:
        async with world(kube) as it:
            await it.config("net", IPVLAN)
            for _ in range(2):
                await it.kubectl("apply", "--server-side", "-f", NETWORKS)
                await until(lambda: it.network("net"))
                await it.kubectl("delete", "-f", NETWORKS)

                async def gone() -> bool:
                    try:
                        await it.store.list(NetworkAttachmentDefinition)
                    except NotServedError:
                        return True
                    return False

                await until(gone)
                await asyncio.sleep(0.5)

    asyncio.run(scenario())
