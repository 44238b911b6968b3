"""ifacer as it is installed, as far as any kernel goes; with VLANs and bonds: tests/vm/guest/test_ifacer.py."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from plugins.ifacer.act import in_use_below
from plugins.net import rtlink
from plugins.net.netlink import NETLINK_ROUTE, Netlink
from plugins.net.netns import in_netns
from tests.integration.installation import ROOT, Installation, netns

CONFIG: dict[str, Any] = {"cniVersion": "0.3.1", "name": "net", "type": "ifacer", "interfaces": ["lo"]}
MISSING = "spt-nowhere"


@pytest.fixture(scope="module")
def cni(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    subprocess.run([ROOT / "plugins/shim/build.sh", "native"], check=True)
    installed = Installation(tmp_path_factory.mktemp("cni"))
    record = f"--ifacer-record={installed.root}/uses"
    with installed.agent("--dataplane-enabled=false", record, module="agent"):
        yield installed


@pytest.fixture(scope="module")
def pod() -> Iterator[str]:
    with netns() as path:
        yield path


def test_the_executable_is_served(cni: Installation, pod: str) -> None:
    """Nothing is to be made: the result is the empty one, in the configuration's version."""
    outcome = cni.call("ADD", CONFIG, name="ifacer", netns=pod)
    assert (outcome.status, outcome.json) == (0, {"cniVersion": "0.3.1", "dns": {}})
    newest = CONFIG | {"cniVersion": "1.1.0", "interfaces": ["lo", "lo2"]}
    assert cni.call("ADD", newest, name="ifacer", netns=pod).json == {"cniVersion": "1.1.0", "dns": {}}
    cni.call("CHECK", CONFIG | {"cniVersion": "0.4.0"}, name="ifacer", netns=pod).empty()
    cni.call("STATUS", newest, name="ifacer").empty()
    cni.call("GC", newest | {"cni.dev/valid-attachments": []}, name="ifacer").empty()
    cni.call("DEL", CONFIG, name="ifacer").empty()


def test_errors_reach_the_caller(cni: Installation, pod: str) -> None:
    wrong = cni.call("ADD", CONFIG | {"interfaces": []}, name="ifacer", netns=pod).error(7, "0.3.1")
    assert "interfaces have at least one interface" in wrong["msg"]
    config = CONFIG | {"interfaces": [MISSING], "vlanID": 100}
    missing = cni.call("ADD", config, name="ifacer", netns=pod).error(7, "0.3.1")
    assert f"interfaces[0]: failed to find link {MISSING}: Link not found" in missing["details"]
    assert not list((cni.root / "uses").glob("*.json"))
    cni.call("DEL", {"cniVersion": "1.0.0", "name": "net", "interfaces": 7}, name="ifacer").empty()
    assert MISSING in cni.call("STATUS", config | {"cniVersion": "1.1.0"}, name="ifacer").error(50, "1.1.0")["details"]


def test_links_below_in_other_namespaces_are_found() -> None:
    with netns() as node, netns() as pod, open(node) as node_fd, open(pod) as pod_fd:

        def look() -> list[bool]:
            def ip(*words: str) -> None:
                subprocess.run(["ip", *words], check=True)

            found = []
            with Netlink(NETLINK_ROUTE, 5) as netlink:
                ip("link", "add", "wa", "type", "veth", "peer", "name", "wb")
                link = rtlink.parse_link(netlink.request((rtlink.link_get("wa"),))[0].body)
                found.append(in_use_below(netlink, link))
                ip("link", "add", "link", "wa", "name", "wm", "type", "macvlan", "mode", "bridge")
                found.append(in_use_below(netlink, link))
                ip("link", "set", "wm", "netns", f"/proc/{os.getpid()}/fd/{pod_fd.fileno()}")
                found.append(in_use_below(netlink, link))
                in_netns(pod_fd.fileno(), lambda: ip("link", "delete", "wm"))
                found.append(in_use_below(netlink, link))
                ip("link", "add", "wbr", "type", "bridge")
                ip("link", "set", "wa", "master", "wbr")
                found.append(in_use_below(netlink, link))
                left = [rtlink.parse_link(body).name for body in netlink.dump(rtlink.link_dump("macvlan"))]
                assert left == []
            return found

        assert in_netns(node_fd.fileno(), look) == [False, True, True, False, True]
