"""Upstream's own executable, as it is left on a node during a swap, calls our agent: as the IPAM of real macvlan NICs.

It is beside our own executables here, under the same configuration, so what it prints is compared with what ours print.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pytest

from lab.kube.build import program
from tests.integration.installation import ROOT, Agent, Installation, Outcome
from tests.integration.test_upstream_api import Site

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
---
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderIPPool
metadata: {name: q4}
spec: {subnet: 10.67.0.0/24, ips: [10.67.0.20-10.67.0.40]}
---
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderIPPool
metadata: {name: tiny}
spec: {subnet: 10.68.0.0/24, ips: [10.68.0.10]}
"""
P4: dict[str, Any] = {"default_ipv4_ippool": ["p4"]}
P6: dict[str, Any] = {"default_ipv6_ippool": ["p6"]}
FAMILIES = {"v4": P4, "v6": P6, "dual": P4 | P6, "clean": P4 | P6 | {"clean_gateway": True}}


@dataclass(frozen=True)
class Pod:
    """A pod's network namespace on the node, and which executables serve it."""

    site: Swap
    name: str
    version: str = "1.0.0"
    upstream: bool = True

    @property
    def netns(self) -> str:
        """Path of its namespace."""
        return f"/run/netns/{self.site.prefix}-{self.name}"

    def call(self, command: str, ipam: Mapping[str, Any], nic: str = "eth0") -> Outcome:
        """Run macvlan on the node for a NIC of the pod."""
        folder = "upstream" if self.upstream else "bin"
        paths = {"ipam_unix_socket_path": self.site.socket, "log_file_path": f"{self.site.cni.root}/plugin.log"}
        config = {
            "cniVersion": self.version,
            "name": "net",
            "type": "macvlan",
            "master": "uplink",
            "ipam": {"type": "spiderpool"} | (paths if self.upstream else {}) | dict(ipam),
        }
        args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME={self.name};K8S_POD_UID=uid-{self.name}"
        env = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": f"c-{self.name}",
            "CNI_IFNAME": nic,
            "CNI_NETNS": self.netns,
            "CNI_ARGS": args,
            "CNI_PATH": str(self.site.cni.root / folder),
            "PATH": os.environ["PATH"],
        }
        result = subprocess.run(
            ["nsenter", f"--net={self.site.node}", str(self.site.cni.root / "upstream/macvlan")],
            env=env,
            input=json.dumps(config).encode(),
            capture_output=True,
            timeout=30,
            check=False,
        )
        return Outcome(result.returncode, result.stdout)

    def add(self, ipam: Mapping[str, Any], nic: str = "eth0") -> dict[str, Any]:
        """Its CNI result, without what differs from one NIC to the next: its MAC address."""
        outcome = self.call("ADD", ipam, nic)
        assert outcome.status == 0, outcome
        result = outcome.json
        for interface in result.get("interfaces", ()):
            assert interface.pop("mac")
            assert interface.pop("sandbox") == self.netns
        return result

    def delete(self, ipam: Mapping[str, Any], nic: str = "eth0") -> None:
        """Delete the NIC."""
        self.call("DEL", ipam, nic).empty()

    def addresses(self, nic: str = "eth0") -> set[str]:
        """What the kernel has on the NIC."""
        told = ip("-n", os.path.basename(self.netns), "-o", "address", "show", "dev", nic, "scope", "global")
        return {line.split()[3] for line in told.splitlines()}

    def claims(self) -> dict[str, str]:
        """Address to NIC."""
        return self.site.claims(self.name)


class Swap(Site):
    """A node on which upstream's executables were left, and ours are beside them."""

    def __init__(self, cni: Installation, agent: Agent, prefix: str) -> None:
        self.prefix = prefix
        self.node = f"/run/netns/{prefix}-node"
        super().__init__(cni, agent, self.node)

    @contextmanager
    def swapped(self, name: str, **members: Any) -> Iterator[Pod]:
        """A pod, while the context lasts."""
        pod = Pod(self, name, **members)
        ip("netns", "add", os.path.basename(pod.netns))
        try:
            yield pod
        finally:
            ip("netns", "del", os.path.basename(pod.netns))


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=10, check=True).stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swap]:
    subprocess.run([ROOT / "plugins/shim/build.sh", "native"], check=True)
    cni = Installation(tmp_path_factory.mktemp("swap"))
    upstream = cni.root / "upstream"
    upstream.mkdir()
    (upstream / "spiderpool").symlink_to(program("upstream-spiderpool"))
    for folder in (upstream, cni.bin):
        (folder / "macvlan").symlink_to(program("macvlan"))
    prefix = f"swap{secrets.token_hex(3)}"
    ip("netns", "add", f"{prefix}-node")
    try:
        ip("-n", f"{prefix}-node", "link", "add", "uplink", "type", "veth", "peer", "name", "other")
        for link in ("uplink", "other"):
            ip("-n", f"{prefix}-node", "link", "set", link, "up")
        flags = (f"--upstream-socket={cni.root}/run/spiderpool.sock", "--dataplane-enabled=false")
        with cni.agent(*flags, module="agent") as agent:
            there = Swap(cni, agent, prefix)
            there.ctl("apply", "-f", "-", stdin=POOLS)
            deadline = time.monotonic() + 10
            while not os.path.exists(there.socket):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield there
            assert agent.stop() == 0
            assert not [line for line in agent.lines() if line["level"] in ("error", "critical")]
    finally:
        ip("netns", "del", f"{prefix}-node")


