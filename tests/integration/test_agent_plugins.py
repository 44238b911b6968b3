"""The agent as it is installed: real IPAM on a real store, called by the real executable."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.installation import ROOT, Agent, Installation, netns

POOL = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderIPPool
metadata:
  name: p4
spec:
  subnet: 10.66.0.0/24
  ips: [10.66.0.10-10.66.0.11]
  gateway: 10.66.0.1
"""
CONFIG: dict[str, Any] = {
    "cniVersion": "1.0.0",
    "name": "net",
    "type": "macvlan",
    "ipam": {"type": "spiderpool", "default_ipv4_ippool": ["p4"]},
}
RSS_LIMIT_MB = 120
MODULE = "agent"


@pytest.fixture
def cni(tmp_path: Path) -> Installation:
    subprocess.run([ROOT / "plugins/shim/build.sh", "native"], check=True)
    installed = Installation(tmp_path)
    ctl(installed, "apply", "-f", "-", stdin=POOL)
    return installed


@pytest.fixture(scope="session")
def pod() -> Iterator[str]:
    with netns() as path:
        yield path


def ctl(cni: Installation, *arguments: str, stdin: str = "") -> str:
    result = subprocess.run(
        [sys.executable, "-m", "cli", *arguments, "--store", f"{cni.root}/store.db"],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def claims(cni: Installation) -> list[str]:
    listing = json.loads(ctl(cni, "get", "spideripclaims", "-o", "json"))
    return sorted(item["spec"]["address"] for item in listing["items"])


def rss_mb(agent: Agent) -> float:
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def pod_args(name: str) -> str:
    return f"K8S_POD_NAMESPACE=ns;K8S_POD_NAME={name};K8S_POD_UID=uid-{name}"


def test_an_address_comes_and_goes(cni: Installation, pod: str) -> None:
    with cni.agent("--dataplane-enabled=false", module=MODULE) as agent:
        assert rss_mb(agent) < RSS_LIMIT_MB
        first = cni.call("ADD", CONFIG, netns=pod, CNI_ARGS=pod_args("a"))
        assert first.status == 0, first
        (address,) = first.json["ips"]
        assert address["gateway"] == "10.66.0.1"
        assert claims(cni) == [address["address"].partition("/")[0]]
        again = cni.call("ADD", CONFIG, netns=pod, CNI_ARGS=pod_args("a"))
        assert again.json == first.json
        cni.call("DEL", CONFIG, CNI_ARGS=pod_args("a")).empty()
        cni.call("DEL", CONFIG, CNI_ARGS=pod_args("a")).empty()
        assert claims(cni) == []
        assert agent.stop() == 0
    assert not [line for line in agent.lines() if line["level"] in ("error", "critical")]


def test_exhaustion_is_told_and_healed_by_queued_deletions(cni: Installation, pod: str) -> None:
    """All addresses are taken, the agent dies, the pods go: the next agent frees before it gives."""
    with cni.agent("--dataplane-enabled=false", module=MODULE) as agent:
        for name in ("a", "b"):
            assert cni.call("ADD", CONFIG, netns=pod, CNI_CONTAINERID=name, CNI_ARGS=pod_args(name)).status == 0
        error = cni.call("ADD", CONFIG, netns=pod, CNI_CONTAINERID="c", CNI_ARGS=pod_args("c")).error(101)
        assert "p4" in error["details"]
        agent.kill()
    for name in ("a", "b"):
        cni.call("DEL", CONFIG, CNI_CONTAINERID=name, CNI_ARGS=pod_args(name)).empty()
    assert len(cni.queued()) == 2
    with cni.agent("--dataplane-enabled=false", module=MODULE, ready=False):
        for name in ("c", "d"):
            outcome = cni.call("ADD", CONFIG, netns=pod, CNI_CONTAINERID=name, CNI_ARGS=pod_args(name))
            assert outcome.status == 0, outcome
        assert cni.queued() == []
        assert claims(cni) == ["10.66.0.10", "10.66.0.11"]
