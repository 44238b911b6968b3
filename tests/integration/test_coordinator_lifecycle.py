"""ADD is all or nothing and may be repeated, DEL needs nothing, CHECK compares, GC touches only what is ours."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from plugins.coordinator.add import Attached, attach
from plugins.coordinator.coordinator import Coordinator
from plugins.coordinator.host import Host
from plugins.coordinator.probe import Prober, ProbeSettings
from plugins.coordinator.settings import CoordinatorSettings
from plugins.coordinator.steps import Task
from plugins.errors import (
    AddressConflictError,
    CheckFailedError,
    CniError,
    InvalidConfigError,
    InvalidEnvironmentError,
    IOFailureError,
    WiringError,
)
from plugins.net.netlink import BatchError, Failure, Netlink
from tests.integration.coordinator_node import (
    NODE4,
    NODE6,
    ROUTER4,
    SECOND4,
    Node,
    Pod,
    ip,
    node,
    pod_state,
    sysctl,
    tcp,
)

FULL: dict[str, Any] = {
    "podMACPrefix": "0a:1b",
    "txQueueLen": 500,
    "vethLinkAddress": "169.254.100.1",
    "vethMTU": 1400,
    "policyRoutes": [{"dst": "10.200.0.5", "gw": ROUTER4}],
    "hijackCIDR": ["169.254.25.10/32"],
}


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node() as made:
        yield made


@pytest.fixture
def pod(here: Node) -> Iterator[Pod]:
    made = here.pod()
    yield made
    here.delete(made)


def test_prev_result_comes_back_unchanged(here: Node, pod: Pod) -> None:
    assert here.add(pod, hijackCIDR=FULL["hijackCIDR"]) == pod.previous("1.1.0")
    assert here.add(pod, cniVersion="0.4.0") == pod.previous("0.4.0")


@pytest.mark.upstream("C00008")
def test_a_new_mac_shows_in_the_result(here: Node, pod: Pod) -> None:
    """Else the CHECK of the plugin that made the NIC would find another than it had told of."""
    for _ in range(2):
        result = dict(here.add(pod, podMACPrefix="0a:1b"))
        (interface,) = result["interfaces"]
        mac = interface.pop("mac")
        assert f"link/ether {mac} " in pod.ip("link", "show", "eth0")
        assert mac.startswith("0a:1b:")
        assert result == pod.previous("1.1.0")


@pytest.mark.upstream("C00008", "C00022")
def test_members_of_the_configuration_show(here: Node, pod: Pod) -> None:
    here.add(pod, **FULL)
    a, b, c, d = pod.v4.split(".")
    eth0 = pod.ip("link", "show", "eth0")
    assert f"0a:1b:{int(a):02x}:{int(b):02x}:{int(c):02x}:{int(d):02x}" in eth0
    assert "qlen 500" in eth0
    assert "mtu 1400" in pod.ip("link", "show", "veth0")
    assert "mtu 1400" in here.ip("link", "show", pod.host_link)
    assert "169.254.100.1/32" in pod.ip("address", "show", "veth0")
    assert f"169.254.25.10 via {NODE4} dev veth0" in pod.ip("route")
    assert f"default via {NODE4} dev veth0 proto 83 src {pod.v4}" in pod.ip("route", "show", "table", "100")
    assert f"default via {NODE6} dev veth0" in pod.ip("-6", "route", "show", "table", "100")
    assert f"{pod.v4} dev {pod.host_link}" in here.ip("route", "show", "table", "500")
    assert "172.17.0.1" not in pod.ip("route"), "the address of a container network is not the node's"
    assert f"alias spiderpool:{pod.container_id}:eth0:underlay" in here.ip("link", "show", pod.host_link)


def test_add_again_gives_the_same(here: Node, pod: Pod) -> None:
    here.add(pod, **FULL)

    def picture() -> dict[str, Any]:
        state = pod_state(pod)
        del state["links"], state["neighbours"]  # new MAC addresses
        return state | {"tables": [here.ip(f, "route", "show", "table", "500") for f in ("-4", "-6")]}

    first = picture()
    here.add(pod, **FULL)
    assert picture() == first
    here.check(pod, **FULL)
    assert tcp(here.fd, pod.fd, pod.v4)


def test_delete_leaves_nothing(here: Node) -> None:
    before = here.state()
    pod = here.pod()
    inside = pod_state(pod)
    here.add(pod, vethLinkAddress="169.254.100.1", policyRoutes=FULL["policyRoutes"])
    assert here.state() != before
    assert pod_state(pod) != inside
    here.delete(pod)
    here.delete(pod)
    assert here.state() == before
    assert pod_state(pod) == inside


@pytest.mark.parametrize("first", ["netns", "DEL"])
def test_delete_without_netns_and_memory(here: Node, first: str) -> None:
    before = here.state()
    pod = here.pod()
    here.add(pod)
    if first == "netns":
        ip("netns", "del", pod.name)
        os.close(pod.fd)
        pod.fd = -1
    here.delete(pod, fd=None, prevResult=None)
    here.delete(pod, fd=None, prevResult=None)
    assert here.state() == before


def test_the_shared_rule_stays_while_a_pod_is_left(here: Node) -> None:
    one, two = here.pod(), here.pod()
    here.add(one)
    here.add(two)
    here.delete(one)
    for family in ("-4", "-6"):
        assert here.ip(family, "rule").count("lookup 500") == 1
    assert tcp(here.fd, two.fd, two.v4)
    here.delete(two)
    for family in ("-4", "-6"):
        assert "lookup 500" not in here.ip(family, "rule")


@pytest.mark.upstream("C00016")
def test_the_table_of_before_is_let_go(here: Node, pod: Pod) -> None:
    """The configuration may have changed since ADD, even to one that no ADD would take."""
    before = here.state()
    here.add(pod, hostRuleTable=600)
    assert here.ip("rule").count("lookup 600") == 1
    here.delete(pod, hostRuleTable=254)
    assert here.state()["rules"] == before["rules"]


IMPOSSIBLE = {"policyRoutes": [{"dst": "10.200.0.5", "gw": ROUTER4}, {"dst": "10.201.0.0/16", "gw": "192.0.2.1"}]}


def test_an_impossible_route_takes_everything_back(here: Node) -> None:
    pod = here.pod()
    before, inside = here.state(), pod_state(pod)
    with pytest.raises(WiringError, match=r"10\.201\.0\.0/16 via 192\.0\.2\.1.*gateway"):
        here.add(pod, **FULL | IMPOSSIBLE)
    assert here.state() == before
    assert pod_state(pod) == inside
    here.add(pod, **FULL)
    here.check(pod, **FULL)
    here.delete(pod)


@pytest.mark.parametrize("side", ["node", "pod"])
def test_a_taken_name_is_refused_and_left_alone(here: Node, side: str) -> None:
    pod = here.pod()
    place, name = (here.name, pod.host_link) if side == "node" else (pod.name, "veth0")
    ip("-n", place, "link", "add", name, "type", "veth", "peer", "name", "vpeer0")
    try:
        before, inside = here.state(), pod_state(pod)
        with pytest.raises(WiringError, match=name):
            here.add(pod, **FULL)
        here.delete(pod)
        assert here.state() == before
        assert pod_state(pod) == inside
    finally:
        ip("-n", place, "link", "del", name)


def test_another_pod_of_the_same_name_prefix_is_left_alone(here: Node) -> None:
    """The first 11 characters of hexadecimal ids are 44 random bits, and yet."""
    one = here.pod()
    two = here.pod(container_id=one.container_id[:11] + "0" * 53)
    here.add(one)
    with pytest.raises(WiringError, match="taken"):
        here.add(two)
    here.delete(two)
    here.check(one)
    here.delete(one)


@pytest.mark.parametrize("step", range(1, 12))
def test_a_refusal_at_any_step_takes_everything_back(here: Node, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nth exchange with the kernel of an ADD reports a refusal after it was done (or there is no nth)."""
    pod = here.pod()
    before, inside = here.state(), pod_state(pod)
    real, count = Netlink.exchange, 0

    def refuse(self: Netlink, messages: Any, final: int = -1) -> Any:
        nonlocal count
        done = real(self, messages, final)
        count += 1
        if count == step:
            raise BatchError([Failure(0, messages[0].what, errno.EPERM, "injected")])
        return done

    monkeypatch.setattr(Netlink, "exchange", refuse)
    failed = False
    try:
        here.add(pod, **FULL)
    except CniError:
        failed = True
    monkeypatch.undo()
    if not failed:
        assert count < step
        here.delete(pod)
        return
    assert here.state() == before
    assert pod_state(pod) == inside


