"""Upstream's HTTP API, in what its executables do not ask of it by themselves, or never would.

What they do ask is in tests/kube/test_upstream_plugin.py and test_upstream_swap.py, with the executables themselves.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.coordinator import ClusterCoordinatorSpec, Coordinator, CoordinatorStatus
from api.meta import ObjectMeta
from store.sqlite import SqliteStore
from tests.integration.installation import ROOT, Agent, Installation, netns
from tests.integration.upstream_stand_in import RefusedError, StandIn

POOLS = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderIPPool
metadata: {name: p4}
spec:
  subnet: 10.66.0.0/24
  ips: [10.66.0.10-10.66.0.60]
  gateway: 10.66.0.1
  routes: [{dst: 10.1.0.0/16, gw: 10.66.0.2}]
---
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderIPPool
metadata: {name: p6}
spec: {subnet: "fd66::/64", ips: ["fd66::10-fd66::20"], gateway: "fd66::1"}
"""
BOTH = {"defaultIPv4IPPool": ["p4"], "defaultIPv6IPPool": ["p6"]}
FLAGS = ("--dataplane-enabled=false", "--upstream-connections=32", "--upstream-read-deadline=0.5")


class Site:
    """A running agent that serves upstream's API."""

    def __init__(self, cni: Installation, agent: Agent, netns: str) -> None:
        self.cni = cni
        self.agent = agent
        self.netns = netns
        self.socket = str(cni.root / "run/spiderpool.sock")

    def pod(self, name: str, nic: str = "eth0", **members: str) -> StandIn:
        given: dict[str, Any] = {"container": f"c-{name}", "netns": self.netns, "uid": f"uid-{name}"} | members
        return StandIn(socket=self.socket, ifname=nic, pod=name, **given)

    def ctl(self, *arguments: str, stdin: str = "") -> str:
        result = subprocess.run(
            [sys.executable, "-m", "cli", *arguments, "--store", f"{self.cni.root}/store.db"],
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def claims(self, pod: str) -> dict[str, str]:
        """NIC and address of each claim of the pod."""
        items = json.loads(self.ctl("get", "spideripclaims", "-o", "json"))["items"]
        mine = [item["spec"] for item in items if item["spec"].get("podUID") == f"uid-{pod}"]
        return {spec["address"]: spec["nic"] for spec in mine}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    subprocess.run([ROOT / "plugins/shim/build.sh", "native"], check=True)
    cni = Installation(tmp_path_factory.mktemp("upstream"))
    with (
        netns() as path,
        cni.agent(f"--upstream-socket={cni.root}/run/spiderpool.sock", *FLAGS, module="agent") as agent,
    ):
        there = Site(cni, agent, path)
        there.ctl("apply", "-f", "-", stdin=POOLS)
        deadline = time.monotonic() + 10
        while not os.path.exists(there.socket):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield there
        assert agent.stop() == 0
        assert not os.path.exists(there.socket)
        assert not [line for line in agent.lines() if line["level"] in ("error", "critical")]


def test_a_workload_endpoint_is_there_right_after_the_add(site: Site) -> None:
    pod = site.pod("view")
    assert pod.request("GET", "/workloadendpoint?podNamespace=ns&podName=view")[0] == 404
    given = pod.add(**BOTH)["ips"]
    status, told = pod.request("GET", "/workloadendpoint?podNamespace=ns&podName=view")
    assert status == 200
    (interface,) = told.pop("interfaces")
    assert told.pop("node")
    assert told == {"podNamespace": "ns", "podName": "view", "podUID": "uid-view"}
    assert interface["interface"] == "eth0"
    assert [interface["ipv4"], interface["ipv6"]] == [ip["address"] for ip in given]
    assert [interface["ipv4Pool"], interface["ipv6Pool"]] == ["p4", "p6"]
    assert [interface["ipv4Gateway"], interface["ipv6Gateway"]] == ["10.66.0.1", "fd66::1"]
    assert interface["routes"] == [{"ifName": "eth0", "dst": "10.1.0.0/16", "gw": "10.66.0.2"}]
    assert not {"mac", "vlan"} & interface.keys()
    assert pod.request("GET", "/workloadendpoint?podName=view")[0] == 400
    assert pod.delete()[0] == 200


def test_releasing_all_nics(site: Site) -> None:
    first, second = site.pod("all"), site.pod("all", "net1")
    first.add(defaultIPv4IPPool=["p4"])
    second.add(defaultIPv6IPPool=["p6"], defaultIPv4IPPool=["p4"])
    assert len(site.claims("all")) == 3
    assert site.pod("all", container="another").release() == (200, None)
    assert len(site.claims("all")) == 3
    assert first.release(isReleaseConflictIPs=True) == (200, None)
    assert site.claims("all") == {}
    assert first.release() == (200, None)
    assert first.request("POST", "/ipam/ips") == (200, None)


def test_namespaces_that_are_none_are_told(site: Site) -> None:
    with pytest.raises(RefusedError, match=r"CNI_NETNS cannot be opened: '/run/netns/nobody'"):
        site.pod("gone", netns="/run/netns/nobody").add(**BOTH)
    with pytest.raises(RefusedError, match="is not a network namespace"):
        site.pod("gone", netns="/etc/hostname").add(**BOTH)
    with pytest.raises(RefusedError, match="is not an absolute path"):
        site.pod("gone", netns="run/netns").add(**BOTH)
    with pytest.raises(RefusedError, match="is the node's own"):
        site.pod("gone", netns="/proc/self/ns/net").add(**BOTH)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "text"),
    [
        ("POST", "/ipam/ip", {"containerID": "c"}, 422, "podNamespace"),
        ("POST", "/ipam/ip", {"containerID": 1}, 422, "containerID"),
        ("DELETE", "/ipam/ip", [], 422, "object"),
        ("DELETE", "/ipam/ips", {"containerID": "c", "podNamespace": "n", "podName": "p"}, 422, "podUID"),
        ("PUT", "/ipam/ip", {}, 405, "POST, DELETE"),
        ("GET", "/nothing", None, 404, "/v1/nothing"),
    ],
)
def test_malformed_requests(site: Site, method: str, path: str, body: Any, status: int, text: str) -> None:
    got, answer = site.pod("bad").request(method, path, body)
    assert got == status
    assert text in answer["message"]
    assert answer["code"] == status


