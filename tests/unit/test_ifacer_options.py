"""A bond's option string, and its attributes against pyroute2's encoding."""

from __future__ import annotations

import re
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from plugins.ifacer.options import (
    MODES,
    OPTIONS,
    OptionError,
    ParsedOptions,
    Value,
    differing,
    encode,
    parse_mode,
    parse_options,
    present,
    restore,
)
from plugins.net.netlink import attributes, nested
from plugins.net.rtmaster import bond

LINKINFO = 18
SLAVES = ("eth1", "eth2")
INDEX = {"eth1": 11, "eth2": 12}
NAMES = {11: "eth1", 12: "eth2"}


def name_of(index: int) -> str:
    return NAMES[index]


def parse(text: str, mode: int = 1) -> ParsedOptions:
    return parse_options(text, mode, SLAVES)


@pytest.mark.parametrize(
    ("mode", "text", "expected"),
    [
        (1, "", {}),
        (1, "primary=eth1;miimon=100", {"primary": "eth1", "miimon": 100}),
        (1, " primary = eth2 ; ;miimon=50;", {"primary": "eth2", "miimon": 50}),
        (1, "use_carrier=0", {"use_carrier": 0}),
        (5, "tlb_dynamic_lb=0;miimon=0", {"tlb_dynamic_lb": 0, "miimon": 0}),
        (1, "up_delay=200;downdelay=0", {"updelay": 200, "downdelay": 0}),
        (1, "updelay=200", {"updelay": 200}),
        (
            1,
            'arp_interval=100;arp_ip_target=["10.0.0.1","10.0.0.2"];arp_validate=3;arp_all_targets=all',
            {
                "arp_interval": 100,
                "arp_ip_target": (IPv4Address("10.0.0.1"), IPv4Address("10.0.0.2")),
                "arp_validate": 3,
                "arp_all_targets": 1,
            },
        ),
        (1, "arp_interval=9;arp_ip_target=10.0.0.1,10.0.0.2", {"arp_interval": 9, "arp_ip_target": ...}),
        (
            4,
            "lacp_rate=fast;xmit_hash_policy=layer3+4;ad_select=2;ad_actor_system=02:00:00:00:00:0A;min_links=1",
            {
                "lacp_rate": 1,
                "xmit_hash_policy": 1,
                "ad_select": 2,
                "ad_actor_system": bytes.fromhex("02000000000a"),
                "min_links": 1,
            },
        ),
        (1, "num_unsol_na=3;peer_notif_delay=100", {"num_grat_arp": 3, "peer_notif_delay": 100}),
        (1, "fail_over_mac=active;primary_reselect=better", {"fail_over_mac": 1, "primary_reselect": 1}),
    ],
)
def test_understood(mode: int, text: str, expected: dict[str, Any]) -> None:
    parsed = parse(text, mode)
    assert not parsed.ignored
    assert parsed.given.keys() == expected.keys()
    assert all(value is ... or parsed.given[name] == value for name, value in expected.items())


@pytest.mark.parametrize(
    ("text", "left", "told"),
    [
        ("nonsense=1;miimon=50", {"miimon": 50}, "nonsense"),
        ("miimon;primary=eth1", {"primary": "eth1"}, "KEY=VALUE"),
        ("miimon=1=2", {}, "KEY=VALUE"),
        ("lp_interval=0", {}, "from 1"),
        ("miimon=100;updelay=250", {"miimon": 100, "updelay": 200}, "multiple"),
        ("updelay=250", {"updelay": 200}, "multiple"),
        ("miimon=1;miimon=2", {"miimon": 2}, "last"),
    ],
)
def test_ignored_and_told(text: str, left: dict[str, Value], told: str) -> None:
    parsed = parse(text)
    assert dict(parsed.given) == left
    assert len(parsed.ignored) == 1
    assert told in parsed.ignored[0]


