"""What an operator may choose for pods with several NICs, and that ADD, CHECK, DEL and GC hold for each of them."""

from __future__ import annotations

import errno
import re
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from plugins.coordinator.settings import CoordinatorSettings
from plugins.coordinator.source import Wishes
from plugins.errors import CheckFailedError, CniError, InvalidConfigError, WiringError
from plugins.net.netlink import BatchError, Failure, Netlink
from plugins.net.netns import in_netns
from tests.integration.coordinator_node import (
    FAMILIES,
    NODE4,
    NODE6,
    SECOND4,
    WAIT,
    Node,
    Pod,
    ip,
    pod_state,
    tcp,
)
from tests.integration.coordinator_wire import Wire, judge, make, of, serving_node

MODES = pytest.mark.parametrize("mode", ["underlay", "overlay"])


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with serving_node() as made:
        yield made


def table(pod: Pod, number: int, family: str = "-4") -> str:
    return ip("-n", pod.name, family, "route", "show", "table", str(number), check=False)


class Wanting:
    """A pod with an annotation."""

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes

    async def settings(self) -> CoordinatorSettings:
        return CoordinatorSettings()

    async def wishes(self, namespace: str, name: str, uid: str) -> Wishes:
        return self._wishes


@pytest.mark.upstream("C00005", "C00006", "C00020", "A00012")
@pytest.mark.parametrize("how", ["netconf", "annotation"])
@MODES
def test_the_default_route_on_another_nic(here: Node, mode: str, how: str) -> None:
    pod = make(here, mode, 0)
    name = here.nic(pod, 1)
    netconf: dict[str, Any] = {"podDefaultRouteNic": "net1"} if how == "netconf" else {}
    source = Wanting(Wishes("net1" if how == "annotation" else "eth0"))
    for _ in range(2):
        here.on(lambda c: c.add(pod.call(ifname=name, **netconf)), source=source)
        here.on(lambda c: c.check(pod.call("CHECK", ifname=name, **netconf)), source=source)
    for version, target in ((4, "8.8.8.8"), (6, "2001:4860::8888")):
        assert "dev net1" in pod.ip(f"-{version}", "route", "get", target)
        judge(here, pod, version)
    here.add(pod, here.nic(pod, 2), podDefaultRouteNic="net1")
    assert "dev net1" in pod.ip("route", "get", "8.8.8.8")
    judge(here, pod, 4)
    here.delete(pod, "net2")
    here.delete(pod, "net1")
    for family in FAMILIES:
        defaults = pod.ip(family, "route", "show", "default")
        assert "dev eth0" in defaults.splitlines()[0] or "nexthop" in defaults, "eth0 has its default route again"


@pytest.mark.upstream("C00014")
@MODES
def test_a_nic_for_the_default_route_that_does_not_exist(here: Node, mode: str) -> None:
    pod = make(here, mode, 0)
    name = here.nic(pod, 1)
    before = here.state(), pod_state(pod)
    with pytest.raises(InvalidConfigError, match=r"podDefaultRouteNIC: net9 don't exist in pod"):
        here.on(lambda c: c.add(pod.call(ifname=name)), source=Wanting(Wishes("net9")))
    assert (here.state(), pod_state(pod)) == before
    # One that is still to come is another matter: Multus adds the networks of the annotation one after the other.
    source = Wanting(Wishes("net2", frozenset(("net1", "net2"))))
    here.on(lambda c: c.add(pod.call(ifname=name)), source=source)
    assert "dev eth0" in pod.ip("route", "get", "8.8.8.8")
    last = here.nic(pod, 2)
    here.on(lambda c: c.add(pod.call(ifname=last)), source=source)
    assert "dev net2" in pod.ip("route", "get", "8.8.8.8")
    assert pod.ip("route", "show", "default").count("default") == 1
    judge(here, pod, 4)


@pytest.mark.upstream("C00017")
@MODES
def test_without_tuning_the_routes_are_left_alone(here: Node, mode: str) -> None:
    pod = make(here, mode, 0)
    name = here.nic(pod, 1)
    before = [pod.ip(family, "rule") for family in FAMILIES]
    foreign = [[r for r in pod.ip(f, "route").splitlines() if "proto 83" not in r] for f in FAMILIES]
    here.add(pod, name, tunePodRoutes=False)
    here.check(pod, name, tunePodRoutes=False)
    assert [pod.ip(family, "rule") for family in FAMILIES] == before
    assert [[r for r in pod.ip(f, "route").splitlines() if "proto 83" not in r] for f in FAMILIES] == foreign
    assert tcp(here.fd, pod.fd, of(pod, name, 4), SECOND4) == SECOND4
    here.delete(pod, name, tunePodRoutes=False)


