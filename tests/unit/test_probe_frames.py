"""What probing sends, byte by byte, and what it makes of what it receives."""

from __future__ import annotations

import subprocess
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptDstLLAddr, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from plugins.coordinator.probe.frames import (
    Sighting,
    announcement,
    conflict_probe,
    gateway_request,
    group_mac,
    link_local,
    quiet_request,
    sighting,
    solicited_node,
)

OWN = "02:00:00:00:00:01"
RIVAL = "02:00:00:00:00:02"
V4 = IPv4Address("192.0.2.7")
V6 = IPv6Address("2001:db8::1:2:3")


def arp(**fields: object) -> bytes:
    """An ARP frame of the rival's; a reply for the target unless told otherwise."""
    base = {"op": 2, "hwsrc": RIVAL, "psrc": str(V4), "hwdst": OWN, "pdst": "0.0.0.0"}
    return bytes(Ether(src=RIVAL, dst=OWN, type=0x806) / ARP(**(base | fields)))


def advertisement(
    options: object = None, hlim: int = 255, dst: str = "ff02::1", source: str = str(V6), **fields: object
) -> bytes:
    """A neighbour advertisement of the rival's for the target."""
    base = {"tgt": str(V6), "R": 0, "S": 0, "O": 1}
    packet = IPv6(src=source, dst=dst, hlim=hlim, nh=58) / ICMPv6ND_NA(**(base | fields))
    return bytes(Ether(src=RIVAL, dst="33:33:00:00:00:01", type=0x86DD) / (packet / options if options else packet))


def solicitation(source: str = "::", dst: str = "", options: object = None, **fields: object) -> bytes:
    """A neighbour solicitation of the rival's for the target."""
    packet = IPv6(src=source, dst=dst or str(solicited_node(V6)), hlim=255, nh=58) / ICMPv6ND_NS(tgt=str(V6), **fields)
    return bytes(Ether(src=RIVAL, dst="33:33:ff:02:00:03", type=0x86DD) / (packet / options if options else packet))


def test_arp_probe_bytes() -> None:
    assert conflict_probe(OWN, V4) == bytes.fromhex(
        "ffffffffffff 020000000001 0806 0001 0800 06 04 0001 020000000001 00000000 000000000000 c0000207"
    )


def test_arp_gateway_request_names_the_source() -> None:
    assert gateway_request(OWN, V4, IPv4Address("192.0.2.1")) == bytes.fromhex(
        "ffffffffffff 020000000001 0806 0001 0800 06 04 0001 020000000001 c0000207 000000000000 c0000201"
    )


def test_arp_announcement_is_a_request_for_its_own_sender() -> None:
    assert announcement(OWN, V4) == bytes.fromhex(
        "ffffffffffff 020000000001 0806 0001 0800 06 04 0001 020000000001 c0000207 000000000000 c0000207"
    )


def test_duplicate_address_detection_bytes() -> None:
    frame = conflict_probe(OWN, V6)
    assert frame[:54] == bytes.fromhex(
        "3333ff020003 020000000001 86dd 60000000 0018 3a ff"
        + "00" * 16
        + "ff02 0000 0000 0000 0000 0001 ff02 0003".replace(" ", "")
    )
    assert frame[54:56] == b"\x87\x00"
    assert frame[58:62] == bytes(4)
    assert frame[62:] == V6.packed


def test_solicitation_for_a_gateway_tells_where_the_answer_goes() -> None:
    packet = Ether(gateway_request(OWN, V6, IPv6Address("fe80::1")))
    assert (packet.dst, packet[IPv6].src, packet[IPv6].dst) == ("33:33:ff:00:00:01", str(V6), "ff02::1:ff00:1")
    assert packet[ICMPv6ND_NS].tgt == "fe80::1"
    assert packet[ICMPv6NDOptSrcLLAddr].lladdr == OWN


def test_advertisement_overrides_and_is_unsolicited() -> None:
    packet = Ether(announcement(OWN, V6))
    assert (packet.dst, packet[IPv6].src, packet[IPv6].dst) == ("33:33:00:00:00:01", str(V6), "ff02::1")
    message = packet[ICMPv6ND_NA]
    assert (message.R, message.S, message.O, message.tgt) == (0, 0, 1, str(V6))
    assert packet[ICMPv6NDOptDstLLAddr].lladdr == OWN