@pytest.mark.parametrize(
    ("families", "version"), [("v4", "0.3.1"), ("v6", "0.4.0"), ("dual", "1.0.0"), ("clean", "1.0.0")]
)
def test_both_executables_print_the_same(site: Swap, families: str, version: str) -> None:
    ipam = FAMILIES[families]
    with site.swapped(f"a-{secrets.token_hex(3)}", version=version) as pod:
        given = pod.add(ipam)
        assert {each["address"] for each in given["ips"]} == pod.addresses()
        assert pod.claims() == {str(ip_interface(each["address"]).ip): "eth0" for each in given["ips"]}
        pod.delete(ipam)
        assert pod.claims() == {}
        pod.delete(ipam)
    with site.swapped(f"b-{secrets.token_hex(3)}", version=version, upstream=False) as ours:
        also = ours.add(ipam)
        ours.delete(ipam)
    for result in (given, also):
        for each in result["ips"]:
            address = ip_interface(each.pop("address"))
            each["network"] = str(address.network)
    assert given == also


def test_several_nics(site: Swap) -> None:
    with site.swapped("nics") as pod:
        first, second = pod.add(P4 | P6), pod.add({"default_ipv4_ippool": ["q4"]}, "net1")
        assert len(first["ips"]) == 2
        assert [ip_interface(each["address"]).network.with_prefixlen for each in second["ips"]] == ["10.67.0.0/24"]
        assert sorted(pod.claims().values()) == ["eth0", "eth0", "net1"]
        pod.delete({"default_ipv4_ippool": ["q4"]}, "net1")
        assert set(pod.claims().values()) == {"eth0"}
        pod.delete(P4)
        assert pod.claims() == {}


def test_what_one_gave_the_other_takes_back(site: Swap) -> None:
    with site.swapped("mixed") as pod:
        ours = replace(pod, upstream=False)
        assert pod.add(P4)["ips"]
        ours.delete(P4)
        assert pod.claims() == {}
        assert ours.add(P4)["ips"]
        pod.delete(P4)
        assert pod.claims() == {}


def test_a_retry_gets_the_same_address(site: Swap) -> None:
    """The runtime's process died after IPAM had answered: the NIC is gone, the address is not."""
    with site.swapped("retry") as pod:
        given = pod.add(P4)["ips"]
        ip("-n", os.path.basename(pod.netns), "link", "del", "eth0")
        assert pod.add(P4)["ips"] == given
        pod.delete(P4)


def test_an_empty_pool_is_told(site: Swap) -> None:
    with site.swapped("one") as one, site.swapped("two") as two:
        tiny = {"default_ipv4_ippool": ["tiny"]}
        one.add(tiny)
        failed = two.call("ADD", tiny)
        assert failed.status != 0
        message = failed.json["msg"]
        assert message.startswith("spiderpool IP allocation error: [POST /ipam/ip][500] postIpamIpFailure")
        assert "all IP addresses used out" in message
        assert "tiny" in message
        assert two.claims() == {}
        one.delete(tiny)
        assert two.add(tiny, "net1")["ips"]
        two.delete(tiny, "net1")


def test_a_name_that_nobody_has_is_told(site: Swap) -> None:
    with site.swapped("nobody") as pod:
        failed = pod.call("ADD", {"default_ipv4_ippool": ["absent"]})
        assert failed.status != 0
        assert "absent" in failed.json["msg"]


def test_pods_at_once(site: Swap) -> None:
    names = [f"many{number}" for number in range(12)]

    def cycle(name: str) -> str:
        with site.swapped(name) as pod:
            (given,) = pod.add(P4)["ips"]
            return str(given["address"])

    with ThreadPoolExecutor(4) as threads:
        given = list(threads.map(cycle, names))
    assert len(set(given)) == len(names)
    for name in names:
        with site.swapped(name) as pod:
            pod.delete(P4)
            assert pod.claims() == {}


def test_without_an_agent(tmp_path: Path, site: Swap) -> None:
    """What the executable says then is its own matter; it must not be taken for an address."""
    with site.swapped("alone") as pod:
        failed = pod.call("ADD", P4 | {"ipam_unix_socket_path": str(tmp_path / "none")})
        assert failed.status != 0
        assert "unhealthy spiderpool-agent backend" in failed.json["msg"]