def test_a_cancelled_add_takes_everything_back(here: Node) -> None:
    pod = here.pod()
    before, inside = here.state(), pod_state(pod)

    async def cancelled(coordinator: Coordinator, wait: float) -> None:
        task = asyncio.ensure_future(coordinator.add(pod.call(**FULL)))
        await asyncio.sleep(wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for wait in (0, 0.0005, 0.001, 0.0015, 0.002):
        here.on(lambda c, wait=wait: cancelled(c, wait))  # type: ignore[misc]
        assert here.state() == before, wait
        assert pod_state(pod) == inside, wait


def test_cancelled_when_all_is_done(here: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread did not notice in time that its caller had gone."""
    pod = here.pod()
    before, inside = here.state(), pod_state(pod)

    def heedless(host: Host, task: Task, _: Callable[[], bool]) -> Attached:
        return attach(host, task, lambda: False)

    monkeypatch.setattr("plugins.coordinator.coordinator.attach", heedless)

    async def body(coordinator: Coordinator) -> None:
        task = asyncio.ensure_future(coordinator.add(pod.call(**FULL)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    here.on(body)
    assert here.state() == before
    assert pod_state(pod) == inside


def announcing(here: Node, prober: Prober, body: Callable[[Coordinator], Awaitable[None]]) -> None:
    """Run `body` with a coordinator that announces by `prober`."""

    async def main(coordinator: Coordinator) -> None:
        try:
            await body(coordinator)
        finally:
            await prober.close()

    here.on(main, prober=prober)


def test_cancelled_while_it_announces(here: Node) -> None:
    pod = here.pod()
    before, inside = here.state(), pod_state(pod)

    class Slow(Prober):
        async def open(self, netns_fd: int, ifname: str) -> Any:
            await asyncio.sleep(60)

    async def body(coordinator: Coordinator) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await coordinator.add(pod.call(**FULL))

    announcing(here, Slow(ProbeSettings()), body)
    assert here.state() == before
    assert pod_state(pod) == inside


def test_an_unforeseen_failure_of_the_announcement_takes_everything_back(here: Node) -> None:
    pod = here.pod()
    before, inside = here.state(), pod_state(pod)

    class Broken(Prober):
        async def open(self, netns_fd: int, ifname: str) -> Any:
            raise ValueError("unforeseen")

    async def body(coordinator: Coordinator) -> None:
        with pytest.raises(ValueError, match="unforeseen"):
            await coordinator.add(pod.call(**FULL))

    announcing(here, Broken(ProbeSettings()), body)
    assert here.state() == before
    assert pod_state(pod) == inside


def test_taking_back_does_not_turn_ipv6_off_on_the_nic(here: Node, pod: Pod) -> None:
    """CNI plugins turn IPv6 on for their own NIC where the runtime has turned it off for all."""
    pod.run(lambda: sysctl("ipv6/conf/all/disable_ipv6", "1"))
    pod.run(lambda: sysctl("ipv6/conf/eth0/disable_ipv6", "0"))
    pod.ip("address", "add", f"{pod.v6}/64", "dev", "eth0", "nodad")
    addresses = pod.ip("-6", "address", "show", "dev", "eth0", "scope", "global")
    with pytest.raises(WiringError):
        here.add(pod, **FULL | IMPOSSIBLE)
    assert pod.v6 in addresses
    assert pod.ip("-6", "address", "show", "dev", "eth0", "scope", "global") == addresses


def test_a_node_with_two_thousand_addresses(here: Node, pod: Pod) -> None:
    words = [f"dev eth2 10.{60 + i // 250}.{i % 250}.1/32" for i in range(2000)]

    def change(how: str) -> None:
        text = "".join(f"address {how} {each}\n" for each in words)
        subprocess.run(["ip", "-n", here.name, "-batch", "-"], input=text, text=True, check=True, timeout=20)

    change("add")
    try:
        here.add(pod)
        here.check(pod)
        assert tcp(pod.fd, here.fd, "10.67.249.1") == pod.v4
        here.delete(pod)
    finally:
        change("del")


KILLED = """
import asyncio, os, sys
from plugins.cni import Call
from plugins.coordinator.coordinator import Coordinator
from plugins.coordinator.host import Host
from plugins.coordinator.probe import Prober, ProbeSettings
from plugins.coordinator.settings import CoordinatorSettings
from plugins.net.netlink import Netlink
import json
import signal
left = int(sys.argv[1])
call = json.loads(sys.argv[2])
call["netns_fd"] = os.open(sys.argv[3], os.O_RDONLY)
real = Netlink.exchange
def exchange(self, *arguments, **named):
    global left
    done = real(self, *arguments, **named)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
Netlink.exchange = exchange
asyncio.run(Coordinator(CoordinatorSettings()).add(Call(**call)))
"""


def kill_in_add(here: Node, pod: Pod, after: int, **config: Any) -> bool:
    """ADD in a process that is killed after so many exchanges with the kernel; whether it was."""
    call = pod.call(**config)
    fields = {name: getattr(call, name) for name in call.__slots__}
    program = [sys.executable, "-c", KILLED, str(after), json.dumps(fields), f"/run/netns/{pod.name}"]
    done = subprocess.run(
        ["ip", "netns", "exec", here.name, *program], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.mark.parametrize("after", [5, 6, 7, 8])
def test_killed_then_repeated_or_deleted(here: Node, after: int) -> None:
    before = here.state()
    pod = here.pod()
    assert kill_in_add(here, pod, after)
    here.add(pod)
    here.check(pod)
    here.delete(pod)
    assert here.state() == before
    inside = pod_state(pod)
    assert kill_in_add(here, pod, after)
    here.delete(pod)
    assert here.state() == before
    after_all = pod_state(pod)
    assert after_all == inside


@pytest.mark.upstream("C00010")
def test_an_earlier_owner_of_the_address_gives_way(here: Node) -> None:
    """The container died with its DEL still to come, and another has got the address."""
    old = here.pod()
    here.add(old)
    old.ip("link", "set", "eth0", "down")
    new = here.pod(*old.addresses)
    here.add(new)
    here.check(new)
    assert f"default via {NODE4} " in new.ip("route", "show", "table", "100")
    assert new.v4 not in here.ip("neigh", "show", "dev", old.host_link)
    for address in (new.v4, new.v6):
        assert tcp(here.fd, new.fd, address)
        assert tcp(new.fd, here.fd, NODE6 if ":" in address else NODE4) == address
    here.delete(old, fd=None)
    here.check(new)
    assert tcp(here.fd, new.fd, new.v4)
    here.delete(new)


@pytest.mark.upstream("C00010")
def test_a_stale_neighbour_gives_way(here: Node, pod: Pod) -> None:
    here.ip("neigh", "replace", pod.v4, "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent")
    here.add(pod)
    assert here.ip("neigh", "show", pod.v4).count("lladdr") == 1
    assert "02:00:00:00:00:99" not in here.ip("neigh", "show", pod.v4)


def test_addresses_of_the_node_are_followed(here: Node, pod: Pod) -> None:
    """The node's addresses are cached: one that came or went since the last ADD counts in the next."""

    async def body(coordinator: Coordinator) -> None:
        await coordinator.add(pod.call())
        assert "10.77.0.9 " not in pod.ip("route")
        here.ip("address", "add", "10.77.0.9/24", "dev", "eth2")
        await coordinator.add(pod.call())
        assert "10.77.0.9 dev veth0" in pod.ip("route")
        here.ip("address", "del", "10.77.0.9/24", "dev", "eth2")
        await coordinator.add(pod.call())
        assert "10.77.0.9 " not in pod.ip("route")
        here.ip("link", "set", "docker0", "name", "uplink1")
        await coordinator.add(pod.call())
        assert "172.17.0.1 dev veth0" in pod.ip("route")
        here.ip("link", "set", "uplink1", "name", "docker0")

    here.on(body)


DAMAGE = [
    ("node", "route del {v4} table 500", "route"),
    ("node", "-6 route del {v6} table 500", "route"),
    ("node", "rule del pref 1000", "rule"),
    ("node", "neigh del {v4} dev {link}", "neighbour"),
    ("node", "neigh replace {v6} lladdr 02:00:00:00:00:09 dev {link} nud permanent", "neighbour"),
    ("node", "link set {link} down", "down"),
    ("node", "link set {link} alias other", "alias"),
    ("node", "link del {link}", "no link"),
    ("pod", "link set veth0 down", "down"),
    ("pod", "rule del pref 1000", "rule"),
    ("pod", "-6 rule del pref 1000", "rule"),
    ("pod", "route flush table 100", "table 100"),
    ("pod", "-6 route flush table 100", "table 100"),
    ("pod", f"route del {SECOND4}", "table 254"),
    ("pod", "route del 10.96.0.0/12", "10.96.0.0/12"),
    ("pod", "route del 10.200.0.5", "10.200.0.5"),
    ("pod", f"neigh del {SECOND4} dev veth0", SECOND4),
    ("pod", "address del {v4}/24 dev eth0", "address"),
    ("pod", "link set eth0 address 02:00:00:00:00:08", "MAC"),
]


@pytest.mark.parametrize(("side", "command", "told"), DAMAGE)
def test_check_notices(here: Node, pod: Pod, side: str, command: str, told: str) -> None:
    here.add(pod, **FULL)
    here.check(pod, **FULL)
    words = command.format(v4=pod.v4, v6=pod.v6, link=pod.host_link).split()
    (here if side == "node" else pod).ip(*words)
    with pytest.raises(CheckFailedError, match=told):
        here.check(pod, **FULL)
    if told == "alias":
        here.ip("link", "set", pod.host_link, "alias", f"spiderpool:{pod.container_id}:eth0:underlay")


def test_check_notices_missing_marks(here: Node, pod: Pod) -> None:
    here.add(pod)
    pod.run(lambda: subprocess.run(["nft", "flush", "chain", "inet", "spiderpool", "output"], check=True, timeout=10))
    with pytest.raises(CheckFailedError, match="nf_tables"):
        here.check(pod)


def gc(here: Node, *valid: Pod, name: str = "underlay") -> None:
    listed = [{"containerID": p.container_id, "ifname": "eth0"} for p in valid]
    config: dict[str, Any] = {"cni.dev/valid-attachments": listed, "name": name}
    call = here.pods[0].call("GC", fd=None, **config)
    here.on(lambda c: c.gc(call))


def test_gc_touches_only_dead_links_of_ours() -> None:
    with node() as here:
        alive, dead, other = here.pod(), here.pod(), here.pod()
        for each in (alive, dead):
            here.add(each)
        here.add(other, name="another-network")
        foreign = f"veth{'ab' * 5}c"
        here.ip("link", "add", foreign, "type", "veth", "peer", "name", "vethpeer")
        half = here.pod()
        assert kill_in_add(here, half, 5)  # created, without an alias yet
        assert half.host_link in here.ip("link")
        gc(here, alive)
        links = here.ip("link")
        assert alive.host_link in links
        assert other.host_link in links
        assert foreign in links
        assert dead.host_link not in links
        assert half.host_link not in links
        here.check(alive)
        gc(here)
        assert alive.host_link not in here.ip("link")
        assert other.host_link in here.ip("link")
        here.check(other, name="another-network")
        gc(here, name="another-network")
        assert "lookup 500" not in here.ip("rule") + here.ip("-6", "rule")
        with pytest.raises(InvalidConfigError, match="valid-attachments"):
            here.on(lambda c: c.gc(alive.call("GC", fd=None)))


def test_status(here: Node, pod: Pod) -> None:
    here.on(lambda c: c.status(pod.call("STATUS", fd=None)))
    with pytest.raises(InvalidConfigError, match="vethMTU"):
        here.on(lambda c: c.status(pod.call("STATUS", fd=None, vethMTU=0)))


@pytest.mark.parametrize("mode", ["disable", "disabled"])
def test_disabled_does_nothing(here: Node, pod: Pod, mode: str) -> None:
    before, inside = here.state(), pod_state(pod)
    assert here.add(pod, mode=mode) == pod.previous("1.1.0")
    here.check(pod, mode=mode)
    here.delete(pod, mode=mode)
    assert (here.state(), pod_state(pod)) == (before, inside)


def test_what_cannot_be_is_refused_and_leaves_nothing(here: Node, pod: Pod) -> None:
    before, inside = here.state(), pod_state(pod)
    for expected, match, config in (
        (InvalidConfigError, "overlay mode.*first interface named eth0", {"mode": "overlay"}),
        (InvalidConfigError, "veth0 was not created", {"mode": "underlay", "podDefaultCniNic": "net0"}),
        (WiringError, "net0: there is no such link", {"ifname": "eth0", "podDefaultCniNic": "net0"}),
        (InvalidEnvironmentError, "net9", {"ifname": "net9", "podDefaultCniNic": "net9"}),
        (InvalidConfigError, "prevResult", {"prevResult": None}),
        (InvalidConfigError, r"prevResult\.ips\[0\]\.address", {"prevResult": {"ips": [{"address": "x"}]}}),
        (InvalidConfigError, "vethMTU.*1280", {"vethMTU": 1000}),
        (IOFailureError, "not open", {"fd": None}),
    ):
        with pytest.raises(expected, match=match):
            here.on(lambda c, config=config: c.add(pod.call(**config)))  # type: ignore[misc]
    assert (here.state(), pod_state(pod)) == (before, inside)


def test_an_address_of_the_node_is_a_conflict(here: Node) -> None:
    pod = here.pod(NODE4)
    before = here.state()
    with pytest.raises(AddressConflictError, match=NODE4):
        here.add(pod)
    assert here.state() == before


def test_a_nic_without_addresses(here: Node, pod: Pod) -> None:
    pod.ip("address", "flush", "dev", "eth0", "scope", "global")
    before = here.state()
    with pytest.raises(WiringError, match="no usable IP addresses"):
        here.add(pod)
    assert here.state() == before


def test_many_at_once_and_deletions_beside(here: Node) -> None:
    before = here.state()
    fds = len(os.listdir("/proc/self/fd"))
    pods = [here.pod() for _ in range(12)]

    async def body(coordinator: Coordinator) -> float:
        await asyncio.gather(*(coordinator.add(pod.call()) for pod in pods))
        await asyncio.gather(*(coordinator.check(pod.call("CHECK")) for pod in pods))
        deletions = asyncio.gather(*(coordinator.delete(pod.call("DEL", fd=None)) for pod in pods[:11]))
        begin = time.monotonic()
        late = here.pods[-1]
        await coordinator.add(late.call())
        took = time.monotonic() - begin
        await deletions
        await coordinator.check(late.call("CHECK"))
        await coordinator.delete(late.call("DEL"))
        return took

    here.on(body, CoordinatorSettings(concurrency=4, workers=4))
    assert here.state() == before
    assert len(os.listdir("/proc/self/fd")) == fds + len(pods)


def test_a_new_mac_is_announced(here: Node, pod: Pod) -> None:
    """The router has the pod's former MAC in its table; what is sent to the pod finds the new one."""
    former = pod.ip("link", "show", "eth0").split("link/ether ")[1].split()[0]
    ip("-n", here.router, "neigh", "replace", pod.v4, "lladdr", former, "dev", "eth0", "nud", "reachable")

    async def body(coordinator: Coordinator) -> None:
        await coordinator.add(pod.call(podMACPrefix="0a:1b"))

    announcing(here, Prober(ProbeSettings()), body)
    assert "0a:1b:" in ip("-n", here.router, "neigh", "show", pod.v4)