def test_gateway_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="families"):
        gateway_request(OWN, V4, V6)


@given(st.integers(min_value=1, max_value=2**128 - 1).map(IPv6Address).filter(lambda address: not address.is_multicast))
def test_every_address_is_read_back(address: IPv6Address) -> None:
    """Checksums included: `sighting` refuses a frame whose checksum is wrong."""
    assert sighting(conflict_probe(RIVAL, address)) == Sighting(address, RIVAL, asking=True)
    assert sighting(announcement(RIVAL, address)) == Sighting(address, RIVAL, asking=False)
    assert sighting(gateway_request(RIVAL, V6, address)) is None


@pytest.mark.parametrize(
    ("frame", "asking"),
    [
        (arp(), False),
        (arp(op=1, pdst=str(V4)), False),
        (arp(op=1, pdst="192.0.2.99"), False),
        (arp(op=1, psrc="0.0.0.0", pdst=str(V4)), True),
        (arp() + bytes(18), False),
        (advertisement(ICMPv6NDOptDstLLAddr(lladdr=RIVAL)), False),
        (advertisement(), False),
        (advertisement(dst="fe80::1", S=1), False),
        (advertisement() + b"padding of the Ethernet frame", False),
        (solicitation(), True),
    ],
)
def test_a_rival_is_seen(frame: bytes, asking: bool) -> None:
    address = V4 if frame[12:14] == b"\x08\x06" else V6
    assert sighting(frame) == Sighting(address, RIVAL, asking)


def test_the_link_layer_option_counts_more_than_the_sender() -> None:
    """A proxy answers for another station."""
    seen = sighting(advertisement(ICMPv6NDOptDstLLAddr(lladdr="02:00:00:00:00:aa")))
    assert seen is not None
    assert seen.mac == "02:00:00:00:00:aa"


def corrupt(frame: bytes, offset: int, value: int) -> bytes:
    """`frame` with one byte changed and its checksum left as it was."""
    assert frame[offset] != value
    return frame[:offset] + bytes([value]) + frame[offset + 1 :]


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"", id="empty"),
        pytest.param(arp()[:41], id="short ARP"),
        pytest.param(corrupt(arp(), 15, 6), id="ARP hardware type"),
        pytest.param(corrupt(arp(), 16, 9), id="ARP protocol"),
        pytest.param(corrupt(arp(), 18, 8), id="ARP hardware length"),
        pytest.param(arp(op=4), id="reverse ARP"),
        pytest.param(arp(op=2, psrc="0.0.0.0", pdst=str(V4)), id="reply from nobody"),
        pytest.param(advertisement(hlim=254), id="through a router"),
        pytest.param(advertisement(code=1), id="code"),
        pytest.param(advertisement(cksum=1), id="checksum"),
        pytest.param(corrupt(advertisement(), 77, 0xEE), id="target changed on the way"),
        pytest.param(advertisement(S=1), id="solicited, to a group"),
        pytest.param(advertisement(tgt="ff02::2"), id="multicast target"),
        pytest.param(advertisement(b"\x02\x00" + bytes(6)), id="option of length 0"),
        pytest.param(advertisement(b"\x02\x02" + bytes(6)), id="option longer than the packet"),
        pytest.param(advertisement(b"\x02"), id="half an option"),
        pytest.param(advertisement()[:77], id="cut off"),
        pytest.param(solicitation(source="fe80::9"), id="address resolution"),
        pytest.param(solicitation(dst="ff02::1"), id="detection to another group"),
        pytest.param(
            solicitation(options=ICMPv6NDOptSrcLLAddr(lladdr=RIVAL)), id="detection with a link-layer address"
        ),
    ],
)
def test_what_breaks_the_rules_says_nothing(frame: bytes) -> None:
    assert sighting(frame) is None


@given(
    st.sampled_from([arp(), advertisement(ICMPv6NDOptDstLLAddr(lladdr=RIVAL)), solicitation()]),
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 255)), max_size=6),
    st.integers(0, 90),
)
def test_no_frame_can_raise(frame: bytes, changes: list[tuple[int, int]], length: int) -> None:
    raw = bytearray(frame)
    for offset, value in changes:
        if offset < len(raw):
            raw[offset] = value
    sighting(bytes(raw[:length]))
    sighting(bytes(raw))


