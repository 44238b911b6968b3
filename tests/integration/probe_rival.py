"""A station of its own process that takes addresses when somebody asks for them, each in its way and after its delay.

    ip netns exec NAME python -m tests.integration.probe_rival MAC

Standard input: JSON, address to [way, seconds after the first question]; then it prints a line and answers until
standard input ends, and prints JSON: address to the time (CLOCK_MONOTONIC) at which it had sent its frame.
"""

from __future__ import annotations

import heapq
import json
import select
import sys
import time
from ipaddress import IPv4Address, ip_address

from api.ranges import Address
from plugins.coordinator.probe.frames import announcement, conflict_probe, parse_mac, sighting
from tests.integration.probe_segment import raw_socket


def taking(way: str, mac: str, address: Address) -> bytes:
    """The frame by which `mac` shows that it has, or is to have, the address."""
    if way == "asks":
        return conflict_probe(mac, address)
    frame = announcement(mac, address)
    if way == "answers" and isinstance(address, IPv4Address):
        return frame[:20] + b"\0\2" + frame[22:38] + bytes(4)
    return frame


def main() -> None:
    """See above."""
    mac = sys.argv[1]
    ways = {ip_address(text): tuple(how) for text, how in json.loads(sys.stdin.readline()).items()}
    packets = raw_socket()
    sent: dict[str, float] = {}
    due: list[tuple[float, str, str]] = []
    print("listening", flush=True)
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        ready, _, _ = select.select([packets, sys.stdin], [], [], wait)
        if sys.stdin in ready:
            break
        if packets in ready:
            frame = packets.recv(2048)
            # Frames of its own kind are few; most are others' and dissecting them would make it late.
            seen = sighting(frame) if frame[6:12] != parse_mac(mac) else None
            if seen is not None and seen.asking and seen.address in ways:
                way, delay = ways.pop(seen.address)
                heapq.heappush(due, (time.monotonic() + delay, str(seen.address), way))
        while due and due[0][0] <= time.monotonic():
            _, text, way = heapq.heappop(due)
            packets.send(taking(way, mac, ip_address(text)))
            sent[text] = time.monotonic()
    print(json.dumps(sent))


if __name__ == "__main__":
    main()
