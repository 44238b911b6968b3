"""The SpiderCoordinator's status follows each of its sources, on a real API server. Calico's and Cilium's kinds are
definitions of the test's own with the members that are read."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from api.coordinator import Coordinator, CoordinatorStatus, CoordinatorUnusableError, in_force, node_config
from api.meta import ObjectMeta
from api.validate.coordinator import default_coordinator
from controller import caches
from controller.coordinator.settings import CoordinatorStatusSettings
from lab.kube.cluster import Cluster
from lab.layout import LabError
from store.errors import InvalidError, NotFoundError
from tests.kube.multus_rig import World, becomes, coordinator, until, world

FULL_SPEC: dict[str, Any] = {
    "mode": "auto",
    "podCIDRType": "auto",
    "hijackCIDR": ["169.254.25.10", "169.254.0.0/16"],
    "policyRoutes": [{"dst": "10.200.0.5", "gw": "172.30.40.1"}],
    "podMACPrefix": "0a:1b",
    "tunePodRoutes": True,
    "podDefaultRouteNIC": "eth0",
    "hostRuleTable": 500,
    "podRPFilter": 0,
    "txQueueLen": 0,
    "vethLinkAddress": "169.254.100.1",
    "vethMTU": 1500,
}
AT_ONCE = 5.0
"""Seconds: by a watch and not by the resync."""
KUBEADM = "networking:\n  podSubnet: 10.244.0.0/16,fd00:10:244::/56\n  serviceSubnet: 10.96.0.0/12\n"


@pytest.fixture(autouse=True)
def looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "UNSERVED_SECONDS", 0.2)


def settings(folder: Path, **members: Any) -> CoordinatorStatusSettings:
    return CoordinatorStatusSettings(cni_directory=str(folder), **members)


def config_map(name: str, **data: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "kube-system"}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def manager(*flags: str) -> dict[str, Any]:
    """A fake of what kubeadm runs: it stays pending."""
    metadata = {"name": "fake-kcm", "namespace": "kube-system", "labels": {"component": "kube-controller-manager"}}
    container = {"name": "c", "image": "lab.invalid/kcm", "command": ["kube-controller-manager", *flags]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container]}}


def definition(group: str, version: str, kind: str, plural: str) -> dict[str, Any]:
    """A definition with free members, standing for another project's."""
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Cluster",
            "names": {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()},
            "versions": [{"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
        },
    }


CALICO = definition("crd.projectcalico.org", "v1", "IPPool", "ippools")
CILIUM = definition("cilium.io", "v2alpha1", "CiliumPodIPPool", "ciliumpodippools")


def of(fake: dict[str, Any], name: str, **spec: Any) -> dict[str, Any]:
    """An object of a definition."""
    body = fake["spec"]
    api_version = f"{body['group']}/{body['versions'][0]['name']}"
    return {"apiVersion": api_version, "kind": body["names"]["kind"], "metadata": {"name": name}, "spec": spec}


class Sources:
    """What a test does to the sources, and what comes of it."""

    def __init__(self, it: World) -> None:
        self.it = it
        self.made: list[dict[str, Any]] = []

    async def apply(self, *documents: dict[str, Any]) -> None:
        self.made += documents
        items = {"apiVersion": "v1", "kind": "List", "items": list(documents)}
        await self.it.kubectl("apply", "-f", "-", stdin=json.dumps(items))

    async def delete(self, *documents: dict[str, Any]) -> None:
        items = {"apiVersion": "v1", "kind": "List", "items": list(documents)}
        await self.it.kubectl(
            "delete", "--ignore-not-found", "--grace-period=0", "--force", "-f", "-", stdin=json.dumps(items)
        )

    async def coordinator(self, pod_cidr_type: str) -> None:
        spec = {"podCIDRType": pod_cidr_type}
        document = msgspec.convert({"metadata": {"name": "default"}, "spec": spec}, Coordinator)
        await self.it.store.create(default_coordinator(document))

    async def type(self, pod_cidr_type: str) -> None:
        await self.it.patch("scc", "default", {"spec": {"podCIDRType": pod_cidr_type}})

    async def status(self) -> CoordinatorStatus | None:
        return (await self.it.store.get(Coordinator, "default")).status

    async def pods(self) -> list[str] | None:
        status = await self.status()
        return status.overlay_pod_cidr if status and status.phase == "Synced" else None

    async def services(self) -> list[str] | None:
        status = await self.status()
        return status.service_cidr if status and status.phase == "Synced" else None

    async def reason(self) -> str:
        """Why it is not ready; then it names no networks either."""
        status = await self.status()
        if status is None or status.phase != "NotReady":
            return ""
        assert (status.overlay_pod_cidr, status.service_cidr) == ([], [])
        return status.reason or ""

    async def unready(self, text: str, seconds: float = AT_ONCE) -> None:
        async def says() -> bool:
            return text in await self.reason()

        await until(says, seconds, text)

    async def clean(self) -> None:
        with suppress(LabError):
            await self.it.patch("scc", "default", {"metadata": {"finalizers": None}})
        with suppress(NotFoundError):
            await self.it.store.delete(Coordinator, "default")
        # objects before the definitions of their kinds
        for document in reversed(self.made):
            with suppress(LabError):
                await self.delete(document)


