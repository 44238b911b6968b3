"""Upstream's cases about SpiderIPPools as objects: what a person does with kubectl, admitted by the controller."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from lab.kube.cluster import Cluster
from lab.layout import LabError
from tests.kube.node_rig import until
from tests.kube.test_server import apply, get, pool

MANY = 40


@pytest.mark.upstream("D00006")
def test_many_pools_come_and_go_at_once(nodes: Cluster) -> None:
    def spec(number: int) -> Any:
        document = pool(f"batch-{number}", subnet=f"10.77.{number}.0/24", ips=[f"10.77.{number}.10-10.77.{number}.19"])
        return document | {"metadata": {"name": f"batch-{number}", "labels": {"batch": "yes"}}}

    def counts() -> list[int]:
        items: Any = get(nodes, "spiderippools", "-l", "batch=yes")["items"]
        assert all(item["metadata"]["finalizers"] for item in items)
        return [item.get("status", {}).get("totalIPCount", 0) for item in items]

    documents = {"apiVersion": "v1", "kind": "List", "items": [spec(number) for number in range(MANY)]}
    try:
        apply(nodes, documents)
        until(nodes, lambda: counts() == [10] * MANY, 20, f"{MANY} pools with their counts")
    finally:
        began = time.monotonic()
        nodes.kubectl("delete", "spiderippools", "-l", "batch=yes", "--timeout=30s")
    assert time.monotonic() - began < 20
    assert counts() == []


@pytest.mark.upstream("D00007")
def test_a_pool_is_made_read_changed_and_removed(nodes: Cluster) -> None:
    def read() -> Any:
        return json.loads(nodes.kubectl("get", "sp", "crud", "-o", "json"))

    def change(**spec: object) -> None:
        nodes.kubectl("patch", "sp", "crud", "--type=merge", "-p", json.dumps({"spec": spec}))

    try:
        apply(nodes, pool("crud", subnet="10.78.0.0/24", ips=["10.78.0.12", "10.78.0.10-10.78.0.11"]))
        made = read()["spec"]
        assert (made["ipVersion"], made["ips"], made["disable"]) == (4, ["10.78.0.10-10.78.0.12"], False)
        until(nodes, lambda: read().get("status", {}).get("totalIPCount") == 3, 10, "three addresses")
        change(ips=["10.78.0.10-10.78.0.29"], excludeIPs=["10.78.0.20-10.78.0.24"])
        until(nodes, lambda: read()["status"]["totalIPCount"] == 15, 10, "fifteen addresses")
        for wrong, said in ({"subnet": "10.79.0.0/24"}, "subnet"), ({"ipVersion": 6}, "ipVersion"):
            with pytest.raises(LabError, match=f"spec.{said}"):
                change(**wrong)
        assert "10.78.0.0/24" in nodes.kubectl("get", "sp", "crud")
    finally:
        nodes.kubectl("delete", "sp", "crud", "--ignore-not-found", "--timeout=30s")
    with pytest.raises(LabError, match="not found"):
        read()
