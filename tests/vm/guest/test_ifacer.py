"""ifacer against a kernel that has VLANs and bonds: what is made is read back with `ip`, and sent through."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from scapy.layers.l2 import Ether

from plugins.cni import Call
from plugins.errors import CheckFailedError, CniError, InvalidConfigError, NotAvailableError, WiringError
from plugins.ifacer.act import AbandonedError, Terms, ensure
from plugins.ifacer.config import parse_config
from plugins.ifacer.ifacer import Ifacer
from plugins.ifacer.options import OPTIONS
from plugins.ifacer.settings import IfacerSettings
from plugins.net.netlink import NETLINK_ROUTE, Netlink

Config = dict[str, Any]
DEADLINE = 20.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def links() -> dict[str, Any]:
    """All links as `ip` tells them, by name."""
    told = json.loads(subprocess.run(["ip", "-d", "-j", "link", "show"], check=True, capture_output=True).stdout)
    return {link["ifname"]: link for link in told}


def snapshot() -> dict[str, Any]:
    """What an ADD may change of the links."""
    kept = ("ifindex", "mtu", "master", "link", "ifalias", "group", "address", "linkinfo")
    found = {}
    for name, link in links().items():
        info = link.get("linkinfo", {})
        info = {k: v for k, v in info.items() if k != "info_slave_data"}
        # which NIC is the active one is the bond's own business
        info["info_data"] = {k: v for k, v in info.get("info_data", {}).items() if k != "active_slave"}
        up = "UP" in link["flags"]
        found[name] = {k: link.get(k) for k in kept} | {"up": up, "linkinfo": info}
    return found


def addresses(name: str) -> list[str]:
    told = subprocess.run(["ip", "-j", "addr", "show", "dev", name], check=True, capture_output=True).stdout
    return [own["local"] for own in json.loads(told)[0]["addr_info"]]


def options_of(name: str) -> Any:
    return links()[name]["linkinfo"]["info_data"]


@pytest.fixture
def nics() -> Iterator[tuple[str, str, str]]:
    """Three NICs without a network, up. Everything that was not there before goes with them."""
    before = set(links())
    names = ("spt-a", "spt-b", "spt-c")
    try:
        for name in names:
            ip("link", "add", name, "type", "dummy")
            ip("link", "set", name, "up")
        yield names
    finally:
        for name in set(links()) - before:
            subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)
        assert set(links()) == before


@pytest.fixture
def record(tmp_path: Path) -> str:
    return str(tmp_path / "record")


def call(config: Config, command: Any = "ADD", container: str = "c1", version: str = "1.0.0") -> Call:
    return Call(
        plugin="ifacer",
        command=command,
        container_id=container,
        netns="/proc/self/ns/net",
        netns_fd=None,
        ifname="eth0",
        args={},
        path="",
        config={"cniVersion": version, "name": "net", "type": "ifacer", **config},
        cni_version=version,
    )


def with_plugin(work: Callable[[Ifacer], Any], record: str, **settings: Any) -> Any:
    """The result of `work` with a plugin that is closed afterwards."""

    async def main() -> Any:
        plugin = Ifacer(IfacerSettings(record=record, **settings))
        try:
            return await work(plugin)
        finally:
            await plugin.close()

    return asyncio.run(main())


def add(config: Config, record: str, container: str = "c1", **settings: Any) -> Any:
    return with_plugin(lambda plugin: plugin.add(call(config, container=container)), record, **settings)


def check(config: Config, record: str) -> None:
    with_plugin(lambda plugin: plugin.check(call(config, "CHECK")), record)


def bond(mode: int | str = 1, options: str = "", *slaves: str, name: str = "spt-bond", **more: Any) -> Config:
    return {
        "interfaces": list(slaves or ("spt-a", "spt-b")),
        "bond": {"name": name, "mode": mode, "options": options},
        **more,
    }


def vlan(number: int = 100, parent: str = "spt-a", **more: Any) -> Config:
    return {"interfaces": [parent], "vlanID": number, **more}


@contextlib.contextmanager
def pod_netns(name: str = "spt-pod") -> Iterator[str]:
    ip("netns", "add", name)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.mark.upstream("N00001")
@pytest.mark.parametrize(
    ("config", "made"),
    [
        ({"interfaces": ["spt-a"]}, set()),
        ({"interfaces": ["spt-a"], "vlanID": 0}, set()),
        ({"interfaces": ["spt-a"], "vlanID": 100}, {"spt-a.100"}),
        ({"interfaces": ["spt-a", "spt-b"]}, set()),
        ({"interfaces": ["spt-a", "spt-b"], "vlanID": 100}, set()),
        (bond(), {"spt-bond"}),
        (bond(vlanID=100), {"spt-bond", "spt-bond.100"}),
        ({"interfaces": ["spt-a", "spt-b"], "bond": {"mode": 1}, "vlanID": 4094}, {"sp_bond0", "sp_bond0.4094"}),
        ({"interfaces": ["spt-a"], "bond": {"name": "spt-bond", "mode": 1}}, set()),
    ],
    ids=["nic", "nic-0", "nic-vlan", "nics", "nics-vlan", "bond", "bond-vlan", "unnamed-bond", "bond-of-one"],
)
def test_what_is_made(nics: tuple[str, ...], record: str, config: Config, made: set[str]) -> None:
    before = set(links())
    assert add(config, record) == {"cniVersion": "1.0.0", "dns": {}}
    there = links()
    assert set(there) - before == made
    for name in made:
        assert {"UP", "LOWER_UP"} <= set(there[name]["flags"]), there[name]
        assert (there[name]["ifalias"], there[name]["group"]) == ("spiderpool-ifacer", "1397770564")
    for name in ("spt-bond", "sp_bond0") if made else ():
        if name in made:
            assert {nic for nic, link in there.items() if link.get("master") == name} == {"spt-a", "spt-b"}
    check(config, record)
    after = snapshot()
    assert add(config, record, "another") == {"cniVersion": "1.0.0", "dns": {}}
    assert snapshot() == after


@pytest.mark.upstream("N00001")
def test_a_vlan_is_its_parents_and_has_no_addresses(nics: tuple[str, ...], record: str) -> None:
    ip("link", "set", "spt-a", "mtu", "9000")
    add(vlan(), record)
    made = links()["spt-a.100"]
    data = made["linkinfo"]["info_data"]
    assert (made["link"], made["mtu"], data["id"], data["protocol"]) == ("spt-a", 9000, 100, "802.1Q")
    assert addresses("spt-a.100") == []
    assert Path("/proc/sys/net/ipv6/conf/spt-a.100/accept_ra").read_text().strip() == "0"
    ip("link", "set", "spt-a.100", "mtu", "1400")
    add(vlan(), record)
    assert links()["spt-a.100"]["mtu"] == 1400, "whose MTU was not asked for keeps it"
    add(vlan(mtu=8000), record)
    assert links()["spt-a.100"]["mtu"] == 8000
    with pytest.raises(WiringError, match="mtu: it has 8000, wanted is 1500"):
        add(vlan(mtu=1500), record)
    with pytest.raises(WiringError, match="mtu: 9001, spt-a has 9000"):
        add(vlan(mtu=9001), record)


@pytest.mark.upstream("N00002")
def test_what_somebody_else_made_is_used_as_it_is(nics: tuple[str, ...], record: str) -> None:
    ip("link", "add", "link", "spt-a", "name", "spt-a.100", "type", "vlan", "id", "100")
    ip("link", "set", "spt-a.100", "up")
    ip("link", "add", "spt-bond", "type", "bond", "mode", "1", "miimon", "50")
    for nic in ("spt-b", "spt-c"):
        ip("link", "set", nic, "down")
        ip("link", "set", nic, "master", "spt-bond")
    ip("link", "set", "spt-bond", "up")
    before = snapshot()
    add(vlan(), record)
    add(bond(1, "miimon=50", "spt-b", "spt-c"), record)
    add(bond("active-backup", "", "spt-b", "spt-c"), record)
    assert snapshot() == before


@pytest.mark.upstream("N00003", "N00005")
def test_what_is_down_is_set_up(nics: tuple[str, ...], record: str) -> None:
    ip("link", "set", "spt-a", "down")
    add(vlan(), record)
    assert "UP" in links()["spt-a"]["flags"]
    ip("link", "set", "spt-a.100", "down")
    with pytest.raises(CheckFailedError, match=r"spt-a\.100 is down"):
        check(vlan(), record)
    add(vlan(), record)
    assert "UP" in links()["spt-a.100"]["flags"]
    ip("link", "set", "spt-a", "down")
    add(vlan(), record)
    assert {"UP", "LOWER_UP"} <= set(links()["spt-a.100"]["flags"])

    config = bond(1, "", "spt-b", "spt-c", vlanID=7)
    add(config, record)
    ip("link", "set", "spt-bond", "down")
    with pytest.raises(CheckFailedError, match="spt-bond is down"):
        check(config, record)
    add(config, record)
    there = links()
    assert all({"UP", "LOWER_UP"} <= set(there[name]["flags"]) for name in ("spt-bond", "spt-bond.7"))


@pytest.mark.upstream("N00004")
@pytest.mark.parametrize("config", [vlan(), bond(1, "", "spt-a", "spt-b", vlanID=100)], ids=["nic", "bond"])
def test_one_link_for_each_vlan_id(nics: tuple[str, ...], record: str, config: Config) -> None:
    ip("link", "add", "link", "spt-c", "name", "spt-c.100", "type", "vlan", "id", "100")
    before = snapshot()
    text = "cannot have multiple different vlan interfaces with the same vlanId 100 on node at the same time"
    with pytest.raises(WiringError, match=text):
        add(config, record)
    with pytest.raises(NotAvailableError, match=text):
        with_plugin(lambda plugin: plugin.status(call(config, "STATUS")), record)
    assert snapshot() == before
    add(config, record, one_link_per_vlan_id=False)
    assert {"spt-c.100", f"{config.get('bond', {}).get('name', 'spt-a')}.100"} <= set(links())


def test_a_second_link_for_a_vlan_of_the_same_parent_is_always_refused(nics: tuple[str, ...], record: str) -> None:
    ip("link", "add", "link", "spt-a", "name", "spt-other", "type", "vlan", "id", "100")
    with pytest.raises(WiringError, match=r"cannot have multiple different vlan interfaces .*spt-other"):
        add(vlan(), record, one_link_per_vlan_id=False)


def test_a_vlan_that_a_pod_has(nics: tuple[str, ...], record: str) -> None:
    with pod_netns() as pod:
        ip("link", "set", "spt-a", "down")
        ip("link", "add", "link", "spt-a", "name", "spt-v", "type", "vlan", "id", "100")
        ip("link", "set", "spt-v", "netns", pod)
        before = snapshot()
        with pytest.raises(WiringError, match=r"another network namespace.*spt-a\.100"):
            add(vlan(), record)
        assert snapshot() == before, "the parent is down again"
        add(vlan(101), record)


@pytest.mark.upstream("N00006")
def test_after_a_restart_of_the_node(nics: tuple[str, ...], record: str) -> None:
    config = bond(1, "primary=spt-a", vlanID=100)
    add(config, record)
    first = snapshot()
    ip("link", "delete", "spt-bond")
    ip("link", "set", "spt-b", "down")
    with pytest.raises(CheckFailedError, match="there is no bond spt-bond"):
        check(config, record)
    add(config, record)

    def shape(found: dict[str, Any]) -> Any:
        return {
            name: {k: v for k, v in link.items() if k not in ("ifindex", "address")} for name, link in found.items()
        }

    assert shape(snapshot()) == shape(first)


OPTION_CASES: list[tuple[int | str, str, dict[str, Any]]] = [
    (
        1,
        (
            "miimon=50;updelay=100;downdelay=150;use_carrier=0;primary=spt-b;primary_reselect=2;fail_over_mac=1;"
            "all_slaves_active=1;num_grat_arp=5;peer_notif_delay=200;resend_igmp=7"
        ),
        {
            "mode": "active-backup",
            "miimon": 50,
            "updelay": 100,
            "downdelay": 150,
            "use_carrier": 0,
            "primary": "spt-b",
            "primary_reselect": "failure",
            "fail_over_mac": "active",
            "all_slaves_active": 1,
            "num_peer_notif": 5,
            "peer_notify_delay": 200,
            "resend_igmp": 7,
        },
    ),
    (
        "active-backup",
        'arp_interval=100;arp_ip_target=["10.9.0.1","10.9.0.2"];arp_validate=3;arp_all_targets=1;active_slave=spt-b',
        {
            "miimon": 0,
            "arp_interval": 100,
            "arp_ip_target": ["10.9.0.1", "10.9.0.2"],
            "arp_validate": "all",
            "arp_all_targets": "all",
        },
    ),
    (0, "packets_per_slave=0", {"mode": "balance-rr", "packets_per_slave": 0, "miimon": 100}),
    (2, "xmit_hash_policy=layer3+4", {"mode": "balance-xor", "xmit_hash_policy": "layer3+4"}),
    (3, "", {"mode": "broadcast", "miimon": 100}),
    (
        4,
        "lacp_rate=1;ad_select=2;ad_actor_sys_prio=600;ad_actor_system=02:00:00:00:00:0a;ad_user_port_key=9;min_links=1",
        {
            "mode": "802.3ad",
            "ad_lacp_rate": "fast",
            "ad_select": "count",
            "ad_actor_sys_prio": 600,
            "ad_actor_system": "02:00:00:00:00:0a",
            "ad_user_port_key": 9,
            "min_links": 1,
        },
    ),
    (5, "tlb_dynamic_lb=0;lp_interval=3", {"mode": "balance-tlb", "tlb_dynamic_lb": 0, "lp_interval": 3}),
    (6, "up_delay=200", {"mode": "balance-alb", "updelay": 200}),
]


def test_all_options_are_tried() -> None:
    given = {item.split("=")[0] for _, text, _ in OPTION_CASES for item in text.split(";") if item}
    assert {"updelay" if name == "up_delay" else name for name in given} == set(OPTIONS)


@pytest.mark.parametrize(("mode", "options", "expected"), OPTION_CASES, ids=[str(case[0]) for case in OPTION_CASES])
def test_options_of_a_bond(
    nics: tuple[str, ...], record: str, mode: int | str, options: str, expected: dict[str, Any]
) -> None:
    config = bond(mode, options)
    add(config, record)
    has = options_of("spt-bond")
    assert {name: has.get(name) for name in expected} == expected
    there = links()
    assert all(there[nic]["master"] == "spt-bond" and "UP" in there[nic]["flags"] for nic in ("spt-a", "spt-b"))
    check(config, record)
    before = snapshot()
    add(config, record)
    assert snapshot() == before


def test_the_active_slave(nics: tuple[str, ...], record: str) -> None:
    add(bond(1, "active_slave=spt-b"), record)
    assert options_of("spt-bond")["active_slave"] == "spt-b"
    ip("link", "set", "spt-bond", "type", "bond", "active_slave", "spt-a")
    check(bond(1, "active_slave=spt-b"), record)
    add(bond(1, "active_slave=spt-b"), record)
    assert options_of("spt-bond")["active_slave"] == "spt-a", "which a failover may have chosen"


def test_the_mtu_of_a_bond(nics: tuple[str, ...], record: str) -> None:
    for nic, mtu in (("spt-a", "9000"), ("spt-b", "4000")):
        ip("link", "set", nic, "mtu", mtu)
    add(bond(vlanID=5), record)
    there = links()
    assert {there[name]["mtu"] for name in ("spt-a", "spt-b", "spt-bond", "spt-bond.5")} == {4000}
    add(bond(vlanID=5, mtu=5000), record)
    assert {links()[name]["mtu"] for name in ("spt-bond", "spt-bond.5")} == {5000}


def test_eight_pods_at_once(nics: tuple[str, ...], record: str) -> None:
    config = bond(1, "miimon=100", vlanID=100)

    async def eight(plugin: Ifacer) -> Any:
        return await asyncio.gather(*(plugin.add(call(config, container=f"c{n}")) for n in range(8)))

    assert with_plugin(eight, record) == [{"cniVersion": "1.0.0", "dns": {}}] * 8
    assert {name for name in links() if name.startswith("spt-bond")} == {"spt-bond", "spt-bond.100"}
    check(config, record)


@pytest.mark.parametrize("config", [vlan(), bond(vlanID=100)], ids=["vlan", "bond"])
def test_eight_that_know_nothing_of_each_other(nics: tuple[str, ...], record: str, config: Config) -> None:
    """As upstream's executables, or another agent: nobody fails, and nobody takes back what another one relies on."""
    for _ in range(3):
        together = threading.Barrier(8)

        def one(number: int, together: threading.Barrier = together) -> Any:
            together.wait(DEADLINE)
            return add(config, record, f"c{number}")

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(one, range(8))) == [{"cniVersion": "1.0.0", "dns": {}}] * 8
        check(config, record)
        ip("link", "delete", "spt-bond" if "bond" in config else "spt-a.100")


