"""`spiderpool-controller clean` while controllers run, as the chart's pre-delete hook has it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from lab.kube.cluster import Cluster
from tests.kube.conftest import NewCluster
from tests.kube.controller_rig import CONFIGURATIONS, NAMESPACE, POOLS, ROOT, Replica, Requests, controllers, eventually

KINDS = ("mutatingwebhookconfigurations", "validatingwebhookconfigurations")
NAME = "spiderpool-controller"


def clean(cluster: Cluster) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "KUBECONFIG": cluster.admin, "SPIDERPOOL_POD_NAMESPACE": NAMESPACE}
    command = [sys.executable, "-m", "controller", "clean", "--validate", NAME, "--mutating", NAME]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)


def ready(replica: Replica) -> bool:
    return replica.probe() == 200


@pytest.mark.timeout(180)
def test_controllers_that_run_do_not_put_webhooks_back(new_kube: NewCluster, tmp_path: Path) -> None:
    cluster = new_kube()
    ask = Requests(cluster)
    with controllers(cluster, tmp_path) as launch:
        replicas = [launch(name, "--injection-enabled=true") for name in ("one", "two")]
        for replica in replicas:
            eventually(20, partial(ready, replica), "a controller is ready")
        eventually(20, lambda: ask("GET", f"{CONFIGURATIONS}/{KINDS[0]}/{NAME}")[0] == 200, "the webhooks are there")
        eventually(
            20, lambda: ask.create(POOLS, "p", subnet="10.7.0.0/24", ips=["10.7.0.9"])[0] in (201, 409), "a pool"
        )
        result = clean(cluster)
        assert result.returncode == 0, result.stderr
        # The next to lead finds no kinds of ours. One does lead here: nobody else ends the controllers.
        lease = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/spiderpool-controller-leases"
        freed = {"spec": {"holderIdentity": None, "leaseDurationSeconds": 1}}
        assert ask("PATCH", lease, freed, "application/merge-patch+json")[0] == 200
        eventually(10, lambda: "_" in ask("GET", lease)[1]["spec"].get("holderIdentity", ""), "another leads")
        until = time.monotonic() + 2  # they were back within 0.2 s
        while time.monotonic() < until:
            for kind in KINDS:
                assert ask("GET", f"{CONFIGURATIONS}/{kind}/{NAME}")[0] == 404, f"{kind} are back"
            time.sleep(0.2)
        pod = {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "lab.invalid/none:1"}]}}
        eventually(10, lambda: ask("POST", "/api/v1/namespaces/default/pods", pod)[0] == 201, "pods can be created")
