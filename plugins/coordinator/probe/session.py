"""Asking about addresses on one NIC.

The problem is to hear everything that matters within a short wait. Silence is the answer of a free address, so whatever
else may cause silence must be told from it: a link that went down, a frame that was not sent or not kept, an event loop
that was too busy to listen. Each of these ends a question with ProbeUnknownError, or makes it listen longer, and never
with a free address.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address
from types import TracebackType
from typing import ParamSpec, Self

from api.ranges import Address
from plugins.coordinator.probe.filter import REJECT, attach_filter, build_filter
from plugins.coordinator.probe.frames import (
    ALL_NODES,
    announcement,
    conflict_probe,
    gateway_request,
    group_mac,
    parse_mac,
    quiet_request,
    sighting,
    solicited_node,
)
from plugins.coordinator.probe.link import Link
from plugins.coordinator.probe.settings import ProbeSettings
from plugins.net.rtlink import mac_text

P = ParamSpec("P")

ETH_P_ALL = 0x0003
SOL_PACKET = 263
PACKET_ADD_MEMBERSHIP = 1
PACKET_STATISTICS = 6
PACKET_IGNORE_OUTGOING = 23
PACKET_MR_MULTICAST = 0
MEMBERSHIP = struct.Struct("=iHH8s")
"""Interface, type, address length, address (struct packet_mreq)."""
STATISTICS = struct.Struct("=II")
"""Frames that passed the filter, and those among them that found the buffer full (struct tpacket_stats)."""
FRAME_SIZE = 2048
"""Longest frame read; ARP and neighbour discovery come nowhere near it."""
FRAMES_PER_WAKE = 16
"""Frames read before other tasks get their turn: dissecting one takes a quarter of a millisecond."""
FRAMES_AT_END = 256
"""Frames read at most before silence counts as silence."""

_libc = ctypes.CDLL(None, use_errno=True)


class ProbeUnknownError(Exception):
    """It cannot be told whether anybody answers: the NIC is down or went down, or the kernel refused. No conflict."""


@dataclass(slots=True)
class Sockets:
    """What listens in a NIC's network namespace."""

    link: Link
    packets: socket.socket
    own: frozenset[str]
    """MACs that are no stranger's."""

    def close(self) -> None:
        """Close both. Waits about 11 ms for an RCU grace period of the kernel."""
        self.packets.close()
        self.link.close()


def open_new(ifname: str) -> Sockets:
    """Set the NIC up, which is yet to get its addresses, and open what listens on it. Raises OSError.

    In the network namespace of the calling thread, as `open_used`.
    """
    link = Link(ifname)
    try:
        link.set_up()
        return Sockets(link, _open_packets(ifname, link.index), frozenset((mac_text(link.mac),)))
    except BaseException:
        link.close()
        raise


def open_used(ifname: str) -> Sockets:
    """Open what listens on a NIC that a pod uses, and leave it as it is. Raises OSError.

    The pod's other NICs answer for its addresses too where they are on the same segment (`arp_ignore`); they are no
    strangers.
    """
    link = Link(ifname)
    try:
        own = frozenset(map(mac_text, link.macs()))
        return Sockets(link, _open_packets(ifname, link.index), own)
    except BaseException:
        link.close()
        raise


def _open_packets(ifname: str, index: int) -> socket.socket:
    """The socket that hears the NIC.

    A packet socket with a protocol listens on every NIC from its birth. With protocol 0 it hears nothing until it is
    bound, and when it is bound the filter is there: it never holds a frame that nobody asked for. It takes all
    protocols, because one socket per protocol would double the cost of closing.
    """
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    try:
        attach_filter(packets, REJECT)
        packets.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        packets.bind((ifname, ETH_P_ALL))
        join_group(packets.fileno(), index, ALL_NODES)
    except BaseException:
        packets.close()
        raise
    return packets