def test_a_bond_of_ours_is_changed_where_that_harms_nobody(nics: tuple[str, ...], record: str) -> None:
    add(bond(1, "miimon=100;updelay=200"), record)
    index = links()["spt-bond"]["ifindex"]
    wanted = bond(1, "miimon=50;updelay=200;primary=spt-b;xmit_hash_policy=1;num_grat_arp=3", "spt-a", "spt-b", "spt-c")
    with pytest.raises(CheckFailedError) as told:
        check(wanted, record)
    for difference in ("miimon 100 instead of 50", "primary none instead of spt-b", "spt-c is not in spt-bond"):
        assert difference in str(told.value)
    add(wanted, record)
    has = options_of("spt-bond")
    names = ("miimon", "updelay", "primary", "xmit_hash_policy", "num_peer_notif")
    assert [has[name] for name in names] == [50, 200, "spt-b", "layer3+4", 3]
    assert (links()["spt-c"]["master"], links()["spt-bond"]["ifindex"]) == ("spt-bond", index)
    check(wanted, record)
    by_arp = bond(1, "arp_interval=100;arp_ip_target=10.9.0.1", "spt-a", "spt-b", "spt-c")
    add(by_arp, record)
    has = options_of("spt-bond")
    assert (has["miimon"], has["arp_interval"], has["arp_ip_target"]) == (0, 100, ["10.9.0.1"])
    add(wanted, record)
    assert (options_of("spt-bond")["miimon"], options_of("spt-bond")["arp_interval"]) == (50, 0)


