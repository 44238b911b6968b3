"""Histories: whatever happens, no address is held twice, none is freed while it is used, and none is lost.

    HISTORY_SEED=7 HISTORY_EXAMPLES=20 build/venv/bin/pytest tests/kube/test_history.py -k generated
    HISTORY_SECONDS=600 build/venv/bin/pytest tests/kube/test_history.py -m soak -s --timeout 0

The seed decides what is done; in which order the processes get to it is the machine's affair. So a failure is told as
the history that it was, and nothing is shrunk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import count
from math import inf

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.kube import history_kills
from tests.kube.history import Call, Change, History, Pod
from tests.kube.history_aimed import AIMED
from tests.kube.history_play import Play
from tests.kube.history_program import LATE_DELS, Abandon, Add, Pause, Program, Remove, RestartServer, Scan, programs
from tests.kube.history_theatre import SEED, Theatre, open_theatre

EXAMPLES = int(os.environ.get("HISTORY_EXAMPLES") or 4)
BATCH = 10
pytestmark = pytest.mark.timeout(600)  # of a history itself it is 240 s; a busy machine plays a few in that time
SECONDS = float(os.environ.get("HISTORY_SECONDS") or 600)


@pytest.fixture(scope="module", name="theatre")
def a_theatre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Theatre]:
    with open_theatre(str(tmp_path_factory.mktemp("history"))) as there:
        yield there


def _generated(theatre: Theatre, number: int, examples: int, *, most: int, end: float = inf) -> None:
    """Histories of programs with up to `most` steps; until the `end`, if there is one, with API servers killed."""

    @seed(number)
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(program=programs(restarts=end < inf, most=most))
    def histories(program: Program) -> None:
        if time.monotonic() < end:
            theatre.run(repr(program), lambda play: play.run(program))

    print(f"seed {number}")
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


def _given_to_another_name(history: History) -> None:
    history.pods["old"].static = True
    history.pods["new"].name = "web-1"


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
        (_given_to_another_name, "waited for the next web"),
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
    """What each finds when the code is wrong is in `mutants`."""
    theatre.run(name, AIMED[name].script, attempt=AIMED[name].attempt)


def test_late_dels(theatre: Theatre) -> None:
    theatre.run("late DELs", lambda play: play.run(LATE_DELS))


def test_generated_histories(theatre: Theatre) -> None:
    """HISTORY_SEED and HISTORY_EXAMPLES choose others, and more."""
    _generated(theatre, SEED, EXAMPLES, most=8)


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
    """HISTORY_SECONDS of them; what a seed gives, HISTORY_SEED gives again, in the first batch."""
    end = time.monotonic() + SECONDS
    for number in count(SEED):
        if time.monotonic() > end:
            break
        _generated(theatre, number, BATCH, most=14, end=end)  # of many, Hypothesis would make the first ones small
