"""The socket filter, run by the kernel: on the receiving end of a pair of Unix datagram sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.ranges import Address
from plugins.coordinator.probe.filter import REJECT, Program, attach_filter, build_filter
from plugins.coordinator.probe.frames import announcement, conflict_probe, gateway_request, parse_mac, sighting

OWN = "02:00:00:00:00:01"
RIVAL = "02:00:00:00:00:02"
V4 = [IPv4Address("192.0.2.7"), IPv4Address("192.0.2.8"), IPv4Address("198.51.100.1")]
V6 = [IPv6Address("2001:db8::1:2:3"), IPv6Address("2001:db8::1:2:4"), IPv6Address("fe80::1")]
ADDRESSES: list[Address] = [*V4, *V6]


class Filtered:
    """A socket behind a filter."""

    def __init__(self, program: Program) -> None:
        self.sender, self.receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.receiver.setblocking(False)
        attach_filter(self.receiver, program)

    def passes(self, frame: bytes) -> bool:
        self.sender.send(frame)
        try:
            return self.receiver.recv(4096) == frame
        except BlockingIOError:
            return False


@contextmanager
def filtered(program: Program) -> Iterator[Filtered]:
    pair = Filtered(program)
    try:
        yield pair
    finally:
        pair.sender.close()
        pair.receiver.close()


def for_questions(users: Iterable[Address], takers: Iterable[Address] = ()) -> Program:
    return build_filter(parse_mac(OWN), users, takers)


def reply(mac: str, address: IPv4Address, sender: str = "") -> bytes:
    frame = bytearray(announcement(mac, address))
    frame[21] = 2
    frame[6:12] = parse_mac(sender or mac)
    return bytes(frame)


def test_the_first_filter_lets_nothing_pass() -> None:
    with filtered(REJECT) as pair:
        assert not any(pair.passes(announcement(RIVAL, address)) for address in ADDRESSES)


def test_without_questions_nothing_passes() -> None:
    with filtered(for_questions([])) as pair:
        assert not any(pair.passes(announcement(RIVAL, address)) for address in ADDRESSES)


@pytest.mark.parametrize("target", ADDRESSES, ids=str)
def test_only_the_target_passes(target: Address) -> None:
    with filtered(for_questions([target], [target])) as pair:
        for address in ADDRESSES:
            assert pair.passes(announcement(RIVAL, address)) == (address == target)
            assert pair.passes(conflict_probe(RIVAL, address)) == (address == target)
            assert not pair.passes(announcement(OWN, address)), "own frame, returned"
            assert not pair.passes(conflict_probe(OWN, address)), "own frame, returned"


def test_many_questions_at_once() -> None:
    many = [IPv4Address(int(V4[0]) + n) for n in range(60)], [IPv6Address(int(V6[0]) + n) for n in range(60)]
    with filtered(for_questions([*many[0], *many[1]], many[1])) as pair:
        for address in many[0]:
            assert pair.passes(announcement(RIVAL, address))
            assert not pair.passes(conflict_probe(RIVAL, address))
        for address6 in many[1]:
            assert pair.passes(announcement(RIVAL, address6))
            assert pair.passes(conflict_probe(RIVAL, address6))
        assert not pair.passes(announcement(RIVAL, IPv4Address(int(V4[0]) + 60)))
        assert not pair.passes(announcement(RIVAL, IPv6Address(int(V6[0]) + 60)))


def test_who_asks_for_a_gateway_is_no_answer() -> None:
    with filtered(for_questions(ADDRESSES)) as pair:
        for address in ADDRESSES:
            assert not pair.passes(conflict_probe(RIVAL, address))
            assert pair.passes(announcement(RIVAL, address))


def test_replies_pass_and_own_ones_do_not() -> None:
    with filtered(for_questions([V4[0]], [V4[0]])) as pair:
        assert pair.passes(reply(RIVAL, V4[0]))
        assert not pair.passes(reply(OWN, V4[0]))
        assert not pair.passes(reply(OWN, V4[0], sender=RIVAL)), "own address, another sender"
        assert not pair.passes(reply(RIVAL, V4[1]))


def test_resolution_of_the_target_does_not_pass() -> None:
    with filtered(for_questions(ADDRESSES, ADDRESSES)) as pair:
        assert not pair.passes(gateway_request(RIVAL, IPv6Address("fe80::9"), V6[0]))
        assert not pair.passes(gateway_request(RIVAL, IPv4Address("203.0.113.1"), V4[0]))


@pytest.mark.parametrize("length", range(0, 78, 3))
def test_cut_off_frames_do_not_pass(length: int) -> None:
    with filtered(for_questions(ADDRESSES, ADDRESSES)) as pair:
        assert not pair.passes(announcement(RIVAL, V6[0])[:length] or b"\0")
        if length < 32:
            assert not pair.passes(announcement(RIVAL, V4[0])[:length] or b"\0")


@given(
    st.sampled_from([make(RIVAL, address) for make in (announcement, conflict_probe) for address in (V4[0], V6[0])]),
    st.lists(st.tuples(st.integers(0, 77), st.integers(0, 255)), max_size=3),
)
def test_whatever_would_answer_passes(frame: bytes, changes: list[tuple[int, int]]) -> None:
    """The filter may let more pass than counts, never less: what it drops, nobody sees."""
    raw = bytearray(frame)
    for offset, value in changes:
        if offset < len(raw):
            raw[offset] = value
    seen = sighting(bytes(raw))
    with filtered(for_questions([V4[0], V6[0]], [V4[0], V6[0]])) as pair:
        if seen and raw[6:12] != parse_mac(OWN) and any(seen.answers(a, OWN, True) for a in (V4[0], V6[0])):
            assert pair.passes(bytes(raw))
