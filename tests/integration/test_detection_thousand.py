"""A thousand probes: nobody is missed, and nobody is accused."""

from __future__ import annotations

from plugins.coordinator.probe import ProbeSettings
from tests.integration.probe_thousand import PAIRS, thousand


def test_a_thousand_probes_without_a_miss_or_a_false_alarm() -> None:
    """Used, silent, late and appearing neighbours of both families, and links that flap. No speed is judged here."""
    count = thousand(ProbeSettings(wait=1.0), parallel=100, least=0.1, most=0.5)
    assert 2 * sum(PAIRS.values()) == 1000
    assert not count.misses
    assert not count.false_alarms
    assert not count.unknown
    assert count.judged + count.too_late == 1000
    assert count.too_late < 100, "the machine was too busy for this to show anything"
