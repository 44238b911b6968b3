"""From what is in the maps and what should be to the writes in between. Pure.

The order of writes keeps lookups right that run meanwhile: a backend's slot and membership exist before the service's
size counts it, and go after the size no longer does. Service ids are not used again while the agent lives, and after a
restart only above all that are in use, so a lookup that holds an old id finds nothing, never a foreign backend.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from agent.dataplane.desired import Backend, Backends, Frontend
from agent.dataplane.pack import (
    MEMBER,
    SERVICE,
    SLOT,
    Contents,
    unpack_backend,
    unpack_frontend,
)

_IDS = 1 << 32

Entries = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class Plan:
    """Writes in the order of the fields."""

    put_members: Entries = field(default_factory=list)
    put_slots: Entries = field(default_factory=list)
    put_services: Entries = field(default_factory=list)
    drop_services: list[bytes] = field(default_factory=list)
    drop_slots: list[bytes] = field(default_factory=list)
    drop_members: list[bytes] = field(default_factory=list)
    drop_chosen: list[bytes] = field(default_factory=list)
    """Counters of services that are gone."""

    def __len__(self) -> int:
        puts = len(self.put_members) + len(self.put_slots) + len(self.put_services)
        return puts + len(self.drop_services) + len(self.drop_slots) + len(self.drop_members)


class ServiceIds:
    """Numbers for services, going up; beyond 32 bits from 1 again, past those in use."""

    def __init__(self) -> None:
        self._last = 0

    def skip(self, in_use: Iterable[int]) -> None:
        """Give out numbers only above these."""
        self._last = max(self._last, max(in_use, default=0))

    def next(self, in_use: Collection[int]) -> int:
        """A number that was not given out before, or not for four billion services."""
        while True:
            self._last = (self._last + 1) % _IDS or 1
            if self._last not in in_use:
                return self._last


def place(old: Sequence[Backend | None], backends: Backends) -> tuple[Backend, ...]:
    """Slots for `backends` that leave as many as possible where they are: one change of backends is one write."""
    wanted = set(backends)
    slots: list[Backend | None] = []
    for backend in old[: len(backends)]:
        if backend is not None and backend in wanted:
            wanted.discard(backend)
            slots.append(backend)
        else:
            slots.append(None)
    slots += [None] * (len(backends) - len(slots))
    rest = iter(sorted(wanted))
    return tuple(slot if slot is not None else next(rest) for slot in slots)


def difference(have: Contents, want: Contents) -> Plan:
    """What turns `have` into `want`."""
    old_ids = {SERVICE.unpack(value)[0] for value in have.services.values()}
    new_ids = {SERVICE.unpack(value)[0] for value in want.services.values()}
    return Plan(
        put_members=_changed(have.members, want.members),
        put_slots=_changed(have.slots, want.slots),
        put_services=_changed(have.services, want.services),
        drop_services=_gone(have.services, want.services),
        drop_slots=_gone(have.slots, want.slots),
        drop_members=_gone(have.members, want.members),
        drop_chosen=[number.to_bytes(4, "little") for number in old_ids - new_ids],
    )


def _changed(have: Mapping[bytes, bytes], want: Mapping[bytes, bytes]) -> Entries:
    return [(key, value) for key, value in want.items() if have.get(key) != value]


def _gone(have: Mapping[bytes, bytes], want: Mapping[bytes, bytes]) -> list[bytes]:
    return [key for key in have if key not in want]


def read_services(have: Contents) -> dict[Frontend, tuple[int, list[Backend | None]]]:
    """The services in the maps, with a None for each slot that is missing below the last.

    Of two with the same id (which we never write) one is left out, so that it gets a new id.
    """
    slots_of: dict[int, dict[int, bytes]] = {}
    for key, packed in have.slots.items():
        number, index = SLOT.unpack(key)
        slots_of.setdefault(number, {})[index] = packed
    result: dict[Frontend, tuple[int, list[Backend | None]]] = {}
    most = 2 * len(have.slots)  # a nonsensical index must not make a list of that length
    seen: set[int] = set()
    for key, value in have.services.items():
        number, count = SERVICE.unpack(value)
        if number in seen:
            continue
        seen.add(number)
        found = {index: packed for index, packed in slots_of.get(number, {}).items() if index < min(count, most)}
        slots = [found.get(index) for index in range(max(found, default=-1) + 1)]
        result[unpack_frontend(key)] = (number, [unpack_backend(slot) if slot is not None else None for slot in slots])
    return result


def used_ids(have: Contents, chosen: Iterable[bytes]) -> set[int]:
    """Every id that any map knows, left-overs included."""
    used = {SERVICE.unpack(value)[0] for value in have.services.values()}
    used |= {SLOT.unpack(key)[0] for key in have.slots}
    used |= {MEMBER.unpack(key)[0] for key in have.members}
    return used | {int.from_bytes(key, "little") for key in chosen}
