"""Fixtures of the guest's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm.guest.rig import Rig


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """An outside host on the far side of the wires, with the segments that the module's tests ask for."""
    with Rig() as rig:
        yield rig


@pytest.fixture
def own_rig() -> Iterator[Rig]:
    """The same for a test that changes it. Not in one module with `rig`: there is one outside host at a time."""
    with Rig() as rig:
        yield rig