def test_a_bond_of_ours_is_not_broken(nics: tuple[str, ...], record: str) -> None:
    add(bond(1), record)
    before = snapshot()
    with pytest.raises(WiringError) as told:
        add(bond(4, "lacp_rate=1;min_links=1;fail_over_mac=2"), record)
    assert told.value.msg == "the bond spt-bond differs from what is wanted"
    for difference in (
        "mode: it has 1 (active-backup), wanted is 4 (802.3ad)",
        "lacp_rate",
        "min_links",
        "fail_over_mac",
    ):
        assert difference in told.value.details
    assert "slow" in told.value.details
    assert snapshot() == before


def test_a_bond_of_somebody_elses_is_left_alone(nics: tuple[str, ...], record: str) -> None:
    ip("link", "add", "spt-bond", "type", "bond", "mode", "1", "miimon", "100")
    ip("link", "set", "spt-a", "down")
    ip("link", "set", "spt-a", "master", "spt-bond")
    ip("link", "set", "spt-bond", "up")
    before = snapshot()
    with pytest.raises(WiringError) as told:
        add(bond(1, "miimon=50;xmit_hash_policy=1", vlanID=9), record)
    for difference in (
        "option miimon: it has 100, wanted is 50",
        "option xmit_hash_policy: it has 0 (layer2), wanted is 1 (layer3+4)",
        "interface spt-b: it is not in the bond",
        "it was not made by ifacer and is left alone",
    ):
        assert difference in told.value.details
    assert snapshot() == before


