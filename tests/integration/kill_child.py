"""Real agents that kill themselves in an ADD: `python -m tests.integration.kill_child ORDER`.

It has everything imported, and forks an agent for each JSON line on standard input, which names the network namespace
that is its node, its command line, its environment and the file for its log. What the coordinator's ADD changes by
rtnetlink goes to the kernel one message at a time, and when as many changes are done as ORDER says (a file that is
mapped: the number, and how many were done) the agent ends by SIGKILL. A transaction of nf_tables is one change; the
kernel takes it whole or not at all. A sysctl is one, too.
"""

from __future__ import annotations

import asyncio
import gc
import json
import mmap
import os
import signal
import struct
import sys
import threading
from collections.abc import Sequence
from typing import Any
from unittest import mock

import agent.rooms
import plugins.coordinator.coordinator as plugin
from agent import daemon
from agent.settings import SOURCES
from daemon.logs import configure
from plugins.coordinator import add, steps
from plugins.net.netlink import NETLINK_NETFILTER, Exchange, Failure, Message, Netlink, Reply
from plugins.net.netns import enter

ORDER = struct.Struct("=II")
_SO_PROTOCOL = 38
_REQUEST = 2
"""Of four message types in a row (new, delete, get, set) the one that only asks."""


class Hangman:
    """Counts changes of ADDs, and ends the process at the one that the order names."""

    def __init__(self, order: mmap.mmap) -> None:
        self._order = order
        self._adding = threading.local()
        self._attach = add.attach
        self._exchange = Netlink.exchange
        self._write_sysctl = steps.write_sysctl

    def take_place(self) -> None:
        """Stand between the plugin and the kernel."""

        def attach(*arguments: Any) -> Any:
            self._adding.now = True
            return self._attach(*arguments)

        def exchange(netlink: Netlink, messages: Sequence[Message], final: int = -1) -> Exchange:
            if not getattr(self._adding, "now", False):
                return self._exchange(netlink, messages, final)
            if netlink._socket.getsockopt(1, _SO_PROTOCOL) == NETLINK_NETFILTER:
                done = self._exchange(netlink, messages, final)
                self._changed()
                return done
            return self._one_by_one(netlink, messages)

        def write_sysctl(path: str, value: str) -> str:
            former = self._write_sysctl(path, value)
            self._changed()
            return former

        for owner, name, ours in (
            (plugin, "attach", attach),
            (Netlink, "exchange", exchange),
            (steps, "write_sysctl", write_sysctl),
        ):
            mock.patch.object(owner, name, ours).start()

    def _one_by_one(self, netlink: Netlink, messages: Sequence[Message]) -> Exchange:
        failures: list[Failure] = []
        replies: list[Reply] = []
        for position, message in enumerate(messages):
            done = self._exchange(netlink, (message,))
            failures += (failure._replace(position=position) for failure in done.failures)
            replies += (reply._replace(position=position) for reply in done.replies)
            if message.type % 4 != _REQUEST:
                self._changed()
        return Exchange(failures, replies)

    def _changed(self) -> None:
        fatal, done = ORDER.unpack_from(self._order)
        if fatal:
            ORDER.pack_into(self._order, 0, fatal, done + 1)
            if done + 1 == fatal:
                os.kill(os.getpid(), signal.SIGKILL)


def run(config: dict[str, Any]) -> int:
    """Be the agent."""
    with open(config["netns"], "rb") as netns:
        enter(netns.fileno())
    with open(config["log"], "ab", buffering=0) as log:
        os.dup2(log.fileno(), 2)
    os.environ.update(config["env"])
    settings, _ = SOURCES.load(config["flags"], os.environ)
    configure(settings.log.level)
    return asyncio.run(daemon.run(settings, agent.rooms.furnish))


def main(path: str) -> None:
    """Fork an agent for each object, and answer with its process id; for such a number, with how that process ended."""
    with open(path, "r+b") as file:
        order = mmap.mmap(file.fileno(), ORDER.size)
    Hangman(order).take_place()
    gc.collect()
    gc.freeze()  # an agent that starts would walk, and so copy, all of it
    for line in sys.stdin:
        config = json.loads(line)
        if isinstance(config, int):
            _, status = os.waitpid(config, 0)
            sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        else:
            pid = os.fork()
            if pid == 0:
                os._exit(run(config))
            sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
