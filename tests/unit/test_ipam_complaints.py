"""How often pods are told why they get no address."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from api.core import Pod
from api.meta import ObjectMeta
from plugins.errors import CniError, ExhaustedError, InternalError, NoPoolError
from plugins.ipam import complaints
from plugins.ipam.complaints import Complaints


class Heard:
    """A recorder that only listens."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def warning(self, about: Pod, reason: str, message: str) -> None:
        self.events.append((about.metadata.name, reason))


def pod(name: str) -> Pod:
    return Pod(metadata=ObjectMeta(name=name, namespace="n", uid=f"u-{name}"))


def told(script: Sequence[tuple[float, str, CniError]], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is written of complaints at these times."""
    heard: Any = Heard()
    now = 1000.0

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with monkeypatch.context() as patch:
            there = Complaints(heard)
            for at, name, error in script:
                patch.setattr(loop, "time", lambda at=at: now + at)
                there.about(pod(name), "eth0", error)

    asyncio.run(main())
    events: list[tuple[str, str]] = heard.events
    return events


def test_one_reason_is_told_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    none, full = NoPoolError("no"), ExhaustedError("full")
    script = [(0.0, "a", none), (1.0, "a", NoPoolError("no", "more")), (1.0, "a", full), (2.0, "b", none)]
    script += [(31.0, "a", none), (3.0, "c", InternalError("ours"))]
    assert told(script, monkeypatch) == [
        ("a", "NoPoolAvailable"),
        ("a", "AddressesExhausted"),
        ("b", "NoPoolAvailable"),
        ("a", "NoPoolAvailable"),
    ]


def test_a_storm_is_bounded_and_time_heals(monkeypatch: pytest.MonkeyPatch) -> None:
    storm = [(0.0, f"p{n}", NoPoolError("no")) for n in range(500)]
    assert len(told(storm, monkeypatch)) == complaints._BURST
    later = [(10.0, f"q{n}", NoPoolError("no")) for n in range(500)]
    assert len(told([*storm, *later], monkeypatch)) == complaints._BURST + 10