def test_nics_in_use_are_not_taken(nics: tuple[str, ...], record: str) -> None:
    def refused(text: str) -> None:
        before = snapshot()
        with pytest.raises(WiringError, match=text):
            add(bond(), record)
        assert snapshot() == before

    ip("addr", "add", "192.0.2.1/24", "dev", "spt-b")
    refused("spt-b: it has the address 192.0.2.1/24")
    ip("addr", "flush", "dev", "spt-b")
    ip("addr", "add", "2001:db8::1/64", "dev", "spt-b", "nodad")
    refused("spt-b: it has the address 2001:db8::1/64")
    ip("-6", "addr", "flush", "dev", "spt-b")
    ip("link", "add", "link", "spt-b", "name", "spt-v", "type", "vlan", "id", "5")
    refused("spt-b: spt-v is made of it")
    ip("link", "delete", "spt-v")
    with pod_netns() as pod:
        for kind in (("macvlan", "mode", "bridge"), ("ipvlan", "mode", "l2")):
            ip("link", "add", "link", "spt-b", "name", "spt-m", "type", *kind)
            ip("link", "set", "spt-m", "netns", pod)
            refused("spt-b: macvlan or ipvlan links are made of it")
            ip("-n", pod, "link", "delete", "spt-m")
    ip("link", "add", "spt-other", "type", "bond", "mode", "1")
    ip("link", "set", "spt-b", "down")
    ip("link", "set", "spt-b", "master", "spt-other")
    refused("spt-b is a port of spt-other")
    ip("link", "delete", "spt-other")
    add(bond(), record)


