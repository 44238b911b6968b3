"""A thousand questions, of both families, to a segment with every kind of neighbour; and how many answers were wrong.

Judged by when things happened and not by when they should have: an answer that left its sender before the wait was over
must be found, and one that a busy machine made later proves nothing.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from api.ranges import Address
from plugins.coordinator.probe import Prober, ProbeSettings, ProbeUnknownError
from tests.integration.probe_segment import Host, Segment, segment

ROOT = Path(__file__).parents[2]
MARGIN = 0.01
"""Seconds before the end of the wait that count as too late: a frame must be sent, forwarded and received."""
PAIRS = {"used": 150, "free": 225, "answers": 50, "announces": 35, "asks": 25, "flaps": 15}
"""How many addresses of either family are met in each way. `answers`, `announces` and `asks` are a rival that is silent
at first; with `flaps` the prober's link goes down and up while it asks, and the address is free."""


@dataclass
class Count:
    """How it went."""

    misses: list[str] = field(default_factory=list)
    """In use, and found free, or with a wrong MAC."""
    false_alarms: list[str] = field(default_factory=list)
    """Free, and found in use; or the link flapped and the answer was not "unknown"."""
    unknown: list[str] = field(default_factory=list)
    """Nothing happened to the link, and yet it could not be found out."""
    too_late: int = 0
    """What the machine did only after the wait: not judged."""
    judged: int = 0
    extra: list[float] = field(default_factory=list)
    """Seconds that the free addresses took beyond the wait."""


@dataclass
class Asked:
    """One question and what came of it."""

    address: Address
    way: str
    begun: float = 0.0
    ended: float = 0.0
    found: str | None = None
    flapped: float = 0.0
    """When the link had gone down; 0: never."""


def questions() -> list[Asked]:
    """All of them, in an order that is random and always the same."""
    asked: list[Asked] = []
    number = 0
    for way, count in PAIRS.items():
        for _ in range(count):
            number += 1
            asked += [Asked(ip_address(f"10.9.{8 + number // 200}.{number % 200 + 1}"), way)]
            asked += [Asked(ip_address(f"fd00:9::8:{number:x}"), way)]
    random.Random(5227).shuffle(asked)
    return asked


@contextmanager
def rival(host: Host, asked: list[Asked], least: float, most: float) -> Iterator[dict[str, float]]:
    """The late rival, running; the times at which it took each address are there afterwards."""
    delays = random.Random(4862)
    ways = {
        str(each.address): (each.way, delays.uniform(least, most))
        for each in asked
        if each.way in ("answers", "announces", "asks")
    }
    command = [
        *("ip", "netns", "exec", host.netns),
        *(sys.executable, "-m", "tests.integration.probe_rival", host.mac),
    ]
    sent: dict[str, float] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(ways) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "listening\n"
            yield sent
            out, _ = process.communicate(timeout=20)
            sent |= json.loads(out)
        finally:
            process.kill()


def owner(lan: Segment, asked: list[Asked]) -> Host:
    """A host whose kernel has the used addresses."""
    host = lan.add_host()
    lines = [f"address add {a.address}/128 dev eth0 nodad" for a in asked if a.way == "used" and a.address.version == 6]
    lines += [f"address add {a.address}/32 dev eth0" for a in asked if a.way == "used" and a.address.version == 4]
    subprocess.run(["ip", "-n", host.netns, "-batch", "-"], input="\n".join(lines), text=True, check=True)
    return host


async def _flap(host: Host, each: Asked) -> None:
    """Set the NIC down and up: the kernel tells at once, of a carrier only when it finds the time."""
    await asyncio.to_thread(host.ip, "link", "set", "eth0", "down")
    each.flapped = time.monotonic()
    await asyncio.to_thread(host.ip, "link", "set", "eth0", "up")


async def _ask(prober: Prober, host: Host, each: Asked) -> None:
    try:
        async with await prober.open(host.fd, "eth0") as nic:
            each.begun = time.monotonic()
            question = asyncio.ensure_future(nic.conflict(each.address))
            if each.way == "flaps":
                await asyncio.sleep(0.01)
                await _flap(host, each)
            each.found = await question
    except ProbeUnknownError as error:
        each.found = f"unknown: {error}"
    each.ended = time.monotonic()


async def _all(asked: list[Asked], lan: Segment, settings: ProbeSettings, parallel: int) -> None:
    fragile, *hosts = [lan.add_host() for _ in range(9)]
    prober, slots, one = Prober(settings), asyncio.Semaphore(parallel), asyncio.Semaphore(1)

    async def run(number: int, each: Asked) -> None:
        """Links that flap are one host's, one question at a time: they would disturb each other."""
        flaps = each.way == "flaps"
        async with one if flaps else slots:
            await _ask(prober, fragile if flaps else hosts[number % len(hosts)], each)

    try:
        await asyncio.gather(*(run(number, each) for number, each in enumerate(asked)))
    finally:
        await prober.close()


def judge(asked: list[Asked], settings: ProbeSettings, sent: dict[str, float], used: str, late: str) -> Count:
    """What was wrong."""
    count = Count()
    for each in asked:
        text = f"{each.way} {each.address}: {each.found}"
        over = each.begun + settings.wait - MARGIN
        if each.way == "flaps" and not 0 < each.flapped < over:
            count.too_late += 1
            continue
        if each.way in ("answers", "announces", "asks") and sent.get(str(each.address), over) >= over:
            count.too_late += each.found is None
            if each.found is None:
                continue
        count.judged += 1
        unknown = each.found is not None and each.found.startswith("unknown")
        if each.way == "flaps":
            count.false_alarms += [] if unknown else [text]
        elif unknown:
            count.unknown.append(text)
        elif each.way == "free":
            count.false_alarms += [text] if each.found else []
            count.extra.append(each.ended - each.begun - settings.wait)
        elif each.found != (used if each.way == "used" else late):
            count.misses.append(text)
    return count


def thousand(settings: ProbeSettings, parallel: int, least: float, most: float) -> Count:
    """Ask a thousand times, `parallel` at once; rivals answer between `least` and `most` seconds after a question."""
    asked = questions()
    with segment() as lan:
        neighbour, other = owner(lan, asked), lan.add_host()
        with rival(other, asked, least, most) as sent:
            asyncio.run(_all(asked, lan, settings, parallel))
        return judge(asked, settings, sent, neighbour.mac, other.mac)