@given(st.binary(max_size=200), st.sampled_from([b"\x08\x06", b"\x86\xdd\x60\0\0\0\0\x28\x3a\xff"]))
def test_no_garbage_can_raise(garbage: bytes, kind: bytes) -> None:
    sighting(bytes(12) + kind + garbage)


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::1:2:3"])
def test_who_answers_a_question(address: str) -> None:
    target = ip_address(address)
    uses, asks = Sighting(target, RIVAL, asking=False), Sighting(target, RIVAL, asking=True)
    assert uses.answers(target, OWN, counts_askers=False)
    assert asks.answers(target, OWN, counts_askers=True)
    assert not asks.answers(target, OWN, counts_askers=False)
    assert not uses.answers(target, RIVAL, counts_askers=True), "one's own frame, returned"
    assert not uses.answers(target + 1, OWN, counts_askers=True)


def test_groups() -> None:
    assert solicited_node(IPv6Address("fe80::2aa:ff:fe28:9c5a")) == IPv6Address("ff02::1:ff28:9c5a")
    assert group_mac(IPv6Address("ff02::1:ff28:9c5a")) == "33:33:ff:28:9c:5a"


def test_scapy_stays_small_and_reads_no_routes() -> None:
    """The agent's whole budget is 120 MB."""
    code = (
        "import sys, asyncio, ctypes, ipaddress, logging, socket\n"
        "rss = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20\n"
        "before = rss()\n"
        "import plugins.coordinator.probe\n"
        "from scapy.config import conf\n"
        "print(rss() - before, len(conf.route.routes), len(conf.route6.routes))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert float(out[0]) < 45
    assert out[1:] == ["0", "0"]


MACS = st.binary(min_size=6, max_size=6).map(lambda raw: raw.hex(":"))
V4S = st.integers(min_value=0, max_value=2**32 - 1).map(IPv4Address)
V6S = st.integers(min_value=1, max_value=2**128 - 1).map(IPv6Address)


def ask_arp(mac: str, sender: IPv4Address, target: IPv4Address) -> bytes:
    """An ARP request as scapy packs it."""
    return bytes(
        Ether(src=mac, dst="ff:ff:ff:ff:ff:ff", type=0x806)
        / ARP(op=1, hwsrc=mac, psrc=str(sender), hwdst="00:00:00:00:00:00", pdst=str(target))
    )


def ask_neighbour(mac: str, source: IPv6Address, target: IPv6Address) -> bytes:
    """A solicitation as scapy packs it."""
    group = solicited_node(target)
    message = ICMPv6ND_NS(tgt=str(target))
    if int(source):
        message /= ICMPv6NDOptSrcLLAddr(lladdr=mac)
    ip6 = IPv6(src=str(source), dst=str(group), hlim=255, nh=58)
    return bytes(Ether(src=mac, dst=group_mac(group), type=0x86DD) / ip6 / message)


@given(MACS, V4S, V4S)
def test_arp_is_packed_as_scapy_does(mac: str, one: IPv4Address, other: IPv4Address) -> None:
    assert conflict_probe(mac, one) == quiet_request(mac, one) == ask_arp(mac, IPv4Address(0), one)
    assert gateway_request(mac, one, other) == ask_arp(mac, one, other)
    assert announcement(mac, one) == ask_arp(mac, one, one)


@given(MACS, V6S, V6S)
def test_neighbour_discovery_is_packed_as_scapy_does(mac: str, one: IPv6Address, other: IPv6Address) -> None:
    assert conflict_probe(mac, one) == ask_neighbour(mac, IPv6Address("::"), one)
    assert gateway_request(mac, one, other) == ask_neighbour(mac, one, other)
    assert quiet_request(mac, one) == ask_neighbour(mac, link_local(mac), one)
    ip6 = IPv6(src=str(one), dst="ff02::1", hlim=255, nh=58)
    message = ICMPv6ND_NA(tgt=str(one), R=0, S=0, O=1) / ICMPv6NDOptDstLLAddr(lladdr=mac)
    assert announcement(mac, one) == bytes(Ether(src=mac, dst="33:33:00:00:00:01", type=0x86DD) / ip6 / message)


def test_the_link_local_address_follows_from_the_mac() -> None:
    assert link_local("52:54:00:12:34:56") == IPv6Address("fe80::5054:ff:fe12:3456")
