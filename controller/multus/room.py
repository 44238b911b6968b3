"""Keeps NetworkAttachmentDefinitions equal to the SpiderMultusConfigs that they are made of.

Both kinds are watched, so a definition that somebody deletes or edits is repaired at once. Against somebody who writes
it again and again, as another operator may, this would be an endless quarrel at the speed of the API server: repairs of
one definition for one and the same configuration come ever less often.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from api.multusconfig import MultusConfig, network_name
from api.nad import NetworkAttachmentDefinition
from controller.multus.decide import Decision, decide
from controller.multus.settings import MultusSettings
from controller.room import Desk
from controller.work import WorkQueue

Key = tuple[str, str]
"""Namespace and name of a NetworkAttachmentDefinition."""

CREATED = "NetworkCreated"
TAKEN_OVER = "NetworkTakenOver"
CONFLICT = "NetworkConflict"
INVALID = "InvalidConfiguration"

_FREE_REPAIRS = 5
"""Repairs at once: somebody tries something by hand. Further ones in a row wait, twice as long each time."""
_FIRST_PAUSE = 1.0


@dataclass(slots=True)
class _Repairs:
    """Repairs in a row of one definition, for one version of its configuration."""

    version: str
    count: int = 0
    last: float = 0.0

    def due(self, longest: float) -> float:
        """When the next one may be, on the loop's clock."""
        if self.count < _FREE_REPAIRS:
            return 0.0
        return self.last + min(longest, _FIRST_PAUSE * 2.0 ** min(self.count - _FREE_REPAIRS, 16))


class MultusRoom:
    """The leader's duty."""

    def __init__(self, desk: Desk, settings: MultusSettings) -> None:
        self._store = desk.store
        self._events = desk.events
        self._settings = settings
        self._configs = desk.caches.of(MultusConfig)
        self._networks = desk.caches.optional(NetworkAttachmentDefinition)
        self._wanting: dict[Key, dict[Key, None]] = {}
        """Definition to the configurations (namespace and name) that want it."""
        self._repairs: dict[Key, _Repairs] = {}

    async def run(self) -> None:
        """Keep the definitions until cancelled."""
        self._wanting.clear()
        self._repairs.clear()
        queue = WorkQueue("multusconfig", self._reconcile)

        def config_changed(old: MultusConfig | None, new: MultusConfig | None) -> None:
            for key in self._note(old, new):
                queue.add(key)

        def network_changed(old: NetworkAttachmentDefinition | None, new: NetworkAttachmentDefinition | None) -> None:
            metadata = (new or old).metadata  # type: ignore[union-attr]  # one of them is there
            if (key := (metadata.namespace, metadata.name)) in self._wanting:
                queue.add(key)

        with ExitStack() as stack:
            stack.callback(self._configs.listen(config_changed))
            stack.callback(self._networks.listen(network_changed))
            await queue.run()

    def _note(self, old: MultusConfig | None, new: MultusConfig | None) -> Iterable[Key]:
        """Take in a change of a configuration; the definitions that it concerns."""
        keys = []
        for config in (old, new):
            if config is None:
                continue
            metadata = config.metadata
            key = (metadata.namespace, network_name(metadata))
            own = (metadata.namespace, metadata.name)
            if config is new:
                self._wanting.setdefault(key, {})[own] = None
            elif key in self._wanting:
                self._wanting[key].pop(own, None)
                if not self._wanting[key]:
                    del self._wanting[key]
            keys.append(key)
        return dict.fromkeys(keys)

    async def _reconcile(self, key: Key) -> float | None:
        """Bring one definition in order."""
        found = [self._configs.get(name, namespace) for namespace, name in self._wanting.get(key, ())]
        existing = self._networks.get(key[1], key[0])
        decision = decide([each for each in found if each is not None], existing)
        self._tell(key, decision)
        if decision.config is None:
            self._repairs.pop(key, None)
            return None
        if decision.write is None:
            return None
        clock = asyncio.get_running_loop().time()
        repairs = self._repairs.get(key)
        if repairs is None or repairs.version != decision.config.metadata.resource_version:
            repairs = self._repairs[key] = _Repairs(decision.config.metadata.resource_version)
        elif clock - repairs.last > 2 * self._settings.resync:
            repairs.count = 0
        if (due := repairs.due(self._settings.resync)) > clock:
            return due - clock
        await self._write(decision.config, decision.write, existing)
        repairs.count, repairs.last = repairs.count + 1, clock
        return None

    async def _write(
        self, config: MultusConfig, wanted: NetworkAttachmentDefinition, existing: NetworkAttachmentDefinition | None
    ) -> None:
        called = f"{wanted.metadata.namespace}/{wanted.metadata.name}"
        if existing is None:
            written = await self._store.create(wanted)
            self._events.normal(config, CREATED, f"created the NetworkAttachmentDefinition {called}")
        else:
            written = await self._store.update(wanted)
            if existing.metadata.owner_references != wanted.metadata.owner_references:
                self._events.normal(config, TAKEN_OVER, f"took over the NetworkAttachmentDefinition {called}")
        self._networks.informer.learn(written)

    def _tell(self, key: Key, decision: Decision) -> None:
        events = self._events
        if decision.config is not None and decision.problems:
            events.warning(decision.config, INVALID, "; ".join(str(each) for each in decision.problems))
        for loser in decision.losers:
            winner = decision.config.metadata.name if decision.config else ""
            events.warning(
                loser,
                CONFLICT,
                f"the NetworkAttachmentDefinition {key[0]}/{key[1]} is made of the SpiderMultusConfig {winner}; "
                "give this one another name by the annotation multus.spidernet.io/cr-name",
            )