@pytest.mark.parametrize(
    ("mode", "text", "told"),
    [
        (1, "miimon=abc", "integer from 0 to 2147483647"),
        (1, "miimon=-1", "integer from 0"),
        (1, "miimon=2147483648", "integer from 0"),
        (1, "miimon=", "integer"),
        (1, "miimon=[1]", "integer"),
        (1, "use_carrier=2", "0 (off), 1 (on)"),
        (1, "primary=eth9", "eth1, eth2"),
        (1, "primary=7", "eth1, eth2"),
        (0, "primary=eth1", "1 (active-backup), 5 (balance-tlb), 6 (balance-alb)"),
        (1, "lacp_rate=1", "4 (802.3ad)"),
        (4, "ad_actor_system=01:00:00:00:00:01", "unicast MAC"),
        (4, "ad_actor_system=hello", "unicast MAC"),
        (4, "ad_user_port_key=1024", "1023"),
        (1, "arp_ip_target=fd00::1", "IPv4"),
        (1, "arp_ip_target=[1,2]", "IPv4"),
        (1, "arp_ip_target=10.0.0.1,10.0.0.1", "different"),
        (1, "arp_ip_target=" + ",".join(f"10.0.0.{n}" for n in range(1, 18)), "16"),
        (1, "arp_interval=100", "arp_ip_target"),
        (1, "arp_interval=100;arp_ip_target=10.0.0.1;miimon=100", "exclude"),
        (1, "arp_validate=1", "arp_interval"),
        (4, "arp_interval=100;arp_ip_target=10.0.0.1", "0 (balance-rr)"),
        (1, "miimon=0;updelay=100", "miimon"),
        (1, "arp_interval=100;arp_ip_target=10.0.0.1;downdelay=100", "miimon"),
        (1, "peer_notif_delay=300001", "300000"),
    ],
)
def test_refused_with_what_is_allowed(mode: int, text: str, told: str) -> None:
    with pytest.raises(OptionError, match=re.escape(told)) as caught:
        parse(text, mode)
    assert "allowed" in str(caught.value) or "is for the modes" in str(caught.value)


def test_a_new_bond_looks_at_its_links() -> None:
    assert parse("primary=eth1").at_creation == {"miimon": 100, "primary": "eth1"}
    assert parse("miimon=0").at_creation == {"miimon": 0}
    assert "miimon" not in parse("arp_interval=10;arp_ip_target=10.0.0.1").at_creation


def test_modes() -> None:
    assert [parse_mode(name) for name in MODES] == list(range(7))
    assert parse_mode(4) == 4
    for wrong in (7, -1, True, "4", "round-robin", None, 1.0):
        with pytest.raises(OptionError, match=r"unknown bond mode.*available mode: \[0,6\]"):
            parse_mode(wrong)


def test_attributes_are_the_kernels() -> None:
    header = Path("/usr/include/linux/if_link.h").read_text()
    names = re.findall(r"IFLA_BOND_(\w+),", header.split("IFLA_BOND_UNSPEC")[1].split("__IFLA_BOND_MAX")[0])
    numbers = {name.lower(): number for number, name in enumerate(names, 1)}
    kernel = {"lacp_rate": "ad_lacp_rate", "num_grat_arp": "num_peer_notif"}
    assert {name: option.attribute for name, option in OPTIONS.items()} == {
        name: numbers[kernel.get(name, name)] for name in OPTIONS
    }


def test_encoding_is_pyroute2s() -> None:
    """But for ad_actor_system, which pyroute2 sends as text, and peer_notif_delay, which it does not know."""
    given: dict[str, Value] = {
        "miimon": 1,
        "updelay": 2,
        "downdelay": 3,
        "use_carrier": 0,
        "arp_ip_target": (IPv4Address("10.0.0.1"), IPv4Address("10.0.0.2")),
        "primary": "eth2",
        "xmit_hash_policy": 5,
        "ad_actor_sys_prio": 600,
        "tlb_dynamic_lb": 0,
        "packets_per_slave": 65535,
    }
    theirs = ifinfmsg()
    theirs["attrs"] = [
        ["IFLA_IFNAME", "b"],
        ["IFLA_GROUP", 7],
        ["IFLA_MTU", 1500],
        [
            "IFLA_LINKINFO",
            {
                "attrs": [
                    ["IFLA_INFO_KIND", "bond"],
                    [
                        "IFLA_INFO_DATA",
                        {
                            "attrs": [
                                ["IFLA_BOND_MIIMON", 1],
                                ["IFLA_BOND_UPDELAY", 2],
                                ["IFLA_BOND_DOWNDELAY", 3],
                                ["IFLA_BOND_USE_CARRIER", 0],
                                ["IFLA_BOND_ARP_IP_TARGET", ["10.0.0.1", "10.0.0.2"]],
                                ["IFLA_BOND_PRIMARY", 12],
                                ["IFLA_BOND_XMIT_HASH_POLICY", 5],
                                ["IFLA_BOND_PACKETS_PER_SLAVE", 65535],
                                ["IFLA_BOND_AD_ACTOR_SYS_PRIO", 600],
                                ["IFLA_BOND_TLB_DYNAMIC_LB", 0],
                            ]
                        },
                    ],
                ]
            },
        ],
    ]
    theirs.encode()
    ours, expected = bond("b", encode(given, INDEX), 7, 1500).body, bytes(theirs.data[16:])
    assert _outer(ours) == _outer(expected)
    assert _data(ours) == _data(expected)


