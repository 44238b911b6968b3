"""The vlan plugin as far as any kernel goes; with VLANs: tests/vm/guest/test_vlan.py.

A macvlan of the same master stands in for the VLAN where a test says `stand_in`: everything is real but the kind of the
link and its id.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from plugins.errors import (
    AddressConflictError,
    CheckFailedError,
    CniError,
    ExhaustedError,
    InvalidConfigError,
    InvalidEnvironmentError,
    NotAvailableError,
    ProviderError,
    WiringError,
)
from plugins.ipam.settings import IpamSettings
from plugins.net import rtmaster, rtroute
from plugins.net.netlink import Message, attribute, u32_attribute
from plugins.vlan.plan import temporary_name
from plugins.vlan.vlan import Vlan
from store.provider import ALLOCATE, RELEASE
from tests.integration.fake_provider import fake_provider
from tests.integration.installation import ROOT, Installation, netns
from tests.integration.ipam_rig import addresses, claims, pool
from tests.integration.vlan_rig import Place, PodNs, ip, place, provided, serving

_beside, _work = rtroute.route_beside, Vlan._work
AUTO: Any = {"vlanMode": "auto", "vlanId": None}
DETECT = IpamSettings(enable_ip_conflict_detection=True, enable_gateway_detection=True)


@pytest.fixture
def there() -> Iterator[Place]:
    with place() as made:
        yield made


@pytest.fixture
def stand_in() -> Iterator[None]:
    def macvlan(
        name: str, parent: int, vlan_id: int, group: int, mtu: int = 0, *, mac: bytes | None = None, netns_fd: int = -1
    ) -> Message:
        real = rtmaster_vlan(name, parent, vlan_id, group, mtu, mac=mac, netns_fd=netns_fd)
        kind = attribute(1, b"macvlan") + attribute(2, u32_attribute(1, 4))  # IFLA_MACVLAN_MODE bridge
        return real._replace(body=_without_info(real.body) + attribute(18, kind))

    rtmaster_vlan = rtmaster.vlan
    with (
        mock.patch("plugins.vlan.act.rtmaster.vlan", macvlan),
        mock.patch("plugins.vlan.act.KIND", "macvlan"),
        mock.patch("plugins.vlan.plan.KIND", "macvlan"),
    ):
        yield


def _without_info(body: bytes) -> bytes:
    """An RTM_NEWLINK without what it says of the link's kind, which is its last attribute."""
    offset = 16
    while offset < len(body):
        size, kind = int.from_bytes(body[offset : offset + 2], "little"), body[offset + 2]
        if kind == 18:
            return body[:offset]
        offset += (size + 3) & ~3
    raise AssertionError(body)


async def pools(store: Any, **spec: Any) -> None:
    await pool(store, "v4", "10.6.0.10-10.6.0.11", gateway="10.6.0.1", **spec)
    await pool(store, "v6", "fd06::10-fd06::11", gateway="fd06::1")


def told(pod: PodNs) -> dict[str, int]:
    """The addresses on the pod's NIC with the lengths of their networks, link-local ones apart."""
    found = pod.link()["addr_info"]
    return {own["local"]: own["prefixlen"] for own in found if own["scope"] == "global"}


async def refused(work: Any, error: type[CniError], text: str) -> None:
    with pytest.raises(error) as raised:
        await work
    assert text in str(raised.value), raised.value


