"""What is read of the kernel's messages about links, compared with what pyroute2 packs."""

from __future__ import annotations

import socket

import pytest
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from plugins.net import rtlink

MAC = "02:00:00:00:00:07"


def told(flags: int, family: int = socket.AF_UNSPEC) -> bytes:
    """An RTM_NEWLINK about link 7, whose carrier has gone three times."""
    message = ifinfmsg()
    message["family"], message["index"], message["ifi_type"], message["flags"] = family, 7, 1, flags
    message["attrs"] = [("IFLA_ADDRESS", MAC), ("IFLA_IFNAME", "eth0"), ("IFLA_CARRIER_DOWN_COUNT", 3)]
    message.encode()
    return bytes(message.data[16:])


@pytest.mark.parametrize(
    ("flags", "operational"), [(0x1043, True), (0x1003, False), (0x1002, False), (0x1042, False), (0x11043, True)]
)
def test_a_link_passes_frames_that_is_up_and_has_a_carrier(flags: int, operational: bool) -> None:
    state = rtlink.parse_link_state(told(flags))
    assert state == rtlink.LinkState(7, rtlink.ETHERNET, flags, bytes.fromhex(MAC.replace(":", "")), 3)
    assert state.is_operational is operational


def test_messages_about_a_bridges_ports_are_none() -> None:
    assert rtlink.parse_link_state(told(0x1043, socket.AF_BRIDGE)) is None


def test_without_the_attribute_the_carrier_never_went() -> None:
    state = rtlink.parse_link_state(told(0x1043)[:16])
    assert state is not None
    assert (state.losses, state.mac) == (0, b"")
