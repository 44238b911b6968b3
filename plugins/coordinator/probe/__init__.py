"""Probing: does anybody use this address, does that gateway answer? See docs/probing.md."""

from plugins.coordinator.probe.prober import Prober
from plugins.coordinator.probe.session import NicProbe, ProbeUnknownError
from plugins.coordinator.probe.settings import ProbeSettings

__all__ = ["NicProbe", "ProbeSettings", "ProbeUnknownError", "Prober"]