@pytest.mark.usefixtures("stand_in")
def test_a_nic_comes_and_goes(tmp_path: Path, there: Place) -> None:
    """The node has an eth0 of its own, which the kernel takes for the pod's unless another name is used on the way."""
    pod = there.pod()

    async def main() -> None:
        async with serving(tmp_path) as (plugin, store):
            await pools(store)
            name_servers = {"nameservers": ["10.6.0.53"]}
            result = await plugin.add(pod.call(v6=True, mtu=1400, dns=name_servers))
            link = pod.link()
            assert (link["mtu"], "UP" in link["flags"], link["group"]) == (1400, True, "1397770564")
            assert told(pod) == dict(zip(addresses(result), (16, 64), strict=True))
            early = [own for own in link["addr_info"] if own["scope"] == "global" and own.get("tentative")]
            assert not early, "usable at once"
            assert link["addr_info"][0]["broadcast"] == "10.6.255.255"
            assert result["interfaces"] == [
                {"name": "eth0", "mac": link["address"], "sandbox": f"/run/netns/{pod.name}"}
            ]
            assert [(ip["interface"], ip["gateway"]) for ip in result["ips"]] == [(0, "10.6.0.1"), (0, "fd06::1")]
            assert (result["dns"], result["cniVersion"]) == (name_servers, "1.0.0")
            assert (pod.routes(), pod.routes("-6")) == ([("default", "10.6.0.1")], [("default", "fd06::1")])
            check = pod.call("CHECK", v6=True, mtu=1400, prevResult=result)
            await plugin.check(check)

            again = await plugin.add(pod.call(v6=True, mtu=1400, dns=name_servers))
            assert addresses(again) == addresses(result)
            assert pod.link()["ifindex"] != link["ifindex"], "made anew"
            ip("-n", pod.name, "route", "delete", "default")
            ip("-n", pod.name, "link", "set", "eth0", "mtu", "1300")
            await refused(
                plugin.check(pod.call("CHECK", v6=True, mtu=1400, prevResult=again)),
                CheckFailedError,
                "eth0: MTU 1300, not 1400; route 0.0.0.0/0 via 10.6.0.1: is missing",
            )
            for _ in range(2):
                await plugin.delete(pod.call("DEL", v6=True))
                assert (pod.links(), await claims(store)) == ([], {})
            await refused(plugin.check(check), CheckFailedError, "no address is claimed")

    there.run(main)


@pytest.mark.usefixtures("stand_in")
def test_what_a_killed_agent_left_is_replaced_and_what_others_made_is_not(tmp_path: Path, there: Place) -> None:
    pod = there.pod()
    name = temporary_name(pod.call().container_id, "eth0")

    async def main() -> None:
        async with serving(tmp_path) as (plugin, store):
            await pools(store)
            with (
                mock.patch("plugins.vlan.act.rtlink.link_rename", side_effect=SystemError),
                mock.patch.object(plugin, "_undo", mock.AsyncMock()),
                pytest.raises(SystemError),
            ):
                await plugin.add(pod.call())
            assert pod.links() == [name]
            await plugin.add(pod.call())
            assert pod.links() == ["eth0"]
            await plugin.delete(pod.call("DEL"))
            ip("-n", pod.name, "link", "add", "eth0", "type", "veth", "peer", "name", "else")
            await refused(plugin.add(pod.call()), InvalidEnvironmentError, "a veth link that somebody else made")
            await plugin.delete(pod.call("DEL"))
            assert sorted(pod.links()) == ["else", "eth0"]
            assert not await claims(store)

    there.run(main)


@pytest.mark.usefixtures("stand_in")
def test_a_failed_add_leaves_nothing(tmp_path: Path, there: Place) -> None:
    pod, other = there.pod(), there.pod()

    async def main() -> None:
        async with serving(tmp_path) as (plugin, store):
            await pools(store, routes=[{"dst": "192.168.0.0/16", "gw": "10.6.0.9"}])
            for what, add in (
                ("master: eth9", pod.call(master="eth9")),
                ("mtu: 9000, allowed: 0 to 1500, that of eth0", pod.call(mtu=9000)),
            ):
                await refused(plugin.add(add), InvalidConfigError, what)
            ip("-n", there.node, "link", "set", "eth0", "down")
            await refused(plugin.add(pod.call()), WiringError, "the master is down")
            await refused(plugin.status(pod.call("STATUS")), NotAvailableError, "the master is down")
            ip("-n", there.node, "link", "set", "eth0", "up")
            await plugin.status(pod.call("STATUS"))

            # The kernel refuses the last message of all.
            with mock.patch("plugins.vlan.act.rtroute.route_beside", side_effect=_unreachable):
                await refused(plugin.add(pod.call()), WiringError, "via 10.77.7.7")
            assert (pod.links(), await claims(store)) == ([], {})

            await plugin.add(other.call())
            with mock.patch("tests.integration.test_vlan.Vlan._work", autospec=True, side_effect=_hang_second()):
                task = asyncio.create_task(plugin.add(pod.call()))
                async with asyncio.timeout(10):
                    while len(await claims(store)) < 2:  # noqa: ASYNC110 - no event tells
                        await asyncio.sleep(0.01)
                task.cancel()
                await asyncio.wait([task])
            assert task.cancelled()
            assert (pod.links(), len(await claims(store))) == ([], 1)

            third = there.pod()
            await plugin.add(pod.call())
            await refused(plugin.add(third.call()), ExhaustedError, "all IP addresses used out")
            assert third.links() == []
            assert pod.routes() == [("default", "10.6.0.1"), ("192.168.0.0/16", "10.6.0.9")]

    there.run(main)