def test_names_that_are_taken(nics: tuple[str, ...], record: str) -> None:
    with pytest.raises(WiringError, match="a non-bond type interface named spt-c already exists on the host"):
        add(bond(name="spt-c"), record)
    ip("link", "add", "spt-a.100", "type", "dummy")
    with pytest.raises(WiringError, match="it is a dummy link"):
        add(vlan(), record)
    ip("link", "delete", "spt-a.100")
    ip("link", "add", "link", "spt-b", "name", "spt-a.100", "type", "vlan", "id", "99")
    with pytest.raises(WiringError, match="its VLAN id is 99; its parent is not spt-a"):
        add(vlan(), record)
    with pytest.raises(InvalidConfigError, match=r"interfaces\[0\]: failed to find link spt-none: Link not found"):
        add(vlan(parent="spt-none"), record)
    with pytest.raises(InvalidConfigError, match=r"interfaces\[1\]: .*spt-none: Link not found"):
        add(bond(1, "", "spt-a", "spt-none"), record)


def test_an_add_that_fails_leaves_nothing(nics: tuple[str, ...], record: str) -> None:
    """The second NIC is one that the kernel refuses beside an Ethernet NIC."""
    ip("link", "add", "spt-can", "type", "vcan")
    ip("link", "set", "spt-can", "up")
    ip("link", "set", "spt-a", "mtu", "1400")
    before = snapshot()
    with pytest.raises(WiringError, match="put spt-can into spt-bond"):
        add(bond(1, "", "spt-a", "spt-can", vlanID=3, mtu=1500), record)
    assert snapshot() == before
    assert not list(Path(record).glob("*.json"))


