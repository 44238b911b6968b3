"""Routes of pods with several NICs, and the infrastructure provider."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from api.claim import Claim, ClaimSpec, Provided
from api.core import Pod
from api.meta import ObjectMeta
from lab.kube.cluster import Cluster
from plugins.errors import ExhaustedError, InvalidConfigError, PodGoneError, ProviderError, TryAgainLaterError
from plugins.ipam.provider import Provider
from plugins.ipam.settings import IpamSettings
from store.errors import UnavailableError, UncertainError
from store.provider import ALLOCATE, RELEASE, ProviderClient, ProviderSettings
from tests.integration.fake_provider import FakeProvider, fake_provider
from tests.integration.ipam_rig import addresses, until
from tests.kube.ipam_pods import IPPOOLS, NETWORKS, World, pools, world
from tests.kube.test_ipam_retained import settled

ROUTES = "ipam.spidernet.io/routes"
OURS = "/apis/spiderpool.spidernet.io/v2beta1"


@pytest.mark.upstream("A00011")
def test_the_pods_routes_go_to_the_nic_that_reaches_their_gateway(
    kube: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            a = await there.pool("a", 10, 19, gateway=there.address(1))
            b = await there.pool("b", 30, 39, gateway=there.address(2))
            c = await there.pool("c", 16, 32, v6=True)
            items = [
                {"interface": "eth0", "ipv4": [a]},
                {"interface": "net1", "ipv4": [b], "ipv6": [c], "cleangateway": True},
            ]
            said = [
                {"dst": "10.0.0.0/8", "gw": there.address(7)},
                {"dst": "fd00::/8", "gw": there.address(7, v6=True)},
                {"dst": "192.168.0.0/16", "gw": "192.0.2.1"},
            ]
            annotations = {IPPOOLS: json.dumps(items), NETWORKS: "kube-system/x", ROUTES: json.dumps(said)}
            pod = await there.pod("a", annotations)
            eth0 = {"dst": "10.0.0.0/8", "gw": there.address(7)}, {"dst": "0.0.0.0/0", "gw": there.address(1)}
            net1 = [{"dst": "fd00::/8", "gw": there.address(7, v6=True)}]
            for _ in range(2):
                assert (await ipam.add(pod.call()))["routes"] == list(eth0)
                assert (await ipam.add(pod.call(nic="net1")))["routes"] == net1
            await settled(ipam)
            endpoint = await there.endpoint("a")
            assert endpoint is not None
            assert endpoint.status is not None
            first, second = endpoint.status.current.ips
            assert [(route.dst, first.clean_gateway) for route in first.routes or ()] == [("10.0.0.0/8", False)]
            assert [(route.dst, second.clean_gateway) for route in second.routes or ()] == [("fd00::/8", True)]

    with caplog.at_level("WARNING"):
        asyncio.run(main())
    told = [message for message in caplog.messages if "192.0.2.1" in message]
    assert len(told) == 2, "once for each ADD of the last NIC"
    assert all("192.168.0.0/16 via 192.0.2.1" in message and "10.0.0.0/8" not in message for message in told)


@pytest.mark.upstream("E00009")
def test_each_nic_gets_the_families_that_are_named_for_it(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            v4, v6 = await there.pool("v4", 10, 19), await there.pool("v6", 16, 32, v6=True)
            items = [{"interface": "eth0", "ipv4": [v4]}, {"interface": "net1", "ipv6": [v6]}]
            pod = await there.pod("a", {IPPOOLS: json.dumps(items), NETWORKS: "kube-system/x"})
            eth0, net1 = addresses(await ipam.add(pod.call())), addresses(await ipam.add(pod.call(nic="net1")))
            assert [len(eth0), len(net1)] == [1, 1]
            assert "." in eth0[0]
            assert ":" in net1[0]
            assert {claim.spec.set_size for claim in (await there.claims()).values()} == {1}

    asyncio.run(main())


def test_a_dead_pod_gets_nothing(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            pod = await there.pod("a", pools(await there.pool("v4", 10, 19)))
            status = {"status": {"phase": "Succeeded"}}
            await there.ask("PATCH", there.path("/api/v1", "pods", "a/status"), status)
            ended = await there.pod("b", pools(there.pool_name("v4")))
            await there.delete_pod(ended, seconds=30)

            async def seen() -> bool:
                there_is: Pod | None = ipam._pods._pods.get("b", there.namespace)  # type: ignore[attr-defined]
                return there_is is not None and there_is.metadata.deletion_timestamp is not None

            await until(seen)
            with pytest.raises(PodGoneError, match=f"dead Pod {there.namespace}/b, we cannot allocate IP addresses"):
                await ipam.add(ended.call())
            await ipam.add(pod.call())  # restartPolicy Always: it runs again
            assert len(await there.claims()) == 1

    asyncio.run(main())


# The infrastructure provider


@asynccontextmanager
async def bound_to(there: World, fake: FakeProvider, **settings: Any) -> AsyncIterator[Any]:
    """An Ipam on node1 with that provider, and the network `net1` of a pod in its hands."""
    spec = {"cniType": "vlan", "vlan": {"master": ["lo"], "vlanMode": "auto"}}
    await there.ask("POST", there.path(OURS, "spidermultusconfigs"), _multus("auto", spec))
    spec = {"cniType": "vlan", "vlan": {"master": ["lo"], "vlanID": 7}}
    await there.ask("POST", there.path(OURS, "spidermultusconfigs"), _multus("manual", spec))
    client = ProviderClient(ProviderSettings(server_url=fake.url, **settings))
    try:
        provider = Provider(there.store, IpamSettings(), client)
        async with there.node(settings=IpamSettings(partial_grace=0.4), provider=provider) as ipam:
            yield ipam
    finally:
        await client.close()


def _multus(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    kind = {"apiVersion": "spiderpool.spidernet.io/v2beta1", "kind": "SpiderMultusConfig"}
    return {**kind, "metadata": {"name": name}, "spec": spec}


def test_the_provider_gives_mac_and_vlan_and_is_told_of_the_release(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there, fake_provider() as fake, bound_to(there, fake) as ipam:
            v4 = await there.pool("v4", 10, 99)
            pod = await there.pod("a", pools(v4) | {NETWORKS: "auto,manual"})
            await ipam.add(pod.call())
            given = await ipam.attach(pod.call(nic="net1"))
            await ipam.add(pod.call(nic="net2"))
            assert (given.entry.mac, given.entry.vlan) == ("fa:16:3e:00:00:00", 100)
            ((path, body),) = fake.requests
            (address,) = addresses({"ips": [{"address": given.result.ips[0].address}]})
            subnet = there.address(0) + "/24"
            item = {"ipAddress": address, "subnet": subnet, "parentNicMac": "00:00:00:00:00:00"}
            names = {"podName": "a", "podNamespace": there.namespace, "podUID": pod.uid, "nodeName": "node1"}
            assert (path, body) == (ALLOCATE, {**names, "iaasIPsAllocationRequest": [item]})
            assert 0 < fake.budgets[0] <= 50_000
            assert (await ipam.attach(pod.call(nic="net1"))).entry == given.entry
            assert len(fake.requests) == 1
            await settled(ipam)
            endpoint = await there.endpoint("a")
            assert endpoint is not None
            assert endpoint.status is not None
            assert [(e.mac, e.vlan) for e in endpoint.status.current.ips] == [
                (None, 0),
                ("fa:16:3e:00:00:00", 100),
                (None, 0),
            ]

            await there.delete_pod(pod)
            fake.failing = {RELEASE}
            with pytest.raises(ProviderError, match="HTTP 503 no capacity"):
                await ipam.delete(pod.call("DEL", nic="net1"))
            assert address in await there.claims()
            fake.failing.clear()
            for nic in ("net2", "net1", "eth0"):
                await ipam.delete(pod.call("DEL", nic=nic))
            assert not await there.claims()
            assert not fake.bound
            assert fake.requests[-1] == (RELEASE, {**names, **item})

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["refuses", "hangs"])
def test_an_add_that_the_provider_fails_is_undone(kube: Cluster, fault: str) -> None:
    """Also when it hangs: then it may have bound the address, so it is told of the release before that is free."""

    async def main() -> None:
        async with (
            world(kube) as there,
            fake_provider() as fake,
            bound_to(there, fake, http_request_timeout=0.3) as ipam,
        ):
            v4 = await there.pool("v4", 10, 10)
            pod = await there.pod("a", pools(v4) | {NETWORKS: "auto"})
            fake.hanging, fake.failing = fault == "hangs", {ALLOCATE} if fault == "refuses" else set()
            with pytest.raises(ProviderError, match=r"does not answer|HTTP 503 no capacity"):
                await ipam.add(pod.call(nic="net1"))
            if fault == "hangs":
                assert list(await there.claims()) == [there.address(10)], "nobody else gets it"
                other = await there.pod("b", pools(v4) | {NETWORKS: "auto"})
                with pytest.raises(ExhaustedError):
                    await ipam.add(other.call(nic="net1"))
            fake.hanging = False
            await until(lambda: nothing(there))
            assert fake.requests[-1][0] == RELEASE
            fake.failing.clear()
            assert (await ipam.attach(pod.call(nic="net1"))).entry.vlan == 100

    asyncio.run(main())


def test_a_crash_after_the_provider_was_asked(kube: Cluster) -> None:
    """The claim says that it was to be asked: the DEL tells it, though no answer was written."""

    async def main() -> None:
        async with world(kube) as there, fake_provider() as fake:
            v4 = await there.pool("v4", 10, 10)
            pod = await there.pod("a", pools(v4) | {NETWORKS: "auto"})
            async with bound_to(there, fake) as ipam:

                async def fail(_: Any) -> None:
                    raise UncertainError("the agent dies here")

                there.store.before = {("update", Claim): fail, ("delete", Claim): fail}
                with pytest.raises(TryAgainLaterError):
                    await ipam.add(pod.call(nic="net1"))
            there.store.before.clear()
            (claim,) = (await there.claims()).values()
            assert claim.spec.provided is not None
            assert not claim.spec.provided.mac
            fake.bound = {claim.spec.address: {}}
            await there.delete_pod(pod)
            client = ProviderClient(ProviderSettings(server_url=fake.url))
            async with there.node(provider=Provider(there.store, IpamSettings(), client)) as ipam:
                await ipam.delete(pod.call("DEL", nic="net1"))
            await client.close()
            assert not await there.claims()
            assert not fake.bound

    asyncio.run(main())


async def nothing(there: World) -> bool:
    return not await there.claims()


def test_tls_is_verified_unless_switched_off(kube: Cluster) -> None:
    """The API server stands in for the provider: its certificate is of an authority that nobody else knows."""

    async def told(**settings: Any) -> str:
        client = ProviderClient(ProviderSettings(server_url=kube.place.url, **settings))
        spec = ClaimSpec(
            address="10.0.0.1", ip_version=4, pool="p", provided=Provided(subnet="10.0.0.0/24", parent_mac="")
        )
        try:
            await client.release(Claim(metadata=ObjectMeta(name="10.0.0.1"), spec=spec))
        except UnavailableError as error:
            return str(error)
        finally:
            await client.close()
        return ""

    async def main() -> None:
        assert "certificate verify failed" in await told()
        assert "refuses: HTTP 40" in await told(verify_tls=False)
        assert "refuses: HTTP 40" in await told(ca_file=f"{kube.place.pki}/ca.crt")

    asyncio.run(main())


def test_wrong_routes_are_refused(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            v4 = await there.pool("v4", 10, 19)
            pod = await there.pod("a", pools(v4) | {ROUTES: '[{"dst":"10.0.0.0/8","gw":"fd00::1"}]'})
            with pytest.raises(InvalidConfigError, match=r"routes: \[0\].gw"):
                await ipam.add(pod.call())
            assert not await there.claims()

    asyncio.run(main())
