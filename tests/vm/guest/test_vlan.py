"""The vlan plugin with real VLANs: what it makes is read back with `ip`, and spoken through."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plugins.errors import CheckFailedError, CniError, WiringError
from plugins.ipam.settings import IpamSettings
from tests.integration.fake_provider import fake_provider
from tests.integration.ipam_rig import addresses, claims, pool
from tests.integration.vlan_rig import Place, ip, place, provided, serving
from tests.vm.guest.rig import answers, reach

DETECT = IpamSettings(enable_ip_conflict_detection=True, enable_gateway_detection=True)
AUTO: Any = {"vlanMode": "auto", "vlanId": None}


@pytest.fixture
def there() -> Iterator[Place]:
    """Outside, VLAN 100 has the gateway of both pools; without a tag nobody is there."""
    with place() as made:
        out = made.outside
        ip("-n", out, "link", "add", "link", "eth0", "name", "eth0.100", "type", "vlan", "id", "100")
        for address in ("10.6.0.1/16", "fd06::1/64"):
            ip("-n", out, "address", "add", address, "dev", "eth0.100", *(["nodad"] if ":" in address else []))
        ip("-n", out, "link", "set", "eth0.100", "up")
        yield made


async def pools(store: Any) -> None:
    await pool(store, "v4", "10.6.0.10-10.6.0.11", gateway="10.6.0.1")
    await pool(store, "v6", "fd06::10-fd06::11", gateway="fd06::1")


async def refused(work: Any, error: type[CniError], text: str) -> None:
    with pytest.raises(error) as raised:
        await work
    assert text in str(raised.value), raised.value


def test_a_vlan_comes_and_goes(tmp_path: Path, there: Place) -> None:
    pod = there.pod()

    async def main() -> None:
        async with serving(tmp_path) as (plugin, store):
            await pools(store)
            config: Any = {"vlanId": 100, "v6": True, "mtu": 1400}
            result = await plugin.add(pod.call(**config))
            link = pod.link()
            data = link["linkinfo"]["info_data"]
            assert (link["linkinfo"]["info_kind"], data["id"], data["protocol"]) == ("vlan", 100, "802.1Q")
            assert data["flags"] == ["REORDER_HDR"]
            (parent,) = json.loads(ip("-n", there.node, "-j", "link", "show", "eth0"))
            assert (link["mtu"], link["link_index"], link["address"]) == (1400, parent["ifindex"], parent["address"])
            assert [own["local"] for own in link["addr_info"] if own["scope"] == "global"] == addresses(result)
            reach(pod.name, "10.6.0.1")
            reach(pod.name, "fd06::1")
            check = pod.call("CHECK", **config, prevResult=result)
            await plugin.check(check)
            again = await plugin.add(pod.call(**config))
            assert addresses(again) == addresses(result)
            reach(pod.name, "10.6.0.1")

            # Somebody replaces it by another VLAN of the same name.
            ip("-n", pod.name, "link", "delete", "eth0")
            ip("-n", there.node, "link", "add", "link", "eth0", "name", "tmp0", "type", "vlan", "id", "101")
            ip("-n", there.node, "link", "set", "tmp0", "netns", pod.name, "name", "eth0")
            for address in addresses(result):
                length = "/64" if ":" in address else "/16"
                ip("-n", pod.name, "address", "add", address + length, "dev", "eth0")
            await refused(plugin.check(check), CheckFailedError, "eth0: VLAN 101, not 100; eth0: MTU 1500, not 1400")
            for _ in range(2):
                await plugin.delete(pod.call("DEL", vlanId=100, v6=True))
                assert (pod.links(), await claims(store)) == ([], {})

    there.run(main)


def test_each_vlan_of_a_nic_is_there_once(tmp_path: Path, there: Place) -> None:
    """Also where the master is a link of the pod's own, which has VLANs of its own."""
    first, second = there.pod(), there.pod()

    async def main() -> None:
        async with serving(tmp_path) as (plugin, store):
            await pools(store)
            await plugin.add(first.call(vlanId=100))
            await refused(plugin.add(second.call(vlanId=100)), WiringError, "eth0.100: the kernel has each VLAN")
            assert (second.links(), len(await claims(store))) == ([], 1)
            reach(first.name, "10.6.0.1")
            await plugin.delete(first.call("DEL", vlanId=100))
            result = await plugin.add(second.call(vlanId=100))
            reach(second.name, "10.6.0.1")
            await plugin.check(second.call("CHECK", vlanId=100, prevResult=result))

            ip("-n", first.name, "link", "add", "uplink", "type", "veth", "peer", "name", "far")
            for name in ("uplink", "far"):
                ip("-n", first.name, "link", "set", name, "up")
            inside: Any = {"nic": "net1", "master": "uplink", "linkInContainer": True, "vlanId": 100}
            result = await plugin.add(first.call(**inside))
            assert first.link("net1")["link"] == "uplink"
            await plugin.check(first.call("CHECK", **inside, prevResult=result))
            await plugin.delete(first.call("DEL", **inside))
            assert sorted(first.links()) == ["far", "uplink"]

    there.run(main)


def test_the_network_is_asked_with_the_tag(tmp_path: Path, there: Place) -> None:
    """Strangers have both addresses, but one of them is on another network: it is without a tag."""
    ip("-n", there.outside, "address", "add", "10.6.0.10/16", "dev", "eth0.100")
    ip("-n", there.outside, "address", "add", "10.6.0.11/32", "dev", "eth0")
    # It answers on the link only that the address is on.
    path = "/proc/sys/net/ipv4/conf/all/arp_ignore"
    ip("netns", "exec", there.outside, "/bin/busybox", "sh", "-c", f"echo 1 > {path}")
    pod = there.pod()

    async def main() -> None:
        async with serving(tmp_path, IpamSettings(enable_ip_conflict_detection=True)) as (plugin, store):
            await pools(store)
            assert addresses(await plugin.add(pod.call(vlanId=100))) == ["10.6.0.11"]

    there.run(main)


def test_the_provider_chooses_vlan_and_mac(tmp_path: Path, there: Place) -> None:
    pod = there.pod()

    async def main() -> None:
        async with fake_provider() as fake, provided(tmp_path, fake, DETECT) as (plugin, store):
            await pools(store)
            result = await plugin.add(pod.call(**AUTO))
            assert pod.link()["linkinfo"]["info_data"]["id"] == 100
            reach(pod.name, "10.6.0.1")
            (address,) = addresses(result)
            told = json.loads(ip("-n", there.outside, "-j", "neighbour", "show", "dev", "eth0.100"))
            assert {each["dst"]: each.get("lladdr") for each in told}[address] == "fa:16:3e:00:00:00"
            await plugin.check(pod.call("CHECK", **AUTO, prevResult=result))
            await plugin.delete(pod.call("DEL", **AUTO))
            assert (pod.links(), await claims(store), fake.bound) == ([], {}, {})
            assert not answers(there.outside, address)

    there.run(main)