@pytest.mark.upstream("C00015", "C00016", "C00024")
@MODES
def test_names_tables_and_policy_routes(here: Node, mode: str) -> None:
    pod = make(here, mode, 0)
    name = here.nic(pod, 1, name="k8s-x.1")
    gateways = {version: here.segments[1].gateway(version) for version in (4, 6)}
    routes = [{"dst": "10.99.0.0/16", "gw": gateways[4]}, {"dst": "fd99::/64", "gw": gateways[6]}]
    config: dict[str, Any] = {"policyRoutes": routes, "hostRuleTable": 507, "txQueueLen": 300, "podMACPrefix": "0a:1b"}
    here.add(pod, name, **config)
    here.check(pod, name, **config)
    assert f"10.99.0.0/16 via {gateways[4]} dev {name}" in table(pod, 101)
    assert f"fd99::/64 via {gateways[6]} dev {name}" in table(pod, 101, "-6")
    assert f"default via {gateways[4]} dev {name}" in table(pod, 101)
    assert re.search(rf"10\.96\.0\.0/12 via \S+ dev {pod.lead} ", table(pod, 101))
    assert f"{NODE4} dev {pod.lead}" in table(pod, 101)
    assert f"from {of(pod, name, 4)} lookup 101" in pod.ip("rule")
    assert of(pod, name, 4) in here.ip("route", "show", "table", "507")
    assert "lookup 507" in here.ip("rule")
    described = pod.ip("link", "show", name)
    assert "0a:1b:" in described
    assert "qlen 300" in described
    here.delete(pod, name, fd=None, prevResult=None, hostRuleTable=254)
    assert "lookup 507" not in here.ip("rule") + here.ip("-6", "rule")


@MODES
def test_what_the_first_nic_reaches_by_its_node_it_still_does(here: Node, mode: str) -> None:
    """Though the next NIC's configuration does not say so."""
    pod = here.overlay_pod() if mode == "overlay" else here.pod()
    first = "net1" if mode == "overlay" else "eth0"
    if mode == "overlay":
        here.nic(pod, 1)
    here.add(pod, first, hijackCIDR=["192.168.77.0/24"])
    here.add(pod, here.nic(pod, 2))
    here.check(pod, "net2")
    for source in ([], ["from", of(pod, "eth0", 4)]):
        assert f"dev {pod.lead}" in pod.ip("route", "get", "192.168.77.7", *source)


@pytest.mark.upstream("C00021")
@MODES
def test_three_nics_with_strict_filters(here: Node, mode: str) -> None:
    pod = here.overlay_pod() if mode == "overlay" else here.pod()
    strict: dict[str, Any] = {"podRPFilter": 1, "vethLinkAddress": "169.254.100.1"}
    if mode == "underlay":
        here.add(pod, **strict)
    for number in (1, 2, 3):
        here.add(pod, here.nic(pod, number), **strict)
    judge(here, pod, 4)


@MODES
def test_a_nic_in_the_middle_goes_and_comes(here: Node, mode: str) -> None:
    """Upstream counts links: after that, two NICs would have one table."""
    pod = make(here, mode, 3)
    rules = pod.ip("rule")
    here.delete(pod, "net2")
    assert of(pod, "net2", 4) not in pod.ip("rule") + here.ip("route", "show", "table", "500")
    pod.ip("link", "del", "net2")
    del pod.further["net2"], pod.seats["net2"]
    judge(here, pod, 4)
    here.add(pod, here.nic(pod, 2))
    for _ in range(2):
        here.add(pod, "net3")
    assert sorted(pod.ip("rule").splitlines()) == sorted(rules.splitlines())
    assert f"default via {here.segments[2].gateway(4)}" in table(pod, 102)
    judge(here, pod, 4, 6)


def ours(pod: Pod) -> str:
    """What the coordinator has put into a pod of an overlay."""
    routes = "".join(ip("-n", pod.name, f, "route", "show", "table", "all", "proto", "83") for f in FAMILIES)
    return routes + "".join(line for f in FAMILIES for line in pod.ip(f, "rule").splitlines() if "proto 83" in line)


