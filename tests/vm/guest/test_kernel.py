"""The guest's kernel has what this machine's may lack, and the emulated wires carry it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.vm.guest.rig import (
    BONDED,
    OUTSIDE,
    PF,
    PLAIN,
    Rig,
    answers,
    cable,
    free_vf,
    ip,
    links,
    namespace,
    reach,
    remove,
    until,
)

POD, OTHER = "spt-pod", "spt-other"


def test_a_vlan_keeps_others_out(own_rig: Rig) -> None:
    with own_rig.pod(POD) as pod:
        segment = own_rig.attach("vlan", pod, "net1", number=5)
        reach(pod, segment.v4(1))
        own_rig.segment(PLAIN)
        ip("addr", "add", f"{segment.v4(9)}/24", "dev", "far1", netns=OUTSIDE)
        ip("neigh", "flush", "all", netns=pod)
        assert answers(pod, segment.v4(1))
        # Without its tag, the same address is nobody's on this wire.
        ip("addr", "del", f"{segment.v4(1)}/24", "dev", segment.far, netns=OUTSIDE)
        ip("link", "set", segment.far, "down", netns=OUTSIDE)
        ip("neigh", "flush", "all", netns=pod)
        assert not answers(pod, segment.v4(9))


def active_slave() -> str:
    return Path("/sys/class/net", BONDED.node, "bonding/active_slave").read_text().strip()


def test_a_bond_goes_on_by_its_other_nic(own_rig: Rig) -> None:
    with own_rig.pod(POD) as pod:
        own_rig.attach("bond", pod, "net1", number=5)
        until(lambda: active_slave() == "node2", "the first NIC is the active one")
        reach(pod, BONDED.v4(1))
        try:
            cable("node2", "out")
            until(lambda: active_slave() == "node3", "the bond has changed over")
            reach(pod, BONDED.v4(1))
            reach(OUTSIDE, BONDED.v6(5))
        finally:
            cable("node2", "in")
        until(lambda: links()["node2"]["operstate"] == "UP", "the cable is back")


def test_lacp_between_two_bonds(own_rig: Rig) -> None:
    options = ("mode", "802.3ad", "lacp_rate", "fast", "miimon", "50")
    own_rig.bond("spt-lacp", ("node2", "node3"), "", *options)
    own_rig.bond("spt-lacp", ("far2", "far3"), OUTSIDE, *options)
    own_rig.address(BONDED, OUTSIDE, "spt-lacp", 1)
    folder = Path("/sys/class/net/spt-lacp/bonding")
    until(lambda: (folder / "ad_num_ports").read_text().strip() == "2", "both links are in one aggregate", 60)
    assert (folder / "ad_partner_mac").read_text().strip() == links(OUTSIDE)["spt-lacp"]["address"]
    ip("addr", "add", f"{BONDED.v4(2)}/24", "dev", "spt-lacp")
    reach(OUTSIDE, BONDED.v4(2))


@pytest.mark.parametrize("kind", ["dummy", "bridge", "vxlan id 7 dstport 4789", "vrf table 77", "veth", "ifb"])
def test_links_can_be_made(kind: str) -> None:
    try:
        ip("link", "add", "name", "spt-link", "type", *kind.split())
        ip("link", "set", "spt-link", "up")
        assert links()["spt-link"]["linkinfo"]["info_kind"] == kind.split(maxsplit=1)[0]
    finally:
        remove("spt-link")


def test_netem_delays_and_connections_are_tracked() -> None:
    with namespace(POD) as pod:
        subprocess.run(
            ["tc", "-n", pod, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "30ms"], check=True, timeout=20
        )
        rules = "table inet t { chain c { type filter hook input priority 0; ct state new counter; }; }"
        argv = ["ip", "netns", "exec", pod, "nft", "-f", "-"]
        subprocess.run(argv, input=rules, text=True, check=True, timeout=20)
        pinged = subprocess.run(
            ["nsenter", f"--net=/run/netns/{pod}", "/bin/busybox", "ping", "-c", "1", "127.0.0.1"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
        took = re.search(r"time=([\d.]+) ms", pinged)
        assert took is not None
        assert float(took[1]) >= 60
        counted = subprocess.run(
            ["ip", "netns", "exec", pod, "nft", "list", "table", "inet", "t"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
        assert "packets 1 " in counted


def pci_address(number: int) -> str:
    return os.path.basename(os.readlink(f"/sys/class/net/{PF}/device/virtfn{number}"))


def rebind(number: int) -> None:
    """Have the VF's driver begin anew, as it takes the MAC that it is given only then."""
    driver = Path("/sys/bus/pci/drivers/igbvf")
    (driver / "unbind").write_text(pci_address(number))
    (driver / "bind").write_text(pci_address(number))
    folder = Path(f"/sys/class/net/{PF}/device/virtfn{number}/net")
    until(lambda: folder.is_dir() and os.listdir(folder), "the VF is back")


def test_a_vf_gets_its_mac_and_vlan_from_the_node(own_rig: Rig) -> None:
    free_vf()
    mac, plain = "02:00:00:00:09:05", "00:00:00:00:00:00"
    try:
        ip("link", "set", PF, "vf", "0", "mac", mac)
        rebind(0)
        with own_rig.pod(POD) as pod:
            own_rig.attach("sriov", pod, "net1", number=5)
            assert links(pod)["net1"]["address"] == mac
            reach(pod, PLAIN.v4(1))
            # The NIC tags what the VF sends: the outside host has it on its VLAN, and not beside it.
            ip("link", "set", PF, "vf", "0", "vlan", "300")
            until(lambda: not answers(pod, PLAIN.v4(1)), "the VF has left the untagged network")
            ip("link", "add", "link", "far1", "name", "far1.300", "type", "vlan", "id", "300", netns=OUTSIDE)
            ip("link", "set", "far1.300", "up", netns=OUTSIDE)
            ip("addr", "flush", "dev", "far1", netns=OUTSIDE)
            own_rig.address(PLAIN, OUTSIDE, "far1.300", 1)
            reach(pod, PLAIN.v4(1))
    finally:
        ip("link", "set", PF, "vf", "0", "vlan", "0")
        ip("link", "set", PF, "vf", "0", "mac", plain)


def test_nothing_leads_out() -> None:
    assert ip("route", "show", "default") == ""
    with open("/proc/net/route") as routes:
        assert len(routes.readlines()) == 1
