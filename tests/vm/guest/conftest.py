"""Fixtures of the guest's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm.guest.rig import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    """An outside host on the far side of the wires."""
    with Rig() as rig:
        yield rig
