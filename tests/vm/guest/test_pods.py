"""Pods with NICs of every kind that the guest can have, and a host outside: the rig works, and so does the kernel."""

from __future__ import annotations

import pytest

from tests.vm.guest.rig import KINDS, OUTSIDE, PLAIN, VFS, Rig, free_vf, ip, links, reach, vfs

POD, OTHER = "spt-pod", "spt-other"


@pytest.mark.parametrize("kind", KINDS)
def test_a_pod_and_the_outside_host_reach_each_other(rig: Rig, kind: str) -> None:
    with rig.pod(POD) as pod:
        segment = rig.attach(kind, pod, "net1", number=5)
        reach(pod, segment.v4(1))
        reach(pod, segment.v6(1))
        reach(OUTSIDE, segment.v4(5))
        reach(OUTSIDE, segment.v6(5))


def test_pods_with_several_kinds_of_nics_share_a_wire(rig: Rig) -> None:
    with rig.pod(POD) as pod, rig.pod(OTHER) as other:
        rig.attach("sriov", pod, "net1", number=5)
        rig.attach("macvlan", other, "net1", number=6)
        reach(pod, PLAIN.v4(6))
        reach(other, PLAIN.v6(5))
        assert links(pod)["net1"]["address"] != links(other)["net1"]["address"]


def test_ipvlans_have_their_masters_mac(rig: Rig) -> None:
    with rig.pod(POD) as pod:
        rig.nic("ipvlan", pod, "net1")
        assert links(pod)["net1"]["address"] == links()["node1"]["address"]


def test_the_nic_has_vfs_that_return_from_a_pod(rig: Rig) -> None:
    free_vf()
    assert len(vfs()) == VFS
    with rig.pod(POD) as pod:
        rig.nic("sriov", pod, "net1")
        assert len(vfs()) == VFS - 1
        assert "net1" in links(pod)
    assert len(vfs()) == VFS


def test_macvlans_on_a_vf(rig: Rig) -> None:
    rig.segment(PLAIN)
    vf = free_vf()
    with rig.pod(POD) as pod:
        ip("link", "set", vf, "up")
        ip("link", "add", "link", vf, "name", "net1", "netns", pod, "type", "macvlan", "mode", "bridge")
        ip("link", "set", "net1", "up", netns=pod)
        rig.address(PLAIN, pod, "net1", 5)
        reach(pod, PLAIN.v4(1))
        reach(OUTSIDE, PLAIN.v6(5))
