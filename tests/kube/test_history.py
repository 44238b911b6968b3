"""Histories: whatever happens, no address is held twice, none is freed while it is used, and none is lost.

    HISTORY_SEED=7 HISTORY_EXAMPLES=20 build/venv/bin/pytest tests/kube/test_history.py -k generated
    HISTORY_EXAMPLES=200 build/venv/bin/pytest tests/kube/test_history.py -m soak -s --timeout 0

The seed decides what is done; in which order the processes get to it is the machine's affair. So a failure is told as
the history that it was, and nothing is shrunk.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from lab.kube.cluster import Cluster
from tests.kube import history_kills
from tests.kube.conftest import running
from tests.kube.history_play import Play
from tests.kube.history_processes import Nursery
from tests.kube.history_program import Program, programs
from tests.kube.history_stage import stage
from tests.kube.store_rig import make_admin, token_of

SEED = int(os.environ.get("HISTORY_SEED") or random.randrange(2**32))
EXAMPLES = int(os.environ.get("HISTORY_EXAMPLES") or 0)
SIZE = 4
"""Addresses of each family, for five names of pods."""


@dataclass
class Theatre:
    """Where histories are played: a cluster of their own, since its API server is killed."""

    cluster: Cluster
    nursery: Nursery
    token: str
    folder: str
    done: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    """Seconds from the last fault until all was well."""

    def run(self, what: str, script: Callable[[Play], Awaitable[None]]) -> None:
        """Play it until all is quiet, and raise an error with the history if something happened that must not."""
        asyncio.run(self._run(what, script))

    async def _run(self, what: str, script: Callable[[Play], Awaitable[None]]) -> None:
        async with stage(self.cluster, self.nursery, self.token, self.folder, size=SIZE, replicas=2) as there:
            play = Play(there)
            try:
                async with asyncio.timeout(110):
                    await script(play)
                    await play.settle()
            except BaseException as error:
                play.failures.append(f"it broke off: {error!r}")
                self._tell(play, what)
                raise
            self._count(play)
            if play.failures:
                self._tell(play, what)
                raise AssertionError("\n".join(play.failures))

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
        for _, what in there.history.faults:
            self.done[f"fault {what.split('(')[0]}"] += "(" in what
        self.slowest = max(self.slowest, play.converged_after)

    def _tell(self, play: Play, what: str) -> None:
        path = f"{self.folder}/history-{play.stage.key}"
        with open(path, "w") as file:
            file.write(f"seed {SEED}\n{what}\n\n{play.stage.history.told()}\n\n" + "\n".join(play.failures))
        print(f"seed {SEED}, history in {path}, processes' log in {self.folder}/log-{play.stage.key}")
        print("\n".join(play.failures))


@pytest.fixture(scope="module", name="theatre")
def a_theatre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Theatre]:
    nursery = Nursery()
    refusals = logging.getLogger("aiohttp.server")  # a proxy without a server behind it says so for each request
    refusals.disabled = True
    try:
        with running() as cluster:
            token = token_of(cluster, "spt-history", seconds=86400)
            make_admin(cluster, "spt-history")
            there = Theatre(cluster, nursery, token, str(tmp_path_factory.mktemp("history")))
            yield there
            print(f"\nseed {SEED}; {dict(there.done)}; settled within {there.slowest:.1f} s")
    finally:
        refusals.disabled = False
        nursery.close()


def _generated(theatre: Theatre, examples: int, *, most: int) -> None:
    @seed(SEED)
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(program=programs(restarts=True, most=most))
    def histories(program: Program) -> None:
        theatre.run(repr(program), lambda play: play.run(program))

    print(f"seed {SEED}")
    histories()


@pytest.mark.parametrize(
    ("operation", "least"),
    [
        (history_kills.kills_in_add, 3),
        (history_kills.kills_in_del, 3),
        (history_kills.kills_in_take_over, 5),
        (history_kills.kills_in_reclaim, 3),
    ],
    ids=["add", "del", "take-over", "reclaim"],
)
def test_killed_at_every_call(theatre: Theatre, operation: Callable[[Play], Awaitable[int]], least: int) -> None:
    async def script(play: Play) -> None:
        calls = await operation(play)
        print(f"killed after and during each of {calls} calls")
        assert calls >= least

    theatre.run(operation.__name__, script)


def test_generated_histories(theatre: Theatre) -> None:
    """HISTORY_SEED and HISTORY_EXAMPLES choose others, and more."""
    _generated(theatre, EXAMPLES or 6, most=8)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_soak(theatre: Theatre) -> None:
    _generated(theatre, EXAMPLES or 100, most=14)
