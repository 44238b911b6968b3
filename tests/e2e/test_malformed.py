"""Malformed input, through the executables a runtime or a person runs: one clear error each, and nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import nodes
from lab.layout import STANDARD_CNI, Lab
from lab.process import in_netns

NODE = "node1"
GOOD: dict[str, Any] = {
    "cniVersion": "1.0.0",
    "name": "underlay",
    "type": "macvlan",
    "master": "eth0",
    "ipam": {"type": "spiderpool", "default_ipv4_ippool": ["demo-v4"]},
}


def execute(lab: Lab, plugin: str, stdin: bytes, **changes: str | None) -> tuple[int, dict[str, Any]]:
    """Run a CNI executable on the node; a variable that is None is left out."""
    environment = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "malformed0",
        "CNI_NETNS": lab.netns_path("malformed"),
        "CNI_IFNAME": "eth0",
        "CNI_PATH": f"{lab.cni_bin(NODE)}:{STANDARD_CNI}",
        "CNI_ARGS": "K8S_POD_NAMESPACE=demo;K8S_POD_NAME=malformed;K8S_POD_UID=00000000-0000-0000-0000-000000000001",
        **changes,
    }
    env = {key: value for key, value in environment.items() if value is not None}
    argv = [f"{lab.cni_bin(NODE)}/{plugin}"]
    result = in_netns(
        lab.netns_path(NODE),
        lambda: subprocess.run(argv, input=stdin, env=env, capture_output=True, timeout=60, check=False),
    )
    return result.returncode, json.loads(result.stdout)


@pytest.fixture(scope="module")
def pod(lab: Lab) -> Any:
    name = lab.netns("malformed")
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "delete", name], check=True)


def look(lab: Lab, pod: str) -> dict[str, Any]:
    """What bad input must leave as it is: claims, the queue, the node's links and the pod's."""
    links = {
        where: subprocess.run(
            ["ip", "-n", where, "-o", "link"], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        for where in (lab.netns(NODE), pod)
    }
    claims = sorted(item["metadata"]["name"] for item in nodes.ctl_list(lab, "SpiderIPClaim"))
    return {**links, "claims": claims, "queue": nodes.queued(lab, NODE)}


@pytest.fixture(scope="module")
def before(lab: Lab, pod: str) -> dict[str, Any]:
    return look(lab, pod)


@pytest.fixture
def untouched(lab: Lab, pod: str, before: dict[str, Any]) -> Iterator[None]:
    """The test leaves everything as it was before the first one."""
    yield
    assert look(lab, pod) == before


def config(**changes: Any) -> bytes:
    return json.dumps({key: value for key, value in {**GOOD, **changes}.items() if value is not None}).encode()


STDIN: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 6, "empty"),
    "truncated": (config()[:-20], 6, "JSON"),
    "not an object": (b"[1]", 6, "object"),
    "null": (b"null", 6, "object"),
    "not UTF-8": (config().replace(b"underlay", b"\xff\xfe\xc0"), 6, "JSON"),
    "1 MB and one byte": (b'{"x":"' + b"a" * (1 << 20), 6, "1048576"),
    "1 MB of nesting": (b"[" * (1 << 20), 6, ""),
    "unknown version": (config(cniVersion="9.9.9"), 1, "9.9.9"),
    "version of the past": (config(cniVersion="0.2.0"), 1, "0.2.0"),
    "version is a number": (config(cniVersion=1), 1, "1"),
    "version is a list": (config(cniVersion=["1.0.0"]), 1, "1.0.0"),
}


@pytest.mark.parametrize("plugin", ["spiderpool", "coordinator"])
@pytest.mark.parametrize("case", STDIN)
@pytest.mark.usefixtures("untouched")
def test_standard_input(lab: Lab, plugin: str, case: str) -> None:
    stdin, code, cause = STDIN[case]
    status, error = execute(lab, plugin, stdin)
    assert status != 0
    assert error["code"] == code, error
    assert cause in error["msg"] + error.get("details", "")
    assert error["cniVersion"] in ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")


ENVIRONMENT: dict[str, tuple[dict[str, str | None], str]] = {
    "no command": ({"CNI_COMMAND": None}, "CNI_COMMAND"),
    "unknown command": ({"CNI_COMMAND": "ADDD"}, "CNI_COMMAND"),
    "no container id": ({"CNI_CONTAINERID": None}, "CNI_CONTAINERID"),
    "container id climbs": ({"CNI_CONTAINERID": "../../../etc/passwd"}, "CNI_CONTAINERID"),
    "container id with a slash": ({"CNI_CONTAINERID": "a/b"}, "CNI_CONTAINERID"),
    "container id of a megabyte": ({"CNI_CONTAINERID": "a" * 100_000}, "CNI_CONTAINERID"),
    "no ifname": ({"CNI_IFNAME": None}, "CNI_IFNAME"),
    "ifname climbs": ({"CNI_IFNAME": "../eth0"}, "CNI_IFNAME"),
    "ifname is a folder": ({"CNI_IFNAME": ".."}, "CNI_IFNAME"),
    "ifname of 16 characters": ({"CNI_IFNAME": "a" * 16}, "CNI_IFNAME"),
    "ifname with a blank": ({"CNI_IFNAME": "eth 0"}, "CNI_IFNAME"),
    "no netns": ({"CNI_NETNS": None}, "CNI_NETNS"),
    "netns does not exist": ({"CNI_NETNS": "/run/netns/nowhere"}, "CNI_NETNS"),
    "netns is a plain file": ({"CNI_NETNS": "/etc/hostname"}, "CNI_NETNS"),
    "netns is a folder": ({"CNI_NETNS": "/etc"}, "CNI_NETNS"),
    "netns is another kind of namespace": ({"CNI_NETNS": "/proc/self/ns/mnt"}, "CNI_NETNS"),
    "netns is the node's": ({"CNI_NETNS": "NODE"}, "CNI_NETNS"),
    "malformed arguments": ({"CNI_ARGS": "K8S_POD_NAME"}, "CNI_ARGS"),
}


@pytest.mark.parametrize("plugin", ["spiderpool", "coordinator"])
@pytest.mark.parametrize("case", ENVIRONMENT)
@pytest.mark.usefixtures("untouched")
def test_environment(lab: Lab, plugin: str, case: str) -> None:
    changes, cause = ENVIRONMENT[case]
    changes = {key: lab.netns_path(NODE) if value == "NODE" else value for key, value in changes.items()}
    status, error = execute(lab, plugin, config(), **changes)
    assert status != 0
    assert error["code"] == 4, error
    assert cause in error["msg"]


def test_netns_is_a_fifo(lab: Lab, tmp_path: Path, untouched: None) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    status, error = execute(lab, "spiderpool", config(), CNI_NETNS=str(fifo))
    assert status != 0
    assert error["code"] == 4, error


CONFIGURATION: dict[str, tuple[dict[str, Any], int, str]] = {
    "no ipam": ({"ipam": None}, 7, "ipam"),
    "ipam is a text": ({"ipam": "spiderpool"}, 7, "ipam"),
    "pools are a text": ({"ipam": {"type": "spiderpool", "default_ipv4_ippool": "demo-v4"}}, 7, "default_ipv4_ippool"),
    "pool of a number": ({"ipam": {"type": "spiderpool", "default_ipv4_ippool": [4]}}, 7, "default_ipv4_ippool"),
    "pool climbs": ({"ipam": {"type": "spiderpool", "default_ipv4_ippool": ["../x"]}}, 100, "../x"),
    "pool twice": ({"ipam": {"type": "spiderpool", "default_ipv4_ippool": ["demo-v4", "demo-v4"]}}, 7, "demo-v4"),
    "unknown pool": ({"ipam": {"type": "spiderpool", "default_ipv4_ippool": ["nowhere"]}}, 100, "nowhere"),
}


@pytest.mark.parametrize("case", CONFIGURATION)
@pytest.mark.usefixtures("untouched")
def test_ipam_configuration(lab: Lab, case: str) -> None:
    changes, code, cause = CONFIGURATION[case]
    status, error = execute(lab, "spiderpool", config(**changes))
    assert status != 0
    assert error["code"] == code, error
    assert cause in error["msg"] + error.get("details", "")


def manifest(name: str = "bad", **spec: Any) -> str:
    return json.dumps(
        {
            "apiVersion": "spiderpool.spidernet.io/v2beta1",
            "kind": "SpiderIPPool",
            "metadata": {"name": name},
            "spec": {"subnet": "172.20.0.0/24", **spec},
        }
    )


POOLS: dict[str, tuple[Callable[[], str], str]] = {
    "overlaps another's ranges": (lambda: manifest(ips=["172.20.0.139-172.20.0.141"]), "spec.ips"),
    "overlaps another's subnet": (lambda: manifest(subnet="172.20.0.0/16"), "spec.subnet"),
    "leaves its subnet": (lambda: manifest(ips=["172.20.1.1"]), "spec.ips[0]"),
    "reversed": (lambda: manifest(ips=["172.20.0.209-172.20.0.201"]), "spec.ips[0]"),
    "not an address": (lambda: manifest(ips=["172.20.0.300"]), "spec.ips[0]"),
    "ips is a text": (lambda: manifest(ips="172.20.0.201"), "spec.ips"),
    "no subnet": (lambda: manifest(subnet=None), "spec.subnet"),
    "name climbs": (lambda: manifest("../bad"), "metadata.name"),
    "not YAML": (lambda: "kind: [", ""),
    "unknown kind": (lambda: manifest().replace("SpiderIPPool", "SpiderPond"), "SpiderPond"),
    "good one, then a bad one": (
        lambda: f"{manifest('good', ips=['172.20.0.201'])}\n---\n{manifest(ips=['172.20.1.1'])}",
        "spec.ips[0]",
    ),
}


@pytest.mark.parametrize("case", POOLS)
def test_pools(lab: Lab, case: str) -> None:
    text, path = POOLS[case]
    pools = nodes.ctl(lab, "get", "SpiderIPPool", "-o", "name")
    argv = [f"{nodes.BIN}/spiderpoolctl", "apply", "-f", "-", "--store", lab.store]
    result = subprocess.run(argv, input=text(), capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert path in result.stderr
    assert "Traceback" not in result.stderr
    assert nodes.ctl(lab, "get", "SpiderIPPool", "-o", "name") == pools
