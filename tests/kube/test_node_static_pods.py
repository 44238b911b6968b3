"""A real kubelet's static pod on our network: its address stays with it whatever becomes of the mirror in the API."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator

import pytest

from api.mirror import MIRROR
from api.pool import ANNOTATION_SCAN
from lab.kube import image, node
from lab.kube.cluster import Cluster
from tests.kube.node_rig import Json, ask, claims, pods, until

NODE = "node1"
DELAY = 30
"""The controller waits so long for the kubelet of a pod that is gone, after its grace period of a second."""


@pytest.fixture
def manifest(there: Cluster) -> Iterator[str]:
    """Path of a file that is no more after the test, nor what its kubelet ran for it."""
    path = f"{there.place.lab.node(NODE)}/{node.MANIFESTS}/static.json"
    try:
        yield path
    finally:
        if os.path.exists(path):
            os.unlink(path)
        until(there, lambda: not pods(there) and not claims(there), 60, "the static pod and its addresses go")


def write(path: str, name: str) -> None:
    """Have the kubelet run a web server, named after the node as well."""
    container = {"name": "web", "image": image.WEB, "imagePullPolicy": "Never"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [container]},
    }
    with open(f"{path}.new", "w") as file:
        json.dump(pod, file)
    os.rename(f"{path}.new", path)


def mirror(there: Cluster, *, not_: str = "") -> Json:
    """The mirror that runs, once there is one; not that of UID `not_`."""
    found: list[Json] = []

    def runs() -> bool:
        found[:] = [
            pod
            for pod in pods(there)
            if pod["metadata"]["uid"] != not_
            and MIRROR in pod["metadata"]["annotations"]
            and pod["status"].get("podIPs")
        ]
        return bool(found) and found[0]["status"]["phase"] == "Running"

    until(there, runs, 60, "a static pod's mirror runs")
    return found[0]


def test_a_mirror_comes_and_goes_and_the_address_stays(there: Cluster, manifest: str) -> None:
    write(manifest, f"static-{secrets.token_hex(3)}")
    pod = mirror(there)
    name, first = pod["metadata"]["name"], pod["metadata"]["uid"]
    addresses = {each["ip"] for each in pod["status"]["podIPs"]}
    held = {(address, pod["metadata"]["annotations"][MIRROR]) for address in addresses}
    assert claims(there) == held, "claims name the pod as its kubelet does"
    assert first != pod["metadata"]["annotations"][MIRROR]

    # The kubelet makes it anew at once, with another UID. Nothing else changes.
    there.kubectl("delete", "pod", name, "--timeout=30s", timeout=40)
    second = mirror(there, not_=first)
    assert {each["ip"] for each in second["status"]["podIPs"]} == addresses
    assert claims(there) == held

    # With the kubelet down nobody makes it anew, while the containers go on.
    there.stop(f"{NODE}-kubelet")
    there.kubectl("delete", "pod", name, "--force", "--grace-period=0")
    deadline = time.monotonic() + 1 + DELAY + 3
    while time.monotonic() < deadline:
        assert claims(there) == held
        there.kubectl("annotate", "--overwrite", "spiderippool", "--all", f"{ANNOTATION_SCAN}={time.monotonic()}")
        time.sleep(3)
    for address in addresses:
        assert ask(there, NODE, address) == "ok\n"
    node.start_kubelet(there, NODE)
    third = mirror(there, not_=second["metadata"]["uid"])
    assert {each["ip"] for each in third["status"]["podIPs"]} == addresses
    assert claims(there) == held

    # It ends by its file, and then its addresses are free.
    os.unlink(manifest)
    until(there, lambda: not pods(there) and not claims(there), 60, "the static pod and its addresses go")
