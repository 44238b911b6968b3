"""What the dataplane tells Prometheus: the agent's side as ordinary metrics, the kernel's side read when asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from socket import AF_INET, AF_INET6, inet_ntop

from prometheus_client import Counter, Gauge
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from agent.dataplane.desired import PROTOCOLS, Desired, Frontend
from agent.dataplane.tables import ServiceTables

log = logging.getLogger(__name__)

READY = Gauge("spiderpool_dataplane_ready", "1 while hooks are attached and maps follow the services, else 0.")
FRONTENDS = Gauge("spiderpool_dataplane_frontends", "Service addresses with port and protocol in the maps.")
BACKENDS = Gauge("spiderpool_dataplane_backends", "Backends in the maps, once per frontend that they serve.")
UNPROGRAMMED = Gauge("spiderpool_dataplane_unprogrammed_frontends", "Frontends that are not as desired: a map is full.")
CONFLICTS = Gauge("spiderpool_dataplane_conflicting_frontends", "Frontends that several services claim.")
WRITES = Counter("spiderpool_dataplane_map_writes", "Map entries put or removed.")
REPAIRS = Counter("spiderpool_dataplane_drift_repairs", "Map entries that the periodic check found wrong and repaired.")
FAILURES = Counter("spiderpool_dataplane_failures", "Attempts to load, attach or write that failed.", ["reason"])
LOADS = Counter("spiderpool_dataplane_loads", "Runs of the loader by what it did with the programs.", ["programs"])

_NAMES = {number: name for name, number in PROTOCOLS.items()}


def frontend_text(frontend: Frontend) -> str:
    """`10.96.0.10:53/UDP`, `[fd00::a]:53/UDP`."""
    four = len(frontend.address) == 4
    address = inet_ntop(AF_INET if four else AF_INET6, frontend.address)
    return f"{address if four else f'[{address}]'}:{frontend.port}/{_NAMES.get(frontend.protocol, frontend.protocol)}"


@dataclass(frozen=True, slots=True)
class KernelCounters(Collector):
    """The programs' own counters. Only services that were used on this node have a line."""

    source: Callable[[], tuple[ServiceTables, Desired] | None]
    """What to read; None: the maps are not open."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The counters as they are now; none if the maps cannot be read."""
        chosen = CounterMetricFamily(
            "spiderpool_dataplane_service_chosen",
            "How often a backend was chosen for a connection or UDP conversation, since the service exists here.",
            labels=["namespace", "service", "frontend"],
        )
        errors = CounterMetricFamily(
            "spiderpool_dataplane_hook_errors",
            "What the socket programs could not do: no_backend and slot_missing were refused.",
            labels=["error"],
        )
        source = self.source()
        if source is not None:
            tables, desired = source
            try:
                self._read(tables, desired, chosen, errors)
            except OSError as error:
                log.warning("reading the dataplane's counters: %s", error)
        yield chosen
        yield errors

    @staticmethod
    def _read(
        tables: ServiceTables, desired: Desired, chosen: CounterMetricFamily, errors: CounterMetricFamily
    ) -> None:
        counts = tables.chosen()
        for frontend, service in dict(tables.programmed).items():
            owner = desired.owner(frontend)
            if service.id in counts and owner is not None:
                chosen.add_metric([owner.namespace, owner.name, frontend_text(frontend)], counts[service.id])
        for name, count in tables.errors().items():
            errors.add_metric([name], count)