def _outer(body: bytes) -> dict[int, bytes]:
    return {kind: value for kind, value in attributes(body, 16).items() if kind != LINKINFO}


def _data(body: bytes) -> dict[int, Any]:
    info = attributes(attributes(body, 16)[LINKINFO])
    assert info[1].rstrip(b"\0") == b"bond"
    data: dict[int, Any] = attributes(info[2])
    targets = OPTIONS["arp_ip_target"].attribute
    return data | {targets: [value for _, value in nested(data[targets])]}


VALUES = {
    name: st.sampled_from(SLAVES)
    if option.kind == "link"
    else st.binary(min_size=6, max_size=6)
    if option.kind == "mac"
    else st.lists(st.ip_addresses(v=4), max_size=16, unique=True).map(tuple)
    if option.kind == "targets"
    else st.integers(option.low, option.high)
    for name, option in OPTIONS.items()
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_what_is_encoded_is_read_back_and_does_not_differ(given_: dict[str, Value]) -> None:
    data = attributes(encode(given_, INDEX))
    assert {name: present(name, data, name_of) for name in given_} == given_
    assert not differing(given_, data, name_of)
    # restoring what changed brings exactly that back
    back = attributes(restore(given_, 1, data))
    assert all(back[kind] == data[kind] for kind in back if kind in data)


def test_differences() -> None:
    data = attributes(encode({"miimon": 100, "updelay": 200, "use_carrier": 1}, INDEX))
    assert differing({"miimon": 100, "use_carrier": 0}, data, name_of) == {"use_carrier": (1, 0)}
    assert differing({"primary": "eth1"}, data, name_of) == {"primary": ("", "eth1")}
    assert differing({"active_slave": "eth1"}, data, name_of) == {}
    # the kernel keeps delays in intervals, so another interval means that they are set again
    assert differing({"miimon": 50, "updelay": 200}, data, name_of) == {"miimon": (100, 50), "updelay": (200, 200)}
    targets = (IPv4Address("10.0.0.2"), IPv4Address("10.0.0.1"))
    listed = attributes(encode({"arp_ip_target": targets[::-1]}, INDEX))
    assert differing({"arp_ip_target": targets}, listed, name_of) == {}


def test_restoring_a_way_of_monitoring_turns_the_other_one_off_again() -> None:
    before: dict[str, Value] = {"miimon": 100, "updelay": 200, "downdelay": 0, "arp_interval": 0, "arp_validate": 0}
    data = attributes(encode(before, INDEX))
    by_arp = attributes(restore({"arp_interval": 5}, 1, data))
    assert {present(name, by_arp, name_of) for name in ("miimon", "updelay", "arp_interval")} == {100, 200, 0}
    # with 802.3ad there is no ARP monitoring to be named, and without miimon no delay
    assert OPTIONS["arp_interval"].attribute not in attributes(restore({"miimon": 5}, 4, data))
    off = attributes(encode({"miimon": 0, "updelay": 0, "arp_interval": 7}, INDEX))
    assert OPTIONS["updelay"].attribute not in attributes(restore({"miimon": 5}, 1, off))
    assert attributes(restore({"primary": "eth1"}, 1, data))[OPTIONS["primary"].attribute] == bytes(4)