def join_group(fd: int, index: int, group: IPv6Address) -> None:
    """Have the NIC receive the Ethernet group of `group` for as long as the packet socket `fd` lives.

    This is independent of the namespace's own IPv6, which may be switched off or still checking its link-local address.
    By libc, since Python's setsockopt keeps the interpreter's lock while the kernel waits for its routing lock. Raises
    OSError.
    """
    mac = parse_mac(group_mac(group))
    request = MEMBERSHIP.pack(index, PACKET_MR_MULTICAST, len(mac), mac)
    if _libc.setsockopt(fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, request, len(request)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@dataclass(eq=False, slots=True)
class Question:
    """One address that is asked about until somebody answers or the wait is over.

    Its times are those of a plan that begins with the call. A late frame (busy event loop, the kernel's routing lock)
    first shortens the silence that follows it, and delays the end only if less than half the wait would be left after
    the first frame, or less than a quarter after the last.
    """

    address: Address
    frames: int
    wait: float
    begun: float
    counts_askers: bool
    """Whether somebody else who asks for the address is an answer, too."""
    answer: asyncio.Future[str | None]
    frame: bytes = b""
    sent: int = 0
    timer: asyncio.Handle | None = None

    def next_step(self, now: float) -> float:
        """When the next frame is due, or the end, if one was sent `now`."""
        if self.sent == self.frames:
            return max(self.begun + self.wait, now + self.wait / min(2 * self.frames, 4))
        pause = self.wait / 2 / (self.frames - 1)
        return max(self.begun + self.sent * pause, now + pause / 2)


class NicProbe:
    """Questions about addresses on one NIC, several at a time if need be. An asynchronous context manager.

    The first fault ends every open question and all later ones: after it the NIC is to be opened anew.
    """

    mac: str
    """The NIC's own MAC, lower case, with colons."""

    def __init__(
        self,
        ifname: str,
        settings: ProbeSettings,
        sockets: Sockets,
        aside: Callable[[Callable[[], None]], Awaitable[None]],
        retire: Callable[[Sockets], None],
    ) -> None:
        """`aside` runs what may block in a thread; `retire` closes the sockets in the background."""
        self.mac = mac_text(sockets.link.mac)
        self._ifname = ifname
        self._settings = settings
        self._sockets = sockets
        self._aside = aside
        self._retire = retire
        self._loop = asyncio.get_running_loop()
        self._questions: set[Question] = set()
        self._heard: tuple[set[Address], set[Address]] = (set(), set())
        self._joined: set[IPv6Address] = set()
        self._fault = ""
        self._closed = False
        self._up: asyncio.Future[None] = self._loop.create_future()
        if sockets.link.is_operational:
            self._up.set_result(None)
        self._loop.add_reader(sockets.packets, self._guard, self._receive, FRAMES_PER_WAKE)
        self._loop.add_reader(sockets.link, self._guard, self._follow_link)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; open questions end with ProbeUnknownError. The sockets close in the background."""
        if not self._closed:
            self._closed = True
            self._fail("the probe was closed")
            self._retire(self._sockets)

    async def operational(self) -> None:
        """Return when frames pass the NIC. Raises ProbeUnknownError; the caller sets the deadline."""
        self._check()
        await asyncio.shield(self._up)

    async def conflict(self, address: Address) -> str | None:
        """The MAC of a station that uses `address` or is about to take it, or None after the wait: it is free.

        For an address that is not on the NIC yet. Changes nobody's cache (RFC 5227 section 2.1.1, RFC 4862 section
        5.4). Raises ProbeUnknownError.
        """
        with self._question(address, self._settings.frames, self._settings.wait, counts_askers=True) as question:
            await asyncio.sleep(0)
            if isinstance(address, IPv6Address):
                # The owner's answer goes to all nodes; others that check the same address ask in its own group.
                await self._join(solicited_node(address))
            return await self._ask(question, conflict_probe(self.mac, address))

    async def rival(self, address: Address) -> str | None:
        """The MAC of another station that uses `address`, which this NIC has, or None after the wait.

        Who only asks whether it may have the address is none: the pod's own kernel answers that. Changes nobody's
        cache: the answer comes to this NIC alone. Raises ProbeUnknownError.
        """
        with self._question(address, self._settings.frames, self._settings.wait, counts_askers=False) as question:
            await asyncio.sleep(0)
            return await self._ask(question, quiet_request(self.mac, address))

    async def gateway(self, gateway: Address, source: Address | None = None) -> str | None:
        """The MAC of `gateway`, or None if it is silent throughout its wait.

        With a `source` it is asked in that name, so `source` must have been found free: neighbours note it with this
        NIC's MAC. Without, nothing is claimed, and a station that answers as a proxy, or only to its own subnet, may
        be silent. Raises ProbeUnknownError; ValueError if the addresses are of different families.
        """
        count, wait = self._settings.gateway_frames, self._settings.gateway_wait
        with self._question(gateway, count, wait, counts_askers=False) as question:
            await asyncio.sleep(0)
            frame = gateway_request(self.mac, source, gateway) if source else quiet_request(self.mac, gateway)
            return await self._ask(question, frame)

    async def announce(self, address: Address) -> None:
        """Tell the segment once that `address` is at this NIC, where another MAC may be remembered from before.

        Raises ProbeUnknownError if the frame cannot be sent.
        """
        self._check()
        self._guard(self._sockets.packets.send, announcement(self.mac, address))
        self._check()

    @contextmanager
    def _question(self, address: Address, frames: int, wait: float, *, counts_askers: bool) -> Iterator[Question]:
        """A question whose time runs from now on.

        Its asker then yields once to the event loop: the clocks of all that begin together are started before the
        first of them does the costly part, and so are the questions of one NIC, which share one filter.
        """
        self._check()
        answer: asyncio.Future[str | None] = self._loop.create_future()
        question = Question(address, frames, wait, self._loop.time(), counts_askers, answer)
        self._questions.add(question)
        try:
            yield question
        finally:
            self._questions.discard(question)
            if question.timer:
                question.timer.cancel()
            if answer.done() and not answer.cancelled():
                answer.exception()  # seen, also if another failure came first

    async def _ask(self, question: Question, frame: bytes) -> str | None:
        question.frame = frame
        self._guard(self._listen)
        # Not at once: who begins in the same turn of the loop listens before anybody asks, so that two hear each other.
        question.timer = self._loop.call_soon(self._guard, self._step, question)
        return await question.answer

    async def _join(self, group: IPv6Address) -> None:
        if group in self._joined:
            return
        # A copy of the descriptor, which stays valid if the NIC is closed while a thread is at it.
        fd, index = os.dup(self._sockets.packets.fileno()), self._sockets.link.index

        def join() -> None:
            try:
                join_group(fd, index, group)
            finally:
                os.close(fd)

        try:
            await self._aside(join)
        except OSError as error:
            raise ProbeUnknownError(f"{self._ifname}: {error.strerror or error}") from error
        self._joined.add(group)

    def _listen(self) -> None:
        """Let pass what can answer an open question; what can answer one that has ended may pass as well."""
        users = {question.address for question in self._questions}
        takers = {question.address for question in self._questions if question.counts_askers}
        if not (users <= self._heard[0] and takers <= self._heard[1]):
            attach_filter(self._sockets.packets, build_filter(self._sockets.link.mac, users, takers))
            self._heard = users, takers

    def _step(self, question: Question) -> None:
        """Send the next frame of `question`, or end it."""
        if question.answer.done():
            return
        if question.sent < question.frames:
            self._sockets.packets.send(question.frame)
            question.sent += 1
            question.timer = self._loop.call_at(
                question.next_step(self._loop.time()), self._guard, self._step, question
            )
            return
        # An answer may have come in time and not have been read yet.
        if not self._receive(FRAMES_AT_END):
            raise OSError("flooded with answers that are none")
        self._follow_link()
        _, lost = STATISTICS.unpack(self._sockets.packets.getsockopt(SOL_PACKET, PACKET_STATISTICS, STATISTICS.size))
        if question.answer.done():
            return
        if lost:
            raise OSError(f"{lost} frames were lost")
        question.answer.set_result(None)

    def _receive(self, limit: int) -> bool:
        """Read frames, up to `limit`; whether none is left."""
        for _ in range(limit):
            try:
                frame = self._sockets.packets.recv(FRAME_SIZE)
            except BlockingIOError:
                return True
            seen = sighting(frame)
            for question in self._questions:
                if (
                    seen
                    and seen.answers(question.address, self._sockets.own, question.counts_askers)
                    and not question.answer.done()
                ):
                    question.answer.set_result(seen.mac)
        return False

    def _follow_link(self) -> None:
        for is_operational, was_throughout in self._sockets.link.read_changes():
            if not was_throughout and self._up.done():
                raise OSError("the link went down")
            if is_operational and not self._up.done():
                self._up.set_result(None)

    def _guard(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run a callback of the event loop: a failure must not look like silence."""
        try:
            work(*args, **kwargs)
        except OSError as error:
            self._fail(str(error.strerror or error))
        except BaseException:
            self._fail("a fault of the agent")
            raise

    def _fail(self, reason: str) -> None:
        self._fault = self._fault or reason
        self._loop.remove_reader(self._sockets.packets)
        self._loop.remove_reader(self._sockets.link)
        if not self._up.done():
            self._up.set_exception(self._error())
            self._up.exception()  # seen, also if nobody waits for it any more
        for question in self._questions:
            if not question.answer.done():
                question.answer.set_exception(self._error())

    def _check(self) -> None:
        if self._fault:
            raise self._error()

    def _error(self) -> ProbeUnknownError:
        return ProbeUnknownError(f"{self._ifname}: {self._fault}")
