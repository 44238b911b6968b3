"""The promises of `store.port`, tried on a real API server: the tests of tests/integration, with another adapter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab.kube.cluster import Cluster
from tests.integration.store_adapters import Adapter
from tests.integration.test_store_conformance import (
    TestCreate,
    TestDelete,
    TestRead,
    TestRules,
    TestStatus,
    TestUpdate,
)
from tests.integration.test_store_conformance_processes import TestProcesses
from tests.integration.test_store_conformance_watch import TestWatch
from tests.kube.store_rig import Kube, empty

__all__ = [
    "TestCreate",
    "TestDelete",
    "TestProcesses",
    "TestRead",
    "TestRules",
    "TestStatus",
    "TestUpdate",
    "TestWatch",
]

NAMESPACES = ("one", "two", "a" * 63)


@pytest.fixture(name="own_cluster", scope="module")
def with_namespaces(mortal: Cluster) -> Iterator[Cluster]:
    """These tests look at all objects of a kind, and make the server forget its past."""
    for namespace in NAMESPACES:
        mortal.kubectl("create", "namespace", namespace)
    yield mortal
    empty(mortal)
    mortal.kubectl("delete", "namespace", *NAMESPACES, "--wait=false")


@pytest.fixture(name="adapter", params=["kube"])
def kube_adapter(own_cluster: Cluster) -> Adapter:
    empty(own_cluster)
    return Kube(own_cluster.admin, own_cluster)
