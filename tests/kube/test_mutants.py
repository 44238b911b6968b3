"""Whether the histories find mistakes: each is made in a copy of the sources, beside a copy without it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kube.history_aimed import AIMED
from tests.kube.history_theatre import Theatre, ViolationError, open_theatre
from tests.kube.mutants import MUTANTS, Mutant, check, copy

ROUNDS = 4
"""How often a mistake may escape: what an ADD picks is random."""
CONTROLS = 2
"""How often the same is played without the mistake."""


@pytest.fixture(scope="module", name="control")
def a_control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Theatre]:
    folder = tmp_path_factory.mktemp("control")
    with open_theatre(str(folder), copy(str(folder / "sources"), None)) as there:
        yield there


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_mistakes_can_still_be_made(mutant: Mutant) -> None:
    check(mutant)
    assert mutant.finds in AIMED


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_is_found(control: Theatre, tmp_path_factory: pytest.TempPathFactory, mutant: Mutant) -> None:
    aimed = AIMED[mutant.finds]
    for _ in range(CONTROLS):
        control.run(mutant.finds, aimed.script, attempt=aimed.attempt)
    sources = copy(str(tmp_path_factory.mktemp("mutant") / "sources"), mutant)
    with control.with_code_of(sources) as broken:
        complaints = (_complaint(broken, mutant.finds) for _ in range(ROUNDS))
        complaint = next(filter(None, complaints), "")
    print(f"{mutant.name}: {mutant.finds}: {complaint}")
    assert complaint, f"not found, {ROUNDS} times"
    assert "by itself" not in complaint, "a process that crashes is found by everybody"


def _complaint(broken: Theatre, name: str) -> str:
    try:
        broken.run(name, AIMED[name].script, attempt=AIMED[name].attempt)
    except ViolationError as error:
        return str(error)
    return ""
