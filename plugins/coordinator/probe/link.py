"""The NIC's link state, by route netlink: set it up, and be told when it goes down.

A frame that is sent while the link is down is lost without an error on many drivers, and silence is what a free
address sounds like. So the state is followed for as long as there is a question, not only looked at once.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from plugins.net import rtlink
from plugins.net.netlink import NETLINK_ROUTE, Netlink

REPLY_WAIT = 2.0
"""Seconds for the kernel's answer, which is there when the request returns; only a bound."""


class Link:
    """One Ethernet NIC, seen from a netlink socket in its network namespace."""

    mac: bytes
    """The NIC's own MAC, as last told."""

    def __init__(self, ifname: str) -> None:
        """Subscribe to changes, then look, so that no change falls between. Call it in the NIC's namespace.

        Raises OSError, also if there is no such NIC or it is no Ethernet.
        """
        self._ifname = ifname
        self._kernel = Netlink(NETLINK_ROUTE, REPLY_WAIT, rtlink.GROUP_LINKS)
        try:
            self._look()
        except BaseException:
            self._kernel.close()
            raise

    @property
    def index(self) -> int:
        """The interface index."""
        return self._state.ifindex

    @property
    def is_up(self) -> bool:
        """Whether it is administratively up."""
        return bool(self._state.flags & rtlink.FLAG_UP)

    @property
    def is_operational(self) -> bool:
        """Whether frames pass, as far as the kernel knows."""
        return self._state.is_operational

    def fileno(self) -> int:
        """The descriptor, readable when there may be changes."""
        return self._kernel.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._kernel.close()

    def set_up(self) -> None:
        """Set the NIC up if it is down. Blocks for the kernel's routing lock. Raises OSError."""
        if not self.is_up:
            self._kernel.request((rtlink.link_set(self.index, f"set {self._ifname} up", up=True),))
            self._look()

    def macs(self) -> frozenset[bytes]:
        """The MACs of all links of the namespace. Raises OSError."""
        states = map(rtlink.parse_link_state, self._kernel.dump(rtlink.link_dump()))
        return frozenset(state.mac for state in states if state is not None)

    def read_changes(self) -> Iterator[tuple[bool, bool]]:
        """After each change of the NIC that is waiting: whether it is operational, and whether it was so throughout.

        A carrier that comes back soon may be told of once, when it is there again; the kernel's count gives it away.
        A NIC that goes away is down before. Never waits. Raises OSError: ENOBUFS if changes were lost.
        """
        for kind, body in self._kernel.pending():
            losses = self._state.losses
            if kind == rtlink.RTM_NEWLINK and self._learn(body):
                yield self.is_operational, self.is_operational and self._state.losses == losses

    def _look(self) -> None:
        """Ask for the NIC's state. Changes that are told before the answer are older than it, and passed over."""
        for reply in self._kernel.request((rtlink.link_get(self._ifname),)):
            state = rtlink.parse_link_state(reply.body)
            if state is not None:
                self._take(state)

    def _learn(self, body: bytes) -> bool:
        """Take over what a message says about this NIC; whether it said anything."""
        state = rtlink.parse_link_state(body)
        if state is None or state.ifindex != self.index:
            return False
        self._take(state)
        return True

    def _take(self, state: rtlink.LinkState) -> None:
        if state.hardware != rtlink.ETHERNET:
            raise OSError(errno.ENOTSUP, "not an Ethernet NIC")
        self._state = state
        self.mac = state.mac