@pytest.mark.parametrize("existing", [False, True], ids=["new", "changed"])
def test_an_add_that_is_given_up_at_any_moment_leaves_nothing(
    nics: tuple[str, ...], record: str, existing: bool
) -> None:
    config = bond(1, "miimon=100;primary=spt-a", vlanID=3, mtu=1500)
    if existing:
        add(
            bond(1, "arp_interval=50;arp_ip_target=10.9.0.1", "spt-a", mtu=1400) | {"interfaces": ["spt-a", "spt-c"]},
            record,
        )
        config = bond(1, "miimon=100;updelay=200;primary=spt-a", "spt-a", "spt-b", "spt-c", vlanID=3, mtu=1500)
    before = snapshot()
    given_up = 0
    with Netlink(NETLINK_ROUTE, 10) as netlink:
        for limit in itertools.count():
            terms = Terms(True, 10, map(limit.__eq__, itertools.count()).__next__)
            try:
                ensure(netlink, parse_config(config), terms)
                break
            except AbandonedError:
                given_up += 1
                assert snapshot() == before, f"given up at {limit}"
    assert given_up >= 4
    check(config, record)


def test_unused_masters_go_if_that_is_wanted(nics: tuple[str, ...], record: str) -> None:
    config = bond(1, "", vlanID=100)
    ip("link", "add", "link", "spt-c", "name", "spt-c.7", "type", "vlan", "id", "7")

    def wait(condition: Callable[[], bool]) -> Any:
        async def until() -> None:
            deadline = time.monotonic() + DEADLINE
            while not condition():
                assert time.monotonic() < deadline, links().keys()
                await asyncio.sleep(0.1)

        return until()

    async def story(plugin: Ifacer) -> None:
        remover = asyncio.create_task(plugin.run())
        try:
            await plugin.add(call(config))
            await plugin.add(call(config, container="c2"))
            ip("link", "add", "link", "spt-bond.100", "name", "spt-m", "type", "macvlan", "mode", "bridge")
            ip("link", "set", "spt-m", "netns", pod)
            await plugin.delete(call(config, "DEL"))
            await asyncio.sleep(1.5)
            assert "spt-bond.100" in links(), "c2 uses it"
            await plugin.gc(call({"cni.dev/valid-attachments": []}, "GC"))
            await asyncio.sleep(1.5)
            assert "spt-bond.100" in links(), "it has a macvlan in a pod"
            ip("-n", pod, "link", "delete", "spt-m")
            ip("addr", "add", "192.0.2.9/24", "dev", "spt-bond.100")
            await asyncio.sleep(1.5)
            assert "spt-bond.100" in links(), "it has an address"
            ip("addr", "flush", "dev", "spt-bond.100")
            await wait(lambda: "spt-bond.100" not in links())
            await wait(lambda: "spt-bond" not in links())
            assert "spt-c.7" in links(), "it is not ours"
        finally:
            remover.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await remover

    with pod_netns() as pod:
        with_plugin(story, record, remove_unused_after=0.4)
        add(config, record)
        with_plugin(lambda plugin: plugin.delete(call(config, "DEL")), record)
        assert "spt-bond.100" in links(), "nothing goes by default"