@pytest.mark.upstream("V00006", "V00009", "V00010", "V00011")
def test_the_clusters_own_networks(kube: Cluster, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(kube, coordinator(settings(tmp_path))) as it:
            all_of = Sources(it)
            try:
                await all_of.coordinator("cluster")
                await all_of.unready("No kube-controller-manager pod found, unable to get clusterCIDR")
                assert await until(lambda: it.events("default", "ClusterNotReady", "default"))
                with pytest.raises(CoordinatorUnusableError, match="default no ready"):
                    in_force((await it.store.list(Coordinator)).items)

                await all_of.apply(manager("--cluster-cidr=10.1.0.0/16,fd01::/56"))
                await becomes(all_of.pods, ["10.1.0.0/16", "fd01::/56"], AT_ONCE)
                kubeadm = config_map("kubeadm-config", ClusterConfiguration=KUBEADM)
                await all_of.apply(kubeadm)
                await becomes(all_of.pods, ["10.244.0.0/16", "fd00:10:244::/56"], AT_ONCE)
                there = await all_of.services()
                assert there, "the API server makes a ServiceCIDR"

                answer = node_config(in_force((await it.store.list(Coordinator)).items))
                assert (answer["overlayPodCIDR"], answer["serviceCIDR"]) == (
                    ["10.244.0.0/16", "fd00:10:244::/56"],
                    there,
                )

                further = {
                    "apiVersion": "networking.k8s.io/v1",
                    "kind": "ServiceCIDR",
                    "metadata": {"name": "further"},
                    "spec": {"cidrs": ["10.77.0.0/24"]},
                }
                await all_of.apply(further)
                await becomes(all_of.services, [*there, "10.77.0.0/24"], AT_ONCE)
                await all_of.delete(further)
                await becomes(all_of.services, there)

                await all_of.delete(kubeadm)
                await becomes(all_of.pods, ["10.1.0.0/16", "fd01::/56"], AT_ONCE)
                await all_of.delete(manager())
                await all_of.unready("No kube-controller-manager pod found")
                await all_of.type("none")
                await becomes(all_of.pods, [], AT_ONCE)
                assert await all_of.services() == there
                assert await until(lambda: it.events("default", "PodCIDRTypeChanged", "default"))
            finally:
                await all_of.clean()

    asyncio.run(scenario())


@pytest.mark.upstream("V00003", "V00006")
def test_calicos_networks(kube: Cluster, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(kube, coordinator(settings(tmp_path, resync=1.0))) as it:
            all_of = Sources(it)
            try:
                await all_of.coordinator("calico")
                await all_of.unready("is Calico installed")
                await all_of.apply(CALICO)
                await it.kubectl("wait", "--for=condition=Established", "crd/ippools.crd.projectcalico.org")
                await becomes(all_of.pods, [])
                one = of(CALICO, "one", cidr="10.21.0.0/16", ipipMode="Always")
                await all_of.apply(one)
                await becomes(all_of.pods, ["10.21.0.0/16"], AT_ONCE)
                off = of(CALICO, "off", cidr="1.0.0.0/8", disabled=True)
                await all_of.apply(of(CALICO, "two", cidr="fd21::/64"), off)
                await becomes(all_of.pods, ["10.21.0.0/16", "fd21::/64"], AT_ONCE)
                await all_of.delete(one)
                await becomes(all_of.pods, ["fd21::/64"], AT_ONCE)
                await all_of.delete(CALICO)
                await all_of.unready("is Calico installed", 20.0)
            finally:
                await all_of.clean()

    asyncio.run(scenario())


@pytest.mark.upstream("V00004", "V00006")
def test_ciliums_networks(kube: Cluster, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(kube, coordinator(settings(tmp_path, resync=1.0))) as it:
            all_of = Sources(it)

            def cilium(**data: str) -> dict[str, Any]:
                return config_map("cilium-config", **{key.replace("_", "-"): value for key, value in data.items()})

            try:
                await all_of.coordinator("cilium")
                await all_of.unready("Cilium's ConfigMap is not there")
                assert await until(lambda: it.events("default", "CiliumNotReady", "default"))
                pool = {"cluster_pool_ipv4_cidr": "10.31.0.0/16", "cluster_pool_ipv6_cidr": "fd31::/104"}
                await all_of.apply(cilium(ipam="cluster-pool", **pool))
                await becomes(all_of.pods, ["10.31.0.0/16", "fd31::/104"], AT_ONCE)
                await all_of.apply(cilium(ipam="multi-pool"))
                await all_of.unready("multi-pool needs")
                await all_of.apply(CILIUM)
                await it.kubectl("wait", "--for=condition=Established", "crd/ciliumpodippools.cilium.io")
                await all_of.apply(of(CILIUM, "default", ipv4={"cidrs": ["10.41.0.0/16"], "maskSize": 24}))
                await becomes(all_of.pods, ["10.41.0.0/16"])
                both = {"ipv4": {"cidrs": ["10.42.0.0/16"]}, "ipv6": {"cidrs": ["fd42::/64"]}}
                await all_of.apply(of(CILIUM, "default", **both))
                await becomes(all_of.pods, ["10.42.0.0/16", "fd42::/64"], AT_ONCE)
                kubeadm = config_map("kubeadm-config", ClusterConfiguration=KUBEADM)
                await all_of.apply(kubeadm, cilium(ipam="kubernetes"))
                await becomes(all_of.pods, ["10.244.0.0/16", "fd00:10:244::/56"], AT_ONCE)
                await all_of.apply(cilium(ipam="eni"))
                await all_of.unready("unsupported CIlium IPAM mode: eni")
            finally:
                await all_of.clean()

    asyncio.run(scenario())


@pytest.mark.upstream("V00001", "V00002", "V00005")
def test_auto_looks_at_the_nodes_cni_configuration(kube: Cluster, tmp_path: Path) -> None:
    """The directory is watched: the long resync plays no part."""

    async def scenario() -> None:
        async with world(kube, coordinator(settings(tmp_path, resync=300.0))) as it:
            all_of = Sources(it)
            try:
                await all_of.apply(config_map("kubeadm-config", ClusterConfiguration=KUBEADM))
                await all_of.coordinator("auto")
                await becomes(all_of.pods, [], AT_ONCE)
                (tmp_path / "00-multus.conf").write_text('{"name":"multus-cni-network","type":"multus"}')
                flannel = tmp_path / "10-flannel.conflist"
                flannel.write_text('{"name":"flannel","plugins":[]}')
                await becomes(all_of.pods, ["10.244.0.0/16", "fd00:10:244::/56"], AT_ONCE)
                flannel.unlink()
                await becomes(all_of.pods, [], AT_ONCE)
                (tmp_path / "10-calico.conflist").write_text('{"name":"k8s-pod-network"}')
                await all_of.unready("is Calico installed")
            finally:
                await all_of.clean()

    asyncio.run(scenario())


def test_an_unreadable_directory_and_a_foreign_name(kube: Cluster, tmp_path: Path) -> None:
    async def scenario() -> None:
        folder = tmp_path / "absent"
        async with world(kube, coordinator(settings(folder, name="other", resync=1.0))) as it:
            all_of = Sources(it)
            try:
                await all_of.coordinator("auto")
                spec = default_coordinator(
                    msgspec.convert({"metadata": {"name": "other"}, "spec": {"podCIDRType": "auto"}}, Coordinator)
                )
                await it.store.create(spec)

                async def other() -> CoordinatorStatus | None:
                    return (await it.store.get(Coordinator, "other")).status

                status = await until(other, AT_ONCE)
                assert status.phase == "NotReady"
                assert "cannot be listed" in (status.reason or "")
                assert await all_of.status() is None, "only the one that is configured is kept"
                folder.mkdir()

                async def synced() -> bool:
                    found = await other()
                    return found is not None and found.phase == "Synced"

                await until(synced, 5.0)
                # whichever name: one that is deleted is let go
                for name in ("other", "default"):
                    await it.store.delete(Coordinator, name)

                async def gone() -> bool:
                    return not (await it.store.list(Coordinator)).items

                await until(gone, AT_ONCE)
            finally:
                with suppress(NotFoundError):
                    await it.store.delete(Coordinator, "other")
                await all_of.clean()

    asyncio.run(scenario())


def test_the_servers_schema(kube: Cluster) -> None:
    async def scenario() -> None:
        async with world(kube, None) as it:
            try:
                made = await it.store.create(
                    msgspec.convert({"metadata": {"name": "default"}, "spec": FULL_SPEC}, Coordinator)
                )
                assert msgspec.to_builtins(made.spec) == FULL_SPEC
                bare = await it.store.create(Coordinator(metadata=ObjectMeta(name="bare")))
                assert msgspec.to_builtins(bare.spec) == {
                    "mode": "auto",
                    "tunePodRoutes": True,
                    "hostRuleTable": 500,
                    "podRPFilter": 0,
                    "txQueueLen": 0,
                }
                for member, value in (("mode", "disable"), ("podCIDRType", "flannel"), ("vethMTU", 0)):
                    raw = {"metadata": {"name": "refused"}, "spec": {member: value}}
                    with pytest.raises((InvalidError, LabError), match=f"spec.{member}"):
                        await it.kubectl("create", "-f", "-", stdin=json.dumps(of_coordinator(raw)))
            finally:
                for name in ("default", "bare"):
                    with suppress(NotFoundError):
                        await it.store.delete(Coordinator, name)

    asyncio.run(scenario())


def of_coordinator(raw: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "spiderpool.spidernet.io/v2beta1", "kind": "SpiderCoordinator"} | raw
