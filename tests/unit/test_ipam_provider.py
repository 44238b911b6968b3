"""What the infrastructure provider is asked, what it may answer, and which NICs it is asked about."""

from __future__ import annotations

from typing import Any

import pytest

from api.claim import Claim, ClaimSpec, Provided, Workload
from api.meta import ObjectMeta
from api.multusconfig import Bond, MultusConfigSpec, VlanConfig
from plugins.ipam.provider import parent_link
from store.provider import (
    AllocationResponse,
    AllocationResult,
    ProviderSettings,
    allocation_request,
    release_request,
    with_answers,
)

PROVIDED = Provided(subnet="10.0.0.0/24", parent_mac="02:00:00:00:00:01")
MAC = "fa:16:3e:00:00:01"


def claim(address: str, **spec: Any) -> Claim:
    whole: dict[str, Any] = {"pod_uid": "u", "node": "n", "provided": PROVIDED, **spec}
    return Claim(metadata=ObjectMeta(name=address), spec=ClaimSpec(address=address, ip_version=4, pool="p", **whole))


@pytest.mark.parametrize("url", ["ftp://x", "https://", "https://x?y", "x", "http:///path", "https://x#y"])
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="server_url"):
        ProviderSettings(server_url=url)


@pytest.mark.parametrize("seconds", [0, 100, 1000])
def test_timeouts_that_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="http_request_timeout"):
        ProviderSettings(http_request_timeout=seconds)


@pytest.mark.parametrize(
    ("vlan", "link"),
    [
        (VlanConfig(master=["eth1"], vlan_mode="auto"), "eth1"),
        (VlanConfig(master=["eth1", "eth2"], vlan_mode="auto", bond=Bond(name="bond0", mode=1)), "bond0"),
        (VlanConfig(master=["eth1"]), ""),
        (VlanConfig(master=["eth1"], vlan_mode="manual", vlan_id=7), ""),
        (VlanConfig(master=[], vlan_mode="auto"), ""),
        (None, ""),
    ],
)
def test_which_nics_the_provider_decides_about(vlan: VlanConfig | None, link: str) -> None:
    assert parent_link(MultusConfigSpec(cni_type="vlan", vlan=vlan)) == link
    assert not parent_link(MultusConfigSpec(cni_type="macvlan", vlan=vlan))


def test_a_virtual_machines_pod_is_named_by_its_own_name() -> None:
    machine = claim("10.0.0.5", workload=Workload(namespace="ns", name="vm", pod="virt-launcher-vm-x"))
    assert allocation_request([machine]).pod_name == "virt-launcher-vm-x"
    assert release_request(machine, PROVIDED).pod_name == "virt-launcher-vm-x"
    assert release_request(claim("10.0.0.6"), PROVIDED).pod_name == ""


def test_answers_are_taken_in() -> None:
    answer = AllocationResponse(
        items=[AllocationResult(ip_address=f"10.0.0.{n}", mac_address=MAC, vlan_id=n) for n in (6, 5)]
    )
    given = with_answers([claim("10.0.0.5"), claim("10.0.0.6")], answer)
    assert [(c.spec.provided.mac, c.spec.provided.vlan) for c in given if c.spec.provided] == [(MAC, 5), (MAC, 6)]


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        ([], "does not tell of 10.0.0.5"),
        ([("10.0.0.5", MAC, 1), ("10.0.0.9", MAC, 1)], "10.0.0.9, which nobody asked about"),
        ([("10.0.0.5", "", 1)], "is not a MAC address"),
        ([("10.0.0.5", "fa:16:3e:00:00", 1)], "is not a MAC address"),
        ([("10.0.0.5", MAC, 4095)], "4095 is not a VLAN ID"),
        ([("10.0.0.5", MAC, -1)], "-1 is not a VLAN ID"),
    ],
)
def test_answers_that_are_refused(items: list[tuple[str, str, int]], problem: str) -> None:
    results = [AllocationResult(ip_address=ip, mac_address=mac, vlan_id=vlan) for ip, mac, vlan in items]
    with pytest.raises(ValueError, match=problem):
        with_answers([claim("10.0.0.5")], AllocationResponse(items=results))
