"""Histories: whatever happens, no address is held twice, none is freed while it is used, and none is lost.

    HISTORY_SEED=7 HISTORY_EXAMPLES=20 build/venv/bin/pytest tests/kube/test_history.py -k generated
    HISTORY_SECONDS=600 build/venv/bin/pytest tests/kube/test_history.py -m soak -s --timeout 0

The seed decides what is done; in which order the processes get to it is the machine's affair. So a failure is told as
the history that it was, and nothing is shrunk.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from math import inf

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from lab.kube.cluster import Cluster
from tests.kube import history_kills
from tests.kube.conftest import running
from tests.kube.history import Call, Change, History, Pod
from tests.kube.history_play import Play
from tests.kube.history_processes import Nursery
from tests.kube.history_program import AIMED, Abandon, Add, Pause, Program, Remove, RestartServer, Scan, programs
from tests.kube.history_stage import stage
from tests.kube.store_rig import make_admin, token_of

SEED = int(os.environ.get("HISTORY_SEED") or random.randrange(2**32))
EXAMPLES = int(os.environ.get("HISTORY_EXAMPLES") or 6)
SECONDS = float(os.environ.get("HISTORY_SECONDS") or 600)
DEADLINE = 240.0
"""Seconds that a history may take: after an API server's return, Kubernetes' own controllers take a minute at worst."""
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
        self.done.update(f"fault {what.split('(')[0]}" for _, what in there.history.faults if "(" in what)
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


def _generated(theatre: Theatre, examples: int, *, most: int, seconds: float = inf) -> None:
    """Histories of programs with up to `most` steps, and API servers that are killed if there are `seconds` for it."""
    end = time.monotonic() + seconds

    @seed(SEED)
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(program=programs(restarts=seconds < inf, most=most))
    def histories(program: Program) -> None:
        if time.monotonic() > end:
            return
        theatre.run(repr(program), lambda play: play.run(program))

    print(f"seed {SEED}")
    histories()


def _sound() -> History:
    """A pod that goes with its DEL in time, and the next pod that has its address."""
    old, new = Pod("old", "web", "n0", False, 0), Pod("new", "web", "n1", False, 5)
    old.delete(3, 6)
    calls = [
        Call("ADD", "old", "c0", "n0", 1, 2, GIVEN_OLD),
        Call("DEL", "old", "c0", "n0", 4, 4.5),
        Call("ADD", "new", "c1", "n1", 5, 7, GIVEN_NEW),
    ]
    changes = [
        *(Change(1, 1.5, address, claim, "old") for address, claim in GIVEN_OLD.items()),
        *(Change(2, 4.2, address, claim, "") for address, claim in GIVEN_OLD.items()),
        *(Change(3, 6.5, address, claim, "new") for address, claim in GIVEN_NEW.items()),
    ]
    return History(calls, {"old": old, "new": new}, changes)


GIVEN_OLD = {"10.0.0.1": "a", "fd00::1": "b"}
GIVEN_NEW = {"10.0.0.1": "c", "fd00::1": "d"}


def _no_del(history: History) -> None:
    history.pods["old"].protected = 8
    del history.calls[1]


def _del_of_an_earlier_sandbox(history: History) -> None:
    history.calls[1].container = "before"


def _taken_over(history: History) -> None:
    history.pods["old"].deleted = inf
    history.changes[2:] = [Change(4, 2.5, "10.0.0.1", "a", "new")]
    del history.calls[1:]


def _never_claimed(history: History) -> None:
    del history.changes[5]


def _half(history: History) -> None:
    history.calls[2].given = {"10.0.0.1": "c"}


def _again_another(history: History) -> None:
    history.calls.append(Call("ADD", "new", "c2", "n1", 8, 9, {"10.0.0.2": "e", "fd00::1": "d"}))
    history.changes.append(Change(5, 8.5, "10.0.0.2", "e", "new"))


def _not_inherited(history: History) -> None:
    for pod in history.pods.values():
        pod.static = True
    history.calls[2].given = {"10.0.0.2": "c", "fd00::1": "d"}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_no_del, "is held by two pods"),
        (_del_of_an_earlier_sandbox, "while it was held"),
        (_taken_over, "is of pod new by 2.500"),
        (_never_claimed, "never claimed"),
        (_half, "gave 10.0.0.1"),
        (_again_another, "and then 10.0.0.2"),
        (_not_inherited, "its successor 10.0.0.2"),
    ],
)
def test_the_model_complains(spoil: Callable[[History], None], complaint: str) -> None:
    history = _sound()
    assert history.violations() == []
    spoil(history)
    assert any(complaint in violation for violation in history.violations()), history.violations()


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


@pytest.mark.parametrize("name", AIMED)
def test_aimed_histories(theatre: Theatre, name: str) -> None:
    theatre.run(name, lambda play: play.run(AIMED[name]))


def test_generated_histories(theatre: Theatre) -> None:
    """HISTORY_SEED and HISTORY_EXAMPLES choose others, and more."""
    _generated(theatre, EXAMPLES, most=8)


def test_the_api_server_is_killed(theatre: Theatre) -> None:
    """In the middle of ADDs, DELs, a take-over and a pod that only the reclaim looks after."""
    again = (
        Add(1),
        Remove(force=True, cni="never", node=1),
        Add(1),
        Add(1),
        Remove(force=False, cni="in time", node=2),
    )
    pods = (again, (*again, Add(2)), (Abandon(15), *again), (Add(1), Pause(400), Add(1)), (Add(1), Add(2)))
    program = Program(pods, (Pause(150), RestartServer(), Scan()))
    theatre.run(repr(program), lambda play: play.run(program))


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_soak(theatre: Theatre) -> None:
    _generated(theatre, 100_000, most=14, seconds=SECONDS)
