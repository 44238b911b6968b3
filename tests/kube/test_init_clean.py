"""spiderpool-init and `spiderpool-controller clean`, as the chart's Jobs run them, on a real API server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.kube.cluster import Cluster
from tests.kube.conftest import NewCluster

ROOT = Path(__file__).resolve().parents[2]
NS = "kube-system"
ENVIRONMENT = {
    "SPIDERPOOL_NAMESPACE": NS,
    "SPIDERPOOL_CONTROLLER_NAME": "spiderpool-controller",
    "SPIDERPOOL_AGENT_NAME": "spiderpool-agent",
    "SPIDERPOOL_INIT_DEFAULT_COORDINATOR_NAME": "default",
    "SPIDERPOOL_INIT_DEFAULT_COORDINATOR_TUNE_POD_ROUTES": "true",
    "SPIDERPOOL_INIT_DEFAULT_COORDINATOR_POD_CIDR_TYPE": "auto",
    "SPIDERPOOL_INIT_DEFAULT_IPV4_SUBNET_NAME": "default-v4-subnet",
    "SPIDERPOOL_INIT_DEFAULT_IPV4_IPPOOL_NAME": "default-v4-ippool",
    "SPIDERPOOL_INIT_DEFAULT_IPV4_IPPOOL_SUBNET": "172.18.0.0/16",
    "SPIDERPOOL_INIT_DEFAULT_IPV4_IPPOOL_IPRANGES": '["172.18.40.40-172.18.40.200"]',
    "SPIDERPOOL_INIT_ENABLE_MULTUS_CONFIG": "true",
    "SPIDERPOOL_INIT_DEFAULT_CNI_NAME": "net",
}


CLEAN = ("controller", "clean", "--validate=spiderpool-controller", "--mutating=spiderpool-controller")


def account(cluster: Cluster, job: str) -> str:
    """Kubeconfig of the Job's own account, with the rights of its manifest and no others."""
    cluster.kubectl("apply", "--server-side", "-f", f"{ROOT}/deploy/rbac-{job}.yaml")
    return cluster.service_account(NS, f"spiderpool-{job}")


def may(cluster: Cluster, job: str, verb: str, what: str, name: str = "", namespace: str = NS) -> bool:
    """Whether that account may do something to `resource.group`."""
    resource, _, group = what.partition(".")
    attributes = {"verb": verb, "resource": resource, "group": group, "name": name, "namespace": namespace}
    spec = {"user": f"system:serviceaccount:{NS}:spiderpool-{job}", "resourceAttributes": attributes}
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
    answer = cluster.kubectl("create", "-f", "-", "-o", "jsonpath={.status.allowed}", stdin=json.dumps(review))
    return answer == "true"


