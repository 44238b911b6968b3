"""Real API servers for tests: one for the whole session, and others for tests that break theirs or need it empty.

A missing build is a failure and no reason to skip: a suite that is green without having run proves nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import pytest

from lab.kube import lifecycle
from lab.kube.cluster import Cluster
from lab.layout import Lab
from lab.table import Paper
from tests.kube.node_rig import quiet, untouched, views


class NewCluster(Protocol):
    """How a test gets an API server of its own, as often as it likes."""

    def __call__(self, *server_flags: str, crds: bool = True) -> Cluster: ...


@contextmanager
def running(*server_flags: str, crds: bool = True, nodes: bool = False) -> Iterator[Cluster]:
    """A cluster while the context lasts."""
    lab = Lab(f"splt{secrets.token_hex(4)}")
    try:
        yield lifecycle.up(lab, Paper(), crds=crds, nodes=nodes, server_flags=server_flags)
    finally:
        lifecycle.down(lab)


@pytest.fixture(scope="session")
def kube() -> Iterator[Cluster]:
    """The session's cluster, with our resource definitions. Give namespaces and objects names of your own."""
    with running() as there:
        yield there


@pytest.fixture(scope="session")
def nodes() -> Iterator[Cluster]:
    """The session's cluster with two nodes and the controller. Tests that start pods there take `there`."""
    with running(nodes=True) as cluster:
        yield cluster


@pytest.fixture
def there(nodes: Cluster) -> Iterator[Cluster]:
    """The session's nodes without pods: before the test, whatever became of others; and after it without a trace."""
    before = quiet(nodes)
    yield nodes
    quiet(nodes)
    views(nodes, [])
    untouched(nodes, before)


@pytest.fixture
def new_kube() -> Iterator[NewCluster]:
    """Clusters of the test's own, for those that stop one, restart one or count what is in it."""
    with ExitStack() as stack:

        def new(*server_flags: str, crds: bool = True) -> Cluster:
            return stack.enter_context(running(*server_flags, crds=crds))

        yield new