def test_an_invalid_name_is_refused(site: Site) -> None:
    with pytest.raises(RefusedError, match="CNI_CONTAINERID is invalid"):
        site.pod("bad", container="../x").add(**BOTH)
    with pytest.raises(RefusedError, match="CNI_IFNAME is invalid"):
        site.pod("bad", nic="a/b").add(**BOTH)


def test_the_coordinators_configuration(site: Site) -> None:
    pod = site.pod("co")
    question = {"podName": "co", "podNamespace": "ns"}
    assert pod.request("GET", "/coordinator/config", question) == (500, "coordinator config not found")

    async def configure(phase: Any) -> None:
        store = await SqliteStore.open(f"{site.cni.root}/store.db")
        try:
            status = CoordinatorStatus(phase=phase, overlay_pod_cidr=["10.244.0.0/16"])
            spec = ClusterCoordinatorSpec(mode="disabled", hijack_cidr=["169.254.0.0/16"])
            meta = ObjectMeta(name="default")
            if phase == "NotReady":
                await store.create(Coordinator(metadata=meta, spec=spec))
            await store.update_status(Coordinator(metadata=meta, spec=spec, status=status))
        finally:
            await store.close()

    asyncio.run(configure("NotReady"))
    status, text = pod.request("GET", "/coordinator/config", question)
    assert (status, "default no ready" in text) == (500, True)
    asyncio.run(configure("Synced"))
    status, told = pod.request("GET", "/coordinator/config", question)
    assert status == 200
    assert (told["mode"], told["overlayPodCIDR"], told["serviceCIDR"]) == ("disable", ["10.244.0.0/16"], [])
    assert (told["tunePodRoutes"], told["hijackCIDR"]) == (True, ["169.254.0.0/16"])


def test_only_root_may_connect(site: Site) -> None:
    assert stat.S_IMODE(os.stat(site.socket).st_mode) == 0o600


def test_silence_sizes_and_numbers_are_bounded(site: Site) -> None:
    silent = [_connected(site.socket) for _ in range(32)]
    one_more = _connected(site.socket)
    assert one_more.recv(1) == b""  # hung up on at once
    started = time.monotonic()
    for connection in silent:
        assert connection.recv(1) == b""
        connection.close()
    assert time.monotonic() - started < 5
    one_more.close()
    with _connected(site.socket) as slow:
        slow.sendall(b"POST /v1/ipam/ip HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert slow.recv(64).startswith(b"HTTP/1.1 408")
    with _connected(site.socket) as large:
        large.sendall(b"POST /v1/ipam/ip HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n\r\n")
        large.sendall(b"x" * 70000)
        assert large.recv(64).startswith(b"HTTP/1.1 413")
    assert site.pod("after").request("GET", "/ipam/healthy") == (200, None)


def _connected(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    connection.connect(path)
    return connection


def test_a_path_that_is_served_already_is_waited_for(tmp_path: Path) -> None:
    """An agent of upstream that has not gone yet keeps its path; ours is served all the same."""
    subprocess.run([ROOT / "plugins/shim/build.sh", "native"], check=True)
    cni = Installation(tmp_path)
    (tmp_path / "run").mkdir()
    path = str(tmp_path / "run/spiderpool.sock")
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(path)
        theirs.listen()
        with cni.agent(f"--upstream-socket={path}", "--dataplane-enabled=false", module="agent") as agent:
            deadline = time.monotonic() + 5
            while "not served yet" not in agent.log():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            theirs.close()
            asked = StandIn(path, "c", "eth0", "/", "p", "u")
            deadline = time.monotonic() + 10
            while True:
                try:
                    if asked.request("GET", "/ipam/healthy")[0] == 200:
                        break
                except OSError:
                    assert time.monotonic() < deadline
                time.sleep(0.1)
