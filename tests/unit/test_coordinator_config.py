"""The coordinator's configuration: layers, defaults, and a field path for everything that is wrong."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.coordinator.config import parse_config
from plugins.coordinator.coordinator import pass_on
from plugins.coordinator.settings import CoordinatorSettings
from plugins.errors import InvalidConfigError

DEFAULTS = CoordinatorSettings()


def test_defaults() -> None:
    config = parse_config({}, DEFAULTS)
    assert (config.mode, config.pod_default_cni_nic, config.veth_mtu, config.host_rule_table) == (
        "auto", "eth0", 1500, 500,
    )  # fmt: skip
    assert (config.hijack, config.policy_routes, config.pod_mac_prefix) == ((), (), b"")
    assert (config.pod_rp_filter, config.tx_queue_len, config.veth_link_address) == (0, 0, None)


def test_members_go_before_settings_and_lists_replace() -> None:
    settings = CoordinatorSettings(
        mode="underlay", service_cidr=("10.96.0.0/12",), hijack_cidr=("10.1.0.0/16",), veth_mtu=9000,
        policy_routes=("10.5.0.0/16 via 10.0.0.1",), pod_mac_prefix="0a:1b", veth_link_address="169.254.100.1",
    )  # fmt: skip
    config = parse_config({"serviceCIDR": [" 10.100.0.0/16 "], "hijackCIDR": [], "vethMTU": 1400, "mode": ""}, settings)
    assert [str(p) for p in config.hijack] == ["10.100.0.0/16", "10.1.0.0/16"]
    assert config.mode == "underlay"
    assert config.veth_mtu == 1400
    assert config.pod_mac_prefix == b"\x0a\x1b"
    assert config.veth_link_address == ip_address("169.254.100.1")
    assert [(str(r.destination), str(r.gateway)) for r in config.policy_routes] == [("10.5.0.0/16", "10.0.0.1")]


def test_order_masks_and_duplicates_of_hijacked_networks() -> None:
    config = parse_config(
        {
            "hijackCIDR": ["10.3.0.9/16", "10.1.0.0/16"],
            "serviceCIDR": ["10.2.0.0/16"],
            "overlayPodCIDR": ["10.1.0.0/16"],
        },
        DEFAULTS,
    )
    assert [str(p) for p in config.hijack] == ["10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16"]


@pytest.mark.parametrize(
    ("member", "value", "parsed"),
    [
        ("mode", "disabled", "disable"),
        ("podMACPrefix", "0A-1B", b"\x0a\x1b"),
        ("podRPFilter", -7, None),
        ("podRPFilter", 2, 2),
        ("hostRuleTable", 252, 252),
    ],
)
def test_spellings(member: str, value: object, parsed: object) -> None:
    names = {
        "mode": "mode",
        "podMACPrefix": "pod_mac_prefix",
        "podRPFilter": "pod_rp_filter",
        "hostRuleTable": "host_rule_table",
    }
    assert getattr(parse_config({member: value}, DEFAULTS), names[member]) == parsed


BAD: list[tuple[str, Any, str]] = [
    ("mode", "bridge", "mode"),
    ("mode", 5, "mode"),
    ("vethMTU", 0, "vethMTU"),
    ("vethMTU", -1, "vethMTU"),
    ("vethMTU", 65536, "vethMTU"),
    ("vethMTU", "1500", "vethMTU"),
    ("vethMTU", True, "vethMTU"),
    ("podMACPrefix", "0b:1b", "podMACPrefix"),
    ("podMACPrefix", "0a:1b:2c", "podMACPrefix"),
    ("podMACPrefix", "zz:00", "podMACPrefix"),
    ("podDefaultCniNic", "a/b", "podDefaultCniNic"),
    ("podDefaultCniNic", "x" * 16, "podDefaultCniNic"),
    ("podDefaultRouteNic", "x" * 16, "podDefaultRouteNic"),
    ("overlayPodCIDR", "10.0.0.0/8", "overlayPodCIDR"),
    ("serviceCIDR", [5], r"serviceCIDR\[0\]"),
    ("hijackCIDR", ["10.0.0.0/8", "169.254.25.10"], r"hijackCIDR\[1\]"),
    ("hijackCIDR", ["10.0.0.0/33"], r"hijackCIDR\[0\]"),
    ("hijackCIDR", ["fe80::/10%eth0"], r"hijackCIDR\[0\]"),
    ("policyRoutes", {}, "policyRoutes"),
    ("policyRoutes", ["x"], r"policyRoutes\[0\]"),
    ("policyRoutes", [{"gw": "10.0.0.1"}], r"policyRoutes\[0\]\.dst"),
    ("policyRoutes", [{"dst": "10.0.0.0/8"}], r"policyRoutes\[0\]\.gw"),
    ("policyRoutes", [{"dst": "10.0.0.0/8", "gw": "10.0.0.0/8"}], r"policyRoutes\[0\]\.gw"),
    ("policyRoutes", [{"dst": "10.0.0.0/8", "gw": "fd00::1"}], r"policyRoutes\[0\]\.gw"),
    ("tunePodRoutes", "yes", "tunePodRoutes"),
    ("hostRuleTable", 254, "hostRuleTable"),
    ("hostRuleTable", 0, "hostRuleTable"),
    ("hostRuleTable", 2**32, "hostRuleTable"),
    ("podRPFilter", 3, "podRPFilter"),
    ("podRPFilter", "0", "podRPFilter"),
    ("txQueueLen", -1, "txQueueLen"),
    ("vethLinkAddress", "fd00::1", "vethLinkAddress"),
    ("vethLinkAddress", "169.254.100.1/32", "vethLinkAddress"),
    ("vethLinkAddress", "224.0.0.1", "vethLinkAddress"),
    ("logOptions", [], "logOptions"),
    ("logOptions", {"logLevel": "loud"}, r"logOptions\.logLevel"),
]


@pytest.mark.upstream("C00023")
@pytest.mark.parametrize(("member", "value", "path"), BAD)
def test_what_is_wrong_is_named(member: str, value: object, path: str) -> None:
    with pytest.raises(InvalidConfigError, match=rf"{path}: .*allowed: "):
        parse_config({member: value}, DEFAULTS)


@given(
    st.sampled_from(sorted({member for member, _, _ in BAD})),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dst", "gw", "x"]), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)
def test_nothing_else_than_a_named_error(member: str, value: object) -> None:
    refusal = ""
    try:
        parse_config({member: value}, DEFAULTS)
    except InvalidConfigError as error:
        refusal = error.details
    assert not refusal or refusal.startswith(member)


def test_results_of_other_versions() -> None:
    old = {"cniVersion": "0.4.0", "ips": [{"version": "4", "address": "10.0.0.1/8", "x": 1}], "y": 2}
    new = {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.1/8", "x": 1}], "y": 2}
    assert pass_on(old, "1.0.0") == new
    assert pass_on(new, "0.4.0") == old
    assert pass_on(new, "1.1.0") == {**new, "cniVersion": "1.1.0"}
    assert pass_on({"z": None}, "0.3.1") == {"z": None, "cniVersion": "0.3.1"}