@pytest.fixture
def wires() -> Iterator[tuple[str, str]]:
    """Two NICs with a wire each: spt-w0 to spt-f0, spt-w1 to spt-f1."""
    try:
        for number in range(2):
            ip("link", "add", f"spt-w{number}", "type", "veth", "peer", "name", f"spt-f{number}")
            ip("link", "set", f"spt-f{number}", "up")
            ip("link", "set", f"spt-w{number}", "up")
        yield "spt-w0", "spt-w1"
    finally:
        for name in ("spt-bond", "spt-w0", "spt-w1"):
            subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)


def sent(over: str, ends: list[str]) -> dict[str, int]:
    """Send a frame over a link; at which far ends it arrives, and with which VLAN id (0: untagged)."""
    packet, auxdata = 263, 8  # SOL_PACKET, PACKET_AUXDATA: a tag is not in the frame but beside it
    everything = socket.htons(3)  # ETH_P_ALL
    payload = os.urandom(46)
    arrived: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        far = {}
        for end in ends:
            listener = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, everything))
            listener.setsockopt(packet, auxdata, 1)
            listener.bind((end, 0))
            far[listener] = end
        sender = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        sender.bind((over, 0))
        sender.send(bytes(Ether(dst="ff:ff:ff:ff:ff:ff", src="02:00:00:00:00:99", type=0x88B5) / payload))
        deadline = time.monotonic() + DEADLINE
        while not arrived:
            readable, _, _ = select.select(list(far), [], [], max(0, deadline - time.monotonic()))
            assert readable, "the frame is lost"
            for listener in readable:
                data, beside, _, _ = listener.recvmsg(2048, 64)
                if payload in data:
                    tag = next(struct.unpack("=IIIHHHH", value[:20])[5] for _, kind, value in beside if kind == auxdata)
                    arrived[far[listener]] = tag & 0xFFF
    return arrived


@pytest.mark.upstream("N00001")
def test_frames_carry_the_tag(wires: tuple[str, str], record: str) -> None:
    add(vlan(100, wires[0]), record)
    assert sent(f"{wires[0]}.100", ["spt-f0", "spt-f1"]) == {"spt-f0": 100}


def test_a_bond_without_options_fails_over(wires: tuple[str, str], record: str) -> None:
    add(bond(1, "", *wires, vlanID=200), record)
    assert sent("spt-bond.200", ["spt-f0", "spt-f1"]) == {"spt-f0": 200}
    ip("link", "set", "spt-f0", "down")
    deadline = time.monotonic() + DEADLINE
    while options_of("spt-bond").get("active_slave") != wires[1]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert sent("spt-bond.200", ["spt-f0", "spt-f1"]) == {"spt-f1": 200}


def test_an_unexpected_error_is_told_with_what_is_allowed(nics: tuple[str, ...], record: str) -> None:
    for config, text in (
        (bond(7), "available mode: \\[0,6\\]"),
        (bond(1, "miimon=x"), "bond.options: miimon=x, allowed: an integer"),
        (vlan(4095), "vlan tag must be in range \\[0,4094\\]"),
        ({}, "interfaces have at least one interface"),
    ):
        with pytest.raises(CniError, match=text):
            add(config, record)


def test_a_rerun_is_one_question_to_the_kernel(nics: tuple[str, ...], record: str) -> None:
    config = parse_config(bond(1, "primary=spt-a;miimon=100", vlanID=100))
    terms = Terms(True, 10, lambda: False)
    with Netlink(NETLINK_ROUTE, 10) as netlink:
        ensure(netlink, config, terms)
        with mock.patch.object(netlink, "exchange", wraps=netlink.exchange) as exchange:
            ensure(netlink, config, terms)
    [asked] = exchange.call_args_list
    assert len(asked.args[0]) == 5