def _unreachable(route: Any) -> Message:
    return _beside(route._replace(gateway=type(route.gateway)("10.77.7.7")))


def _hang_second() -> Any:
    """`_work` whose second call, after IPAM's, never ends by itself; those that undo go through."""
    calls = 0

    async def work(self: Vlan, what: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            await asyncio.Event().wait()
        return await _work(self, what)

    return work


@pytest.mark.usefixtures("stand_in")
def test_a_further_nic_on_a_link_of_the_pods_own(tmp_path: Path, there: Place) -> None:
    """Its default route stands beside the first NIC's, as the reference plugin leaves it to the coordinator."""
    pod = there.pod()
    ip("-n", pod.name, "link", "add", "uplink", "type", "veth", "peer", "name", "far")
    for name in ("uplink", "far"):
        ip("-n", pod.name, "link", "set", name, "up")

    async def main() -> None:
        async with serving(tmp_path) as (plugin, store):
            await pools(store)
            inside: Any = {"nic": "net1", "master": "uplink", "linkInContainer": True, "v6": True}
            await refused(
                plugin.add(pod.call(**inside | {"master": "eth0"})), InvalidConfigError, "not found on the pod"
            )
            await plugin.add(pod.call(v6=True))
            result = await plugin.add(pod.call(**inside))
            assert pod.link("net1")["link"] == "uplink"
            assert pod.routes() == [("default", "10.6.0.1")] * 2
            await plugin.check(pod.call("CHECK", **inside, prevResult=result))
            await plugin.delete(pod.call("DEL", **inside))
            assert (pod.link("net1"), len(await claims(store))) == (None, 2)
            assert pod.routes() == [("default", "10.6.0.1")]

    there.run(main)


@pytest.mark.usefixtures("stand_in")
def test_the_network_is_asked_by_the_new_nic(tmp_path: Path, there: Place) -> None:
    """A stranger has one of the pool's two addresses, and the only one of the other pool."""
    for address in ("10.6.0.1/16", "10.6.0.10/16", "10.6.0.12/16"):
        ip("-n", there.outside, "address", "add", address, "dev", "eth0")
    pod = there.pod()

    async def main() -> None:
        async with serving(tmp_path, DETECT) as (plugin, store):
            await pools(store)
            assert addresses(await plugin.add(pod.call())) == ["10.6.0.11"]
            await plugin.delete(pod.call("DEL"))
            await pool(store, "one", "10.6.0.12")
            taken = pod.call(ipam={"type": "spiderpool", "default_ipv4_ippool": ["one"]})
            await refused(plugin.add(taken), ExhaustedError, "all IP addresses used out")
            assert (await claims(store))["10.6.0.12"].spec.quarantine is not None
            assert pod.links() == []

    there.run(main)


@pytest.mark.usefixtures("stand_in")
def test_a_duplicate_that_the_kernel_finds(tmp_path: Path, there: Place) -> None:
    """Our own question is switched off: the kernel's is waited for."""
    ip("-n", there.outside, "address", "add", "fd06::10/64", "dev", "eth0", "nodad")
    pod = there.pod()

    async def main() -> None:
        async with serving(tmp_path) as (plugin, store):
            await pool(store, "v4", "10.6.0.10")
            await pool(store, "v6", "fd06::10")
            await refused(plugin.add(pod.call(v6=True)), AddressConflictError, "fd06::10: duplicate address detection")
            assert (pod.links(), await claims(store)) == ([], {})

    there.run(main)


@pytest.mark.usefixtures("stand_in")
def test_the_provider_chooses_vlan_and_mac(tmp_path: Path, there: Place) -> None:
    """Though detection is on: there is no NIC yet by which the network could be asked."""
    pod = there.pod()

    async def main() -> None:
        async with fake_provider() as fake, provided(tmp_path, fake, DETECT) as (plugin, store):
            await pools(store)
            with mock.patch("plugins.vlan.act.rtmaster.vlan", wraps=rtmaster.vlan) as made:
                result = await plugin.add(pod.call(**AUTO))
                assert made.call_args.args[2] == 100
            assert pod.link()["address"] == "fa:16:3e:00:00:00" == result["interfaces"][0]["mac"]
            assert list(told(pod)) == addresses(result)
            await refused(
                plugin.check(pod.call("CHECK", **AUTO, prevResult=result)), CheckFailedError, "VLAN 0, not 100"
            )
            again = await plugin.add(pod.call(**AUTO))
            assert (addresses(again), len(fake.requests)) == (addresses(result), 1), "what it said is remembered"
            await plugin.delete(pod.call("DEL", **AUTO))
            assert (pod.links(), await claims(store), fake.bound) == ([], {}, {})

            fake.failing = {ALLOCATE}
            await refused(plugin.add(pod.call(**AUTO)), ProviderError, "no capacity")
            fake.failing.clear()
            await refused(plugin.add(pod.call(**AUTO, v6=True)), ProviderError, "different VLANs or MAC addresses")
            assert (pod.links(), await claims(store), fake.bound) == ([], {}, {})
            await refused(plugin.add(pod.call(**AUTO, master="eth9")), InvalidConfigError, "eth9")
            assert (pod.links(), await claims(store), fake.bound) == ([], {}, {})
            assert fake.requests[-1][0] == RELEASE

    there.run(main)


def test_no_provider(tmp_path: Path, there: Place) -> None:
    pod = there.pod()

    async def main() -> None:
        async with serving(tmp_path) as (plugin, store):
            await pools(store)
            await refused(plugin.add(pod.call(**AUTO)), ProviderError, "provider.server_url")
            await refused(plugin.status(pod.call("STATUS", **AUTO)), NotAvailableError, "provider.server_url")
            for command in (plugin.add, plugin.delete, plugin.gc):
                other = pod.call(ipam={"type": "host-local"})
                await refused(command(other), InvalidConfigError, "ipam.type: 'host-local', allowed: 'spiderpool'")
            assert not await claims(store)

    there.run(main)


def test_the_executable_is_served(tmp_path: Path) -> None:
    subprocess.run([ROOT / "plugins/shim/build.sh", "native"], check=True)
    cni = Installation(tmp_path)
    config = {"cniVersion": "1.1.0", "name": "net", "type": "vlan", "master": "spt-nowhere", "vlanId": 7}
    config |= {"ipam": {"type": "spiderpool", "default_ipv4_ippool": ["p4"]}}
    with netns() as pod, cni.agent("--dataplane-enabled=false", module="agent"):
        error = cni.call("ADD", config, name="vlan", netns=pod).error(7, "1.1.0")
        assert "spt-nowhere" in error["details"]
        assert "spt-nowhere" in cni.call("STATUS", config, name="vlan").error(50, "1.1.0")["details"]
        cni.call("DEL", config, name="vlan", netns=pod).empty()
        cni.call("DEL", config, name="vlan").empty()
        cni.call("GC", config | {"cni.dev/valid-attachments": []}, name="vlan").empty()
        nobody = {key: value for key, value in config.items() if key != "vlanId"}
        cni.call("ADD", nobody, name="vlan", netns=pod).error(107, "1.1.0")
