"""Where histories are played one after the other: a cluster of their own, since its API server is killed."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lab.kube.cluster import Cluster
from lab.layout import SOURCES
from tests.kube.conftest import running
from tests.kube.history_child import ATTEMPT
from tests.kube.history_play import Play
from tests.kube.history_processes import Nursery
from tests.kube.history_stage import stage
from tests.kube.store_rig import make_admin, token_of

SEED = int(os.environ.get("HISTORY_SEED") or random.randrange(2**32))
DEADLINE = 240.0
"""Seconds that a history may take: after an API server's return, Kubernetes' own controllers take a minute at worst."""
SIZE = 4
"""Addresses of each family, for five names of pods."""
_ACCOUNT = "spt-history"

Script = Callable[[Play], Awaitable[None]]


class ViolationError(AssertionError):
    """Something happened that must not; the text says what."""


@dataclass
class Theatre:
    """Plays histories with the code that the nursery's processes have."""

    cluster: Cluster
    nursery: Nursery
    token: str
    folder: str
    done: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    """Seconds from the last fault until all was well."""

    @contextmanager
    def with_code_of(self, sources: str) -> Iterator[Theatre]:
        """One in the same cluster, for other code."""
        nursery = Nursery(sources)
        try:
            yield Theatre(self.cluster, nursery, self.token, self.folder)
        finally:
            nursery.close()

    def run(self, what: str, script: Script, *, attempt: float = ATTEMPT) -> None:
        """Play it until all is quiet. Raises ViolationError, having written the history down."""
        asyncio.run(self._run(what, script, attempt))

    async def _run(self, what: str, script: Script, attempt: float) -> None:
        async with stage(
            self.cluster, self.nursery, self.token, self.folder, size=SIZE, replicas=2, attempt=attempt
        ) as there:
            play = Play(there)
            try:
                async with asyncio.timeout(DEADLINE):
                    await script(play)
                    await play.settle()
            except BaseException as error:
                play.failures.append(f"it broke off: {error!r}")
                self._tell(play, what)
                raise
            self._count(play)
            if play.failures:
                self._tell(play, what)
                raise ViolationError("\n".join(play.failures))

    def _count(self, play: Play) -> None:
        there = play.stage
        self.done["histories"] += 1
        self.done["operations"] += len(there.history.calls)
        self.done["pods"] += len(there.history.pods)
        self.done["changes of claims"] += len(there.history.changes)
        self.done["kills"] += there.leader.deaths + sum(node.agent.deaths for node in there.nodes)
        for call in there.history.calls:
            outcome = "without an answer" if call.answered is None else call.error or "success"
            self.done[f"{call.command} {outcome}"] += 1
        self.done.update(f"fault {what.split('(')[0]}" for _, what in there.history.faults if "(" in what)
        self.slowest = max(self.slowest, play.converged_after)

    def _tell(self, play: Play, what: str) -> None:
        path = f"{self.folder}/history-{play.stage.key}"
        with open(path, "w") as file:
            file.write(f"{what}\n\n{play.stage.history.told()}\n\n" + "\n".join(play.failures))
        print(f"history in {path}, processes' log in {self.folder}/log-{play.stage.key}")
        print("\n".join(play.failures))


@contextmanager
def open_theatre(folder: str, sources: str = SOURCES) -> Iterator[Theatre]:
    """A theatre for the code in the folder `sources`; what it writes down goes to `folder`."""
    nursery = Nursery(sources)
    refusals = logging.getLogger("aiohttp.server")  # a proxy without a server behind it says so for each request
    refusals.disabled = True
    try:
        with running() as cluster:
            token = token_of(cluster, _ACCOUNT, seconds=86400)
            make_admin(cluster, _ACCOUNT)
            there = Theatre(cluster, nursery, token, folder)
            yield there
            print(f"\n{dict(there.done)}; settled within {there.slowest:.1f} s")
    finally:
        refusals.disabled = False
        nursery.close()
