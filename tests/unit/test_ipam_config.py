"""What is read out of a call, and what is refused by which name."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from plugins.cni import valid_attachments
from plugins.errors import InvalidConfigError
from plugins.ipam.config import parse_config, parse_request
from tests.integration.ipam_rig import call


def test_everything_upstream_writes_is_tolerated() -> None:
    block = {
        "type": "spiderpool",
        "log_level": "DEBUG",
        "log_file_path": "/var/log/x",
        "log_file_max_size": "100",
        "log_file_max_age": 30,
        "log_file_max_count": 7,
        "ipam_unix_socket_path": "/var/run/spidernet/spiderpool.sock",
        "match_master_subnet": False,
        "clean_gateway": True,
        "default_ipv4_ippool": ["a", "b-*"],
        "default_ipv6_ippool": None,
    }
    config = parse_config({"ipam": block})
    assert (config.ipv4_pools, config.ipv6_pools, config.clean_gateway) == (("a", "b-*"), (), True)


@pytest.mark.parametrize(
    ("block", "field"),
    [
        (None, "ipam: is missing"),
        ([], "ipam: is a list"),
        ({"default_ipv4_ippool": "a"}, "ipam.default_ipv4_ippool"),
        ({"default_ipv6_ippool": [1]}, "ipam.default_ipv6_ippool"),
        ({"default_ipv6_ippool": [""]}, "ipam.default_ipv6_ippool"),
        ({"clean_gateway": "yes"}, "ipam.clean_gateway"),
    ],
)
def test_wrong_members_are_named(block: Any, field: str) -> None:
    with pytest.raises(InvalidConfigError) as raised:
        parse_config({"ipam": block})
    assert raised.value.details.startswith(field)


def test_match_master_subnet() -> None:
    assert parse_config({"ipam": {"match_master_subnet": True}}).match_master_subnet
    assert not parse_config({"ipam": {}}).match_master_subnet


def test_identity_is_the_pod_or_else_the_container() -> None:
    assert parse_request(call("a")).identity == "pod.uid-a"
    assert parse_request(call("a", uid=False, container="abc")).identity == "ctr.abc"
    assert len(parse_request(call("a", uid=False, container="x" * 200)).identity) <= 63
    assert parse_request(call("a", args={"K8S_POD_UID": "../../etc"})).identity.startswith("podx.")


def test_fixed_addresses() -> None:
    by_args = parse_request(call("a", args={"IP": "10.0.0.5,fd00::5"}))
    assert by_args.fixed == {4: ip_address("10.0.0.5"), 6: ip_address("fd00::5")}
    by_capability = parse_request(call("a", config={"runtimeConfig": {"ips": ["10.0.0.5/24"]}}))
    assert by_capability.fixed == {4: ip_address("10.0.0.5")}
    assert not parse_request(call("a")).fixed


@pytest.mark.parametrize(
    "wrong",
    [
        {"args": {"IP": "10.0.0.300"}},
        {"args": {"IP": "10.0.0.5,10.0.0.6"}},
        {"config": {"runtimeConfig": {"ips": "10.0.0.5"}}},
        {"config": {"runtimeConfig": {"ips": ["x"]}}},
        {"config": {"name": 5}},
    ],
)
def test_wrong_requests(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError):
        parse_request(call("a", **wrong))


def test_text_that_no_json_can_hold_is_refused() -> None:
    with pytest.raises(InvalidConfigError):
        parse_request(replace(call("a"), netns="/run/\udcff"))


def test_a_missing_list_of_attachments_is_no_empty_one() -> None:
    assert valid_attachments({"cni.dev/valid-attachments": []}) == set()
    item = {"containerID": "c", "ifname": "eth0"}
    assert valid_attachments({"cni.dev/attachments": [item]}) == {("c", "eth0")}
    for wrong in ({}, {"cni.dev/valid-attachments": None}, {"cni.dev/valid-attachments": [{"containerID": "c"}]}):
        with pytest.raises(InvalidConfigError):
            valid_attachments(wrong)
