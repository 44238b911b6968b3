"""Real API servers for tests: one for the whole session, and others for tests that break theirs or need it empty.

A missing build is a failure and no reason to skip: a suite that is green without having run proves nothing.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import pytest

from api.meta import GROUP, VERSION
from lab.kube import lifecycle
from lab.kube.cluster import Cluster
from lab.kube.components import ORDER
from lab.layout import Lab
from lab.table import Paper
from tests.kube.controller_rig import Requests
from tests.kube.node_rig import quiet, untouched, views

SHARED = (
    *(f"/apis/{GROUP}/{VERSION}/{kind}" for kind in ("spiderippools", "spidersubnets", "spiderreservedips")),
    *(f"/apis/{GROUP}/{VERSION}/{kind}" for kind in ("spideripclaims", "spidercoordinators")),
    "/api/v1/nodes",
    "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
    "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
)
"""Kinds whose objects other tests on the same server would meet, since they are in no namespace."""


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
def shared() -> dict[Cluster, set[str]]:
    """The session's clusters that run, and what was in each from the beginning, of the kinds that tests share."""
    return {}


@pytest.fixture(scope="session")
def kube(shared: dict[Cluster, set[str]]) -> Iterator[Cluster]:
    """The session's cluster, with our resource definitions. Give namespaces and objects names of your own."""
    with running() as there:
        shared[there] = objects(there)
        yield there


@pytest.fixture(scope="session")
def nodes(shared: dict[Cluster, set[str]]) -> Iterator[Cluster]:
    """The session's cluster with two nodes and the controller. Tests that start pods there take `there`."""
    with running(nodes=True) as cluster:
        shared[cluster] = objects(cluster)
        yield cluster


@pytest.fixture(scope="session")
def mortal(shared: dict[Cluster, set[str]]) -> Iterator[Cluster]:
    """The session's cluster for tests that stop parts of it, or make it forget its past."""
    with running() as cluster:
        shared[cluster] = objects(cluster)
        yield cluster


@pytest.fixture(autouse=True, scope="module")
def leaves_nothing(shared: dict[Cluster, set[str]]) -> Iterator[None]:
    """What a module leaves on the session's servers fails it, and not the one that meets it; and is removed."""
    yield
    left: list[str] = []
    for cluster, before in shared.items():
        for component in ORDER:  # a test that failed may have stopped it
            cluster.start(component)
        deadline = time.monotonic() + 10  # finalizers take a moment
        while (more := objects(cluster) - before) and time.monotonic() < deadline:
            time.sleep(0.1)
        left += more
        for path in more:
            Requests(cluster)("DELETE", path)
        before.update(more)  # a finalizer may keep it
    assert not left, f"left on the session's servers: {sorted(left)}"


def objects(cluster: Cluster) -> set[str]:
    """Paths of all objects that tests on the same server share."""
    found = set()
    for path in SHARED:
        status, answer = cluster.ask(path)
        assert status == 200, f"{path}: {status} {answer}"
        found |= {f"{path}/{item['metadata']['name']}" for item in answer["items"]}
    return found


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
