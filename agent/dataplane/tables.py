"""The service maps, written so that lookups which run meanwhile are right. Blocking: call it from a thread."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import NamedTuple, Self

from agent.dataplane.bpf import BpfError, Map
from agent.dataplane.desired import Backend, Backends, Frontend
from agent.dataplane.errors import MapFullError
from agent.dataplane.hooks import Pins
from agent.dataplane.pack import ERRORS, Contents, Programmed
from agent.dataplane.plan import Plan, ServiceIds, difference, place, read_services, used_ids

Changes = Mapping[Frontend, Backends | None]
"""Backends that frontends should have; None: the frontend should not exist."""


class Report(NamedTuple):
    """What one call did."""

    writes: int
    """Entries put or removed."""
    unprogrammed: dict[Frontend, MapFullError]
    """Frontends that stay as they were, or out, for want of room."""


class ServiceTables:
    """The pinned maps, and what this process knows to be in them. One caller at a time."""

    def __init__(self, maps: dict[str, Map]) -> None:
        self._maps = maps
        self._programmed: dict[Frontend, Programmed] = {}
        self._ids = ServiceIds()
        self._used: set[int] = set()

    @classmethod
    def open(cls, pins: Pins) -> Self:
        """Open what the loader pinned. Raises BpfError."""
        maps: dict[str, Map] = {}
        try:
            for name in ("services", "slots", "members", "chosen", "errors"):
                maps[name] = Map.open(f"{pins.maps}/{name}", per_cpu=name in ("chosen", "errors"))
        except OSError:
            for opened in maps.values():
                opened.close()
            raise
        return cls(maps)

    def close(self) -> None:
        """Give the descriptors back."""
        for opened in self._maps.values():
            opened.close()

    @property
    def programmed(self) -> Mapping[Frontend, Programmed]:
        """Services as they are in the maps, as far as this process knows."""
        return self._programmed

    def read(self) -> Contents:
        """What really is in the maps. Raises BpfError."""
        return Contents(*(dict(self._maps[name].items()) for name in ("services", "slots", "members")))

    def reconcile(self, desired: Mapping[Frontend, Backends]) -> Report:
        """Make the maps hold `desired` and nothing else, whatever is in them. Raises BpfError.

        Services keep their ids, and backends their slots, so running conversations keep their backends.
        """
        have = self.read()
        counters = [key for key, _ in self._maps["chosen"].items()]
        found = read_services(have)
        self._used = used_ids(have, counters)
        self._ids.skip(self._used)
        want, target = Contents(), dict[Frontend, Programmed]()
        for frontend, backends in desired.items():
            number, slots = found.get(frontend, (0, []))
            target[frontend] = Programmed(number or self._new_id(), place(slots, backends))
            want.add(frontend, target[frontend])
        plan = difference(have, want)
        live = {service.id.to_bytes(4, "little") for service in target.values()}
        plan.drop_chosen = [key for key in counters if key not in live]
        try:
            self._write(plan)
        except MapFullError:
            writes = self._keep({frontend: found[frontend] for frontend in desired.keys() & found.keys()})
            report = self.program(desired)
            return Report(writes + report.writes, report.unprogrammed)
        self._programmed = target
        self._used = self._known_ids()
        return Report(len(plan), {})

    def _keep(self, found: Mapping[Frontend, tuple[int, list[Backend | None]]]) -> int:
        """Remove all but these services, and those of them that miss a slot; returns the number of writes."""
        have, want = self.read(), Contents()
        self._programmed = {}
        for frontend, (number, slots) in found.items():
            whole = tuple(slot for slot in slots if slot is not None)
            if len(whole) == len(slots):
                self._programmed[frontend] = Programmed(number, whole)
                want.add(frontend, self._programmed[frontend])
        plan = difference(have, want)
        self._write(plan)
        self._used = self._known_ids()
        return len(plan)

    def program(self, changes: Changes) -> Report:
        """Change some services. Raises BpfError.

        Where there is no room for all of it, what shrinks goes before what grows, and what does not fit stays as it is.
        """

        def growth(frontend: Frontend) -> int:
            old, new = self._programmed.get(frontend), changes[frontend]
            return (len(new) if new is not None else -1) - (len(old.slots) if old is not None else -1)

        try:
            return Report(self._apply(changes), {})
        except MapFullError:
            writes, unprogrammed = 0, dict[Frontend, MapFullError]()
        for frontend in sorted(changes, key=lambda frontend: (growth(frontend), frontend)):
            try:
                writes += self._apply({frontend: changes[frontend]})
            except MapFullError as error:
                unprogrammed[frontend] = error
        return Report(writes, unprogrammed)

    def _apply(self, changes: Changes) -> int:
        """Write all of `changes`, or none of it and raise MapFullError; returns the number of writes."""
        have, want, target = Contents(), Contents(), dict[Frontend, Programmed]()
        for frontend, backends in changes.items():
            old = self._programmed.get(frontend)
            if old is not None:
                have.add(frontend, old)
            if backends is not None:
                number = old.id if old is not None else self._new_id()
                target[frontend] = Programmed(number, place(old.slots if old is not None else (), backends))
                want.add(frontend, target[frontend])
        plan = difference(have, want)
        try:
            self._write(plan)
        except MapFullError:
            both = Contents(have.services | want.services, have.slots | want.slots, have.members | want.members)
            self._write(difference(both, have))
            raise
        for frontend in changes:
            gone = self._programmed.pop(frontend, None)
            if gone is not None:
                self._used.discard(gone.id)
            if frontend in target:
                self._programmed[frontend] = target[frontend]
                self._used.add(target[frontend].id)
        return len(plan)

    def _known_ids(self) -> set[int]:
        return {service.id for service in self._programmed.values()}

    def _new_id(self) -> int:
        return self._ids.next(self._used)

    def _write(self, plan: Plan) -> None:
        maps = self._maps
        try:
            maps["members"].update(plan.put_members)
            maps["slots"].update(plan.put_slots)
            maps["services"].update(plan.put_services)
        except BpfError as error:
            if error.errno in (errno.E2BIG, errno.ENOMEM):
                raise MapFullError(error.subject) from error
            raise
        maps["services"].delete(plan.drop_services)
        maps["slots"].delete(plan.drop_slots)
        maps["members"].delete(plan.drop_members)
        maps["chosen"].delete(plan.drop_chosen)

    def chosen(self) -> dict[int, int]:
        """How often a backend of each service (by id) was chosen on this node. Raises BpfError."""
        counts = self._maps["chosen"].items()
        return {int.from_bytes(key, "little"): sum(memoryview(value).cast("Q")) for key, value in counts}

    def errors(self) -> dict[str, int]:
        """What the programs could not do, by name. Raises BpfError."""
        errors = self._maps["errors"]
        values = (errors.lookup(index.to_bytes(4, "little")) or b"" for index in range(len(ERRORS)))
        return {name: sum(memoryview(value).cast("Q")) for name, value in zip(ERRORS, values, strict=True)}