def run(cluster: Cluster, kubeconfig: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "KUBECONFIG": kubeconfig, **environ}
    return subprocess.run(
        [sys.executable, "-m", *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def apply(cluster: Cluster, *documents: dict[str, Any]) -> None:
    cluster.kubectl(
        "apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(documents)})
    )


def controller_endpoints(cluster: Cluster) -> None:
    labels = {"kubernetes.io/service-name": "spiderpool-controller"}
    meta = {"name": "spiderpool-controller-1", "namespace": NS, "labels": labels}
    endpoints = [{"addresses": ["10.0.0.1"], "conditions": {"ready": True}}]
    apply(
        cluster,
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": meta,
            "addressType": "IPv4",
            "endpoints": endpoints,
        },
    )


@pytest.mark.timeout(180)
def test_made_and_removed(new_kube: NewCluster, tmp_path: Path) -> None:
    cluster = new_kube()
    ready = tmp_path / "ready"
    environ = ENVIRONMENT | {"SPIDERPOOL_INIT_READINESS_FILE": str(ready)}
    rights = account(cluster, "init")
    wrong = run(cluster, rights, "controller.init", **environ | {"SPIDERPOOL_INIT_ENABLE_MULTUS_CONFIG": "maybe"})
    assert wrong.returncode == 2
    assert "SPIDERPOOL_INIT_ENABLE_MULTUS_CONFIG" in wrong.stderr
    later = threading.Timer(2.0, controller_endpoints, [cluster])
    later.start()  # it waits for the controller
    try:
        first = run(cluster, rights, "controller.init", **environ)
    finally:
        later.join()
    assert first.returncode == 0, first.stderr
    assert "waiting for endpoints" in first.stderr
    assert "Finish init" in first.stderr
    assert ready.exists()
    pool = json.loads(cluster.kubectl("get", "spiderippool", "default-v4-ippool", "-o", "json"))
    assert pool["spec"]["default"] is True
    assert pool["spec"]["ips"] == ["172.18.40.40-172.18.40.200"]
    cluster.kubectl("get", "spidersubnet", "default-v4-subnet")
    cluster.kubectl("get", "spidercoordinator", "default")
    assert "custom" in cluster.kubectl("-n", NS, "get", "spidermultusconfig", "net", "-o", "jsonpath={.spec.cniType}")
    changed = '{"spec": {"disable": true}}'
    cluster.kubectl("patch", "spiderippool", "default-v4-ippool", "--type=merge", "-p", changed)
    again = run(cluster, rights, "controller.init", **environ)
    assert again.returncode == 0, again.stderr
    disabled = cluster.kubectl("get", "spiderippool", "default-v4-ippool", "-o", "jsonpath={.spec.disable}")
    assert disabled == "true"  # what is there stays as it is

    removed(cluster)


def removed(cluster: Cluster) -> None:
    finalizers = '{"metadata": {"finalizers": ["spiderpool.spidernet.io"]}}'
    for what in ("spiderippool/default-v4-ippool", "spidercoordinator/default", "spidersubnet/default-v4-subnet"):
        cluster.kubectl("patch", what, "--type=merge", "-p", finalizers)
    cluster.kubectl("delete", "spidercoordinator", "default", "--wait=false")
    webhook = {
        "name": "x.spiderpool.spidernet.io",
        "clientConfig": {"url": "https://127.0.0.1:9/nobody"},
        "rules": [
            {
                "apiGroups": ["spiderpool.spidernet.io"],
                "apiVersions": ["*"],
                "operations": ["*"],
                "resources": ["*"],
            }
        ],
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "failurePolicy": "Fail",
    }
    foreign = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "things.example.org"},
        "spec": {
            "group": "example.org",
            "names": {"kind": "Thing", "plural": "things"},
            "scope": "Cluster",
            "versions": [
                {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": {"type": "object"}}}
            ],
        },
    }
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "lab.invalid/none:1"}]}}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "spiderpool-init", "namespace": NS}}
    apply(cluster, foreign, job | {"spec": {"template": template}})
    for kind in ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"):
        meta = {"name": "spiderpool-controller"}
        apply(
            cluster,
            {
                "apiVersion": "admissionregistration.k8s.io/v1",
                "kind": kind,
                "metadata": meta,
                "webhooks": [webhook],
            },
        )
    rights = account(cluster, "clean")
    result = run(
        cluster,
        rights,
        *CLEAN,
        SPIDERPOOL_POD_NAMESPACE=NS,
        SPIDERPOOL_INIT_NAME="spiderpool-init",
    )
    assert result.returncode == 0, result.stderr
    deadline = time.monotonic() + 20
    while "spiderpool.spidernet.io" in (there := _definitions(cluster)) or _jobs(cluster):
        assert time.monotonic() < deadline, there
        time.sleep(0.1)
    assert "things.example.org" in there
    for kind in ("mutating", "validating"):
        assert cluster.kubectl("get", f"{kind}webhookconfigurations", "-o", "name") == ""
    again = run(cluster, rights, *CLEAN)
    assert again.returncode == 0, again.stderr


@pytest.fixture(scope="module")
def entitled(kube: Cluster) -> Iterator[Cluster]:
    """With the accounts of all manifests."""
    manifests = [word for path in sorted(ROOT.glob("deploy/rbac-*.yaml")) for word in ("-f", str(path))]
    kube.kubectl("apply", "--server-side", *manifests)
    yield kube
    kube.kubectl("delete", *manifests)


OURS, CRDS, HOOKS = (
    "spiderippools.spiderpool.spidernet.io",
    "customresourcedefinitions.apiextensions.k8s.io",
    "validatingwebhookconfigurations.admissionregistration.k8s.io",
)


@pytest.mark.parametrize(
    ("job", "verb", "what", "name", "namespace", "allowed"),
    [
        ("init", "create", OURS, "", "", True),
        ("init", "update", OURS, "p", "", False),
        ("init", "delete", OURS, "p", "", False),
        ("init", "create", "spidermultusconfigs.spiderpool.spidernet.io", "", "elsewhere", False),
        ("init", "list", "endpointslices.discovery.k8s.io", "", "elsewhere", False),
        ("init", "get", "secrets", "s", NS, False),
        ("clean", "delete", OURS, "p", "", True),
        ("clean", "create", OURS, "", "", False),
        ("clean", "delete", CRDS, "spiderippools.spiderpool.spidernet.io", "", True),
        ("clean", "delete", CRDS, "things.example.org", "", False),
        ("clean", "delete", HOOKS, "spiderpool-controller", "", True),
        ("clean", "delete", HOOKS, "somebody-elses", "", False),
        ("clean", "update", "leases.coordination.k8s.io", "kube-scheduler", NS, False),
        ("clean", "delete", "pods", "p", "elsewhere", False),
        ("clean", "delete", "jobs.batch", "another", NS, False),
        ("clean", "get", "secrets", "s", NS, False),
        ("controller", "delete", CRDS, "spiderippools.spiderpool.spidernet.io", "", False),
        ("controller", "get", "secrets", "another", NS, False),
        ("agent", "update", OURS, "p", "", False),
    ],
)
def test_each_account_may_do_its_work_and_no_more(
    entitled: Cluster, job: str, verb: str, what: str, name: str, namespace: str, allowed: bool
) -> None:
    assert may(entitled, job, verb, what, name, namespace) is allowed


def _definitions(cluster: Cluster) -> str:
    return cluster.kubectl("get", "crd", "-o", "name")


def _jobs(cluster: Cluster) -> str:
    return cluster.kubectl("-n", NS, "get", "job", "-o", "name")