@pytest.mark.parametrize("netns", [True, False])
@pytest.mark.parametrize("count", [1, 2])
@MODES
def test_deletion_leaves_nothing(here: Node, mode: str, count: int, netns: bool) -> None:
    pod = make(here, mode, 0)
    before, inside = here.state(), pod_state(pod)
    mine = ours(pod)
    for number in range(1, count + 1):
        here.add(pod, here.nic(pod, number))
    assert before != here.state()
    for number in range(count, 0, -1):
        for _ in range(2):
            here.delete(pod, f"net{number}", **({} if netns else {"fd": None, "prevResult": None}))
        pod.ip("link", "del", f"net{number}")
    for family in FAMILIES:
        here.ip(family, "neigh", "flush", "dev", pod.node_end, "nud", "stale")
    assert {**here.state(), "links": 0} == {**before, "links": 0}
    if netns:
        assert ours(pod) == mine
        after = pod_state(pod)
        assert (after["neighbours"], after["filters"]) == (inside["neighbours"], inside["filters"])


@MODES
def test_a_refusal_at_any_step_takes_everything_back(here: Node, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nth exchange with the kernel reports a refusal after it was done, until there is no nth."""
    pod = make(here, mode, 1)
    name = here.nic(pod, 2)
    before, inside = here.state(), pod_state(pod)
    real = Netlink.exchange
    for step in range(1, 30):
        count = 0

        def refuse(self: Netlink, messages: Any, final: int = -1, step: int = step) -> Any:
            nonlocal count
            done = real(self, messages, final)
            count += 1
            if count == step:
                raise BatchError([Failure(0, messages[0].what, errno.EPERM, "injected")])
            return done

        monkeypatch.setattr(Netlink, "exchange", refuse)
        failed = False
        try:
            here.add(pod, name, podMACPrefix="0a:1b", podDefaultRouteNic=name)
        except CniError:
            failed = True
        monkeypatch.setattr(Netlink, "exchange", real)
        if not failed:
            assert step > 9
            return
        assert here.state() == before, step
        assert pod_state(pod) == inside, step
    raise AssertionError("it never succeeded")


@MODES
def test_an_impossible_route_takes_everything_back(here: Node, mode: str) -> None:
    pod = make(here, mode, 1)
    name = here.nic(pod, 2)
    before, inside = here.state(), pod_state(pod)
    with pytest.raises(WiringError, match=r"10\.9\.0\.0/16 via 192\.0\.2\.1"):
        here.add(pod, name, policyRoutes=[{"dst": "10.9.0.0/16", "gw": "192.0.2.1"}])
    assert here.state() == before
    assert pod_state(pod) == inside


DAMAGE = [
    ("node", "route del {p} table 500", "route"),
    ("node", "neigh del {p} dev {node_end}", "neighbour"),
    ("node", "rule del pref 1000", "rule"),
    ("pod", "route flush table 101", "table 101"),
    ("pod", "route del default table 101", "default route"),
    ("pod", "route del 10.96.0.0/12 table 101", "table 101"),
    ("pod", "rule del from {p} lookup 101", "rule from"),
    ("pod", "rule del from {first}", "rule from"),
    ("pod", "neigh del 10.77.0.1 dev {lead}", "neighbour"),
    ("pod", "route del 10.77.0.1 dev {lead}", "10.77.0.1/32 in table 254"),
    ("pod", "route prepend default via 172.31.21.1 dev net1", "main table still has"),
    ("pod", "address del {p}/24 dev net1", "address"),
    ("pod", "link set net1 down", "down"),
    ("node", "link set {node_end} down", "down"),
]
"""Where, what, and what CHECK tells. The last one stays."""


@MODES
def test_check_notices(here: Node, mode: str) -> None:
    pod = make(here, mode, 0)
    for side, command, told in DAMAGE:
        if mode == "underlay":
            here.add(pod)  # what was damaged may be the first NIC's
        here.add(pod, here.nic(pod, 1))
        here.check(pod, "net1")
        p, first = of(pod, "net1", 4), of(pod, "eth0", 4)
        words = command.format(p=p, first=first, lead=pod.lead, node_end=pod.node_end).split()
        (here if side == "node" else pod).ip(*words)
        with pytest.raises(CheckFailedError, match=told):
            here.check(pod, "net1")
        here.delete(pod, "net1")
        pod.ip("link", "delete", "net1")


def test_collection_removes_ways_to_addresses_that_are_gone(here: Node) -> None:
    pods = [make(here, mode, 2) for mode in ("overlay", "underlay")]
    for pod in pods:
        pod.ip("link", "del", "net1")
    config: dict[str, Any] = {
        "cni.dev/valid-attachments": [{"containerID": p.container_id, "ifname": "eth0"} for p in here.pods]
    }
    call = pods[0].call("GC", fd=None, **config)
    here.on(lambda c: c.gc(call))
    for pod in pods:
        routes = here.ip("route", "show", "table", "500") + here.ip("-6", "route", "show", "table", "500")
        known = here.ip("neigh", "show", "nud", "permanent")
        for version in (4, 6):
            assert f"{of(pod, 'net1', version)} " not in routes + known
            assert f"{of(pod, 'net2', version)} " in routes
            assert f"{of(pod, 'net2', version)} " in known
        here.check(pod, "net2")


@MODES
def test_several_ipv6_default_routes_are_one_to_the_kernel(here: Node, mode: str) -> None:
    pod = make(here, mode, 0)
    here.nic(pod, 1)
    here.nic(pod, 2)
    assert pod.ip("-6", "route", "show", "default").count("nexthop") == 3
    for name in ("net1", "net2"):
        here.add(pod, name)
        here.check(pod, name)
    default = pod.ip("-6", "route", "show", "default")
    assert default.count("via") == 1
    assert "dev eth0" in default
    judge(here, pod, 6)


def test_families_differ_between_nics(here: Node) -> None:
    for mode in ("underlay", "overlay"):
        pod = make(here, mode, 0, "4")
        here.add(pod, here.nic(pod, 1, "6"))
        here.check(pod, "net1")
        own = of(pod, "net1", 6)
        assert tcp(here.fd, pod.fd, own, NODE6) == NODE6
        assert tcp(pod.fd, here.fd, "fd00:96::10", own) == own
        assert "dev net1" in pod.ip("-6", "route", "get", "2001:4860::8888"), "nobody else has a default route"
        with Wire(here, pod) as wire:
            wire.answers_by_its_own_nic(6)


def test_a_further_nic_without_its_pair_is_refused(here: Node) -> None:
    pod = here.pod()
    name = here.nic(pod, 1)
    before, inside = here.state(), pod_state(pod)
    with pytest.raises(InvalidConfigError, match="veth0 was not created by previous interface"):
        here.add(pod, name, mode="underlay")
    with pytest.raises(WiringError, match="eth0: a macvlan link"):
        here.add(pod, name)
    assert (here.state(), pod_state(pod)) == (before, inside)


@pytest.mark.parametrize("mode", ["underlay", "overlay"])
def test_a_sidecar_that_redirects(here: Node, mode: str) -> None:
    """As Istio's: what comes in is redirected to the proxy's port, and its own packets carry the mark 1337.

    A redirection rewrites to the address of the link that a packet came in by: veth0 needs one (vethLinkAddress).
    """
    link = {"vethLinkAddress": "169.254.100.1"}
    pod = here.overlay_pod() if mode == "overlay" else here.pod()
    if mode == "underlay":
        here.add(pod, **link)
    here.add(pod, here.nic(pod, 1), **link)
    rules = "table ip mesh { chain in { type nat hook prerouting priority dstnat; tcp dport 80 redirect to :15006; }; }"
    pod.run(lambda: subprocess.run(["nft", rules], check=True, timeout=10))
    segment = here.segments[1]
    asking = [("net1", here.fd, SECOND4), ("net1", segment.fd, segment.gateway(4)), ("eth0", here.fd, NODE4)]
    for ifname, fd, source in asking:
        assert redirected(fd, pod, of(pod, ifname, 4), source)


def redirected(client: int, pod: Pod, target: str, source: str) -> bool:
    """Whether a connection to port 80 is answered by a proxy at port 15006."""
    proxy = pod.run(lambda: socket.create_server(("0.0.0.0", 15006)))
    caller = in_netns(client, socket.socket)
    with proxy, caller:
        for each in (proxy, caller):
            each.settimeout(WAIT)
        proxy.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1337)
        caller.bind((source, 0))
        caller.connect((target, 80))
        accepted, peer = proxy.accept()
        with accepted:
            accepted.sendall(b"answer")
            return caller.recv(100) == b"answer" and str(peer[0]) == source


def test_the_nodes_own_sysctls_stay(here: Node) -> None:
    def read() -> str:
        with open("/proc/sys/net/ipv4/conf/all/rp_filter") as file:
            return file.read()

    before = here.run(read)
    make(here, "overlay", 1)
    assert here.run(read) == before
