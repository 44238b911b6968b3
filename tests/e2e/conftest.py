"""A lab of its own for the tests that need one; it is taken down however they end."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator

import pytest

from lab.layout import Lab
from lab.nodes import BIN


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two nodes, a router and pods, named so that other labs are not disturbed."""
    name = f"splt{secrets.token_hex(3)}"
    command = [f"{BIN}/spiderpool-lab", "--name", name]
    try:
        subprocess.run([*command, "up"], check=True, timeout=120)
        yield Lab(name)
    finally:
        subprocess.run([*command, "down"], check=True, timeout=60)
