"""Checks of what happens when something is wrong: rivals, silence, exhaustion, retries, a killed agent, deletion."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from lab import chain, lifecycle, nodes, pods, snapshot
from lab.chain import ChainError
from lab.checks_traffic import TIMEOUT, addresses_of, call, claims, nic, require
from lab.layout import (
    BACKENDS,
    LATE_VIP,
    NODE_ADDRESS,
    NODES,
    PORT,
    RIVAL,
    STOLEN,
    VIP,
    LabError,
)
from lab.lifecycle import host_actor
from lab.pods import ask
from lab.process import run
from lab.state import State

SETTLES_WITHIN = 10
"""Seconds after which the agent must have done what it does in the background."""
TRY_AGAIN, NO_ADDRESS, NO_GATEWAY, NOT_AS_ADDED = 11, 101, 103, 105
"""Codes of CNI errors: the specification's, and the product's documented ones."""


def settle(look: Callable[[], Any], wanted: Callable[[Any], bool], what: str) -> Any:
    """What `look` returns once it is as wanted. Raises LabError when it is not so in time."""
    deadline = time.monotonic() + SETTLES_WITHIN
    while not wanted(found := look()):
        require(time.monotonic() < deadline, f"{what}, after {SETTLES_WITHIN} s still: {found}")
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def passing_pods(state: State, *names: str) -> Iterator[None]:
    """Destroy the pods of these names at the end, also when their check fails."""
    try:
        yield
    finally:
        lifecycle.parallel(partial(pods.destroy, state, name) for name in names if name in state.attachments)


def refusal(state: State, pod: str, node: str, network: str, code: int, *words: str) -> tuple[str, float]:
    """What the chain says, and in how many milliseconds, when a pod is refused with `code`. Raises LabError."""
    begin = time.monotonic()
    try:
        with passing_pods(state, pod):
            sandbox = pods.sandbox(state, pod, node, network)
            begin = time.monotonic()
            got = pods.attach(state, sandbox)
    except ChainError as error:
        took = (time.monotonic() - begin) * 1000
        require(error.code == code, f"code {code} was due, but: {error}")
        for word in words:
            require(word in error.text, f"the error does not name {word}: {error.text}")
        return error.text, took
    raise LabError(f"{pod} was attached to {network}, with {got.addresses()}")


def cni_check(state: State) -> list[str]:
    """CHECK of a sound pod, then of the same pod without its way for replies. What is inside pods, nobody repairs."""
    lines = []
    with passing_pods(state, "checked"):
        attachment = pods.create(state, "checked", "node1")
        begin = time.monotonic()
        chain.check(state.lab, attachment)
        lines.append(f"sound: no complaint, {(time.monotonic() - begin) * 1000:.1f} ms for the chain")
        run(["ip", "-4", "-n", state.lab.netns("checked"), "route", "flush", "table", "100"])
        try:
            chain.check(state.lab, attachment)
        except ChainError as error:
            require(error.code == NOT_AS_ADDED, f"code {NOT_AS_ADDED} was due, but: {error}")
            lines.append(f"after `ip route flush table 100` in the pod: {error.text}")
        else:
            raise LabError("CHECK did not notice that the pod's way for replies is gone")
    return lines


def repaired(state: State) -> list[str]:
    """The node's route to a pod and the rule for all pods are taken away: the agent brings them back."""
    node = state.lab.netns("node1")
    lines = []
    with passing_pods(state, "mended"):
        attachment = pods.create(state, "mended", "node1")
        address = attachment.addresses()[0]
        for what in (f"route delete {address} table 500", "rule delete pref 1000"):
            run(["ip", "-4", "-n", node, *what.split()])
            begin = time.monotonic()
            settle(
                lambda: _way_to(node, address),
                lambda dev: dev.startswith("veth"),
                f"the way to {address} is to be back",
            )
            lines.append(f"{(time.monotonic() - begin) * 1000:.0f} ms after `ip {what}` it is back")
        chain.check(state.lab, attachment)
    return lines


def _way_to(node: str, address: str) -> str:
    """The interface by which the node reaches the address; empty if it knows none."""
    return str(json.loads(run(["ip", "-j", "-n", node, "route", "get", address]))[0].get("dev", ""))


def stolen(state: State) -> list[str]:
    """The first pools hold one address each, and the rival has them: the same ADD goes on in the next pools."""
    mac = run(["ip", "-n", state.lab.netns(RIVAL.name), "-br", "link", "show", "eth0"]).split()[2]
    conflicts = nodes.metric(state.lab, "node1", "spiderpool_ipam_address_conflicts_total")
    with passing_pods(state, "newcomer"):
        begin = time.monotonic()
        given = pods.create(state, "newcomer", "node1", "contested").addresses()
        took = (time.monotonic() - begin) * 1000
        require(not set(given) & set(STOLEN), f"a stolen address was given: {given}")
        call(state, "newcomer", addresses_of(state, "web-2")[0], PORT, named="web-2", seen_as=given[0])
        lines = [f"{' and '.join(STOLEN)} belong to a rival, {mac}: replaced by {' and '.join(given)} in {took:.0f} ms"]
        conflicts = nodes.metric(state.lab, "node1", "spiderpool_ipam_address_conflicts_total") - conflicts
        require(conflicts == len(STOLEN), f"the agent counts {conflicts:.0f} conflicts, not {len(STOLEN)}")
        for address in STOLEN:
            claim = claims(state).get(address, {})
            quarantine = claim.get("quarantine", {})
            require(claim.get("state") == "Quarantined", f"{address} is not in quarantine: {claim}")
            require(quarantine.get("mac") == mac, f"the claim on {address} does not name {mac}: {quarantine}")
            lines.append(f"claim {address}: quarantined until {quarantine['until']}, {quarantine['reason']}")
            call(state, "client", address, PORT, named=RIVAL.name)
    for address in STOLEN:  # so that this can be proven again
        nodes.ctl(state.lab, "delete", "spideripclaims", claim_name(state, address))
    return lines


def claim_name(state: State, address: str) -> str:
    """Name of the claim on an address. Raises LabError."""
    for item in nodes.ctl_list(state.lab, "spideripclaims"):
        spec: Any = item["spec"]
        metadata: Any = item["metadata"]
        if spec["address"] == address:
            return str(metadata["name"])
    raise LabError(f"there is no claim on {address}")


def dead_gateway(state: State) -> list[str]:
    """Nobody answers at the pool's gateway, in either family; no address stays taken."""
    cases = (("dead-gateway-v4", "172.20.0.254"), ("dead-gateway-v6", "fd00:20::fe"))

    def one(case: tuple[str, str]) -> str:
        network, gateway = case
        text, took = refusal(state, f"lost-{network[-2:]}", "node2", network, NO_GATEWAY, gateway)
        return f"{text} ({took:.0f} ms)"

    with ThreadPoolExecutor(len(cases)) as both:
        lines = list(both.map(one, cases))
    left = [spec["address"] for spec in claims(state).values() if spec["pool"].startswith("dead-gateway")]
    require(not left, f"addresses stay taken: {left}")
    return lines


def exhaustion(state: State) -> list[str]:
    """Four addresses, one excluded, one reserved: two pods get one each, the third is refused and takes nothing."""
    with passing_pods(state, "tiny-1", "tiny-2"):
        places = (("tiny-1", "node1"), ("tiny-2", "node2"))
        lifecycle.parallel(partial(pods.create, state, pod, node, "tiny") for pod, node in places)
        given = sorted(addresses_of(state, pod)[0] for pod in ("tiny-1", "tiny-2"))
        require(given == ["172.20.0.150", "172.20.0.153"], f"excluded or reserved addresses were given: {given}")
        text, took = refusal(state, "tiny-3", "node1", "tiny", NO_ADDRESS, "tiny-v4")
        held = Counter(spec["pool"] for spec in claims(state).values())
        require(held["tiny-v6"] == 2, f"the refused pod still holds an IPv6 address: {held['tiny-v6']} are taken")
    return [f"{given[0]} and {given[1]} given; .151 is excluded, .152 reserved", f"{text} ({took:.0f} ms)"]


def retry(state: State) -> list[str]:
    """The sandbox dies, kubelet makes another one for the same pod, and the DEL of the first comes late."""
    with passing_pods(state, "phoenix"):
        first = pods.create(state, "phoenix", "node1")
        pods.stop_actor(state, "phoenix")
        run(["ip", "netns", "delete", state.lab.netns("phoenix")])
        second = pods.sandbox(state, "phoenix", "node1", "underlay", uid=first.uid, netns="phoenix2")
        begin = time.monotonic()
        second = pods.attach(state, second)
        took = (time.monotonic() - begin) * 1000
        given, again = first.addresses(), second.addresses()
        require(given == again, f"first {given}, at the retry {again}")
        chain.delete(state.lab, first)
        owners = {claims(state)[address]["containerID"] for address in again}
        require(owners == {second.container_id}, f"after the late DEL the claims are held by {owners}")
        call(state, "web-2", again[0], PORT, named="phoenix")
        call(state, host_actor("node1"), again[1], PORT, named="phoenix")
    return [
        f"container {first.container_id[:12]}: {' and '.join(given)}; its namespace dies, DEL is still to come",
        f"container {second.container_id[:12]}, same pod UID: {' and '.join(again)} in {took:.0f} ms",
        "late DEL of the first: the claims stay, the pod is reachable from its host and from the other node",
    ]


def killed(state: State) -> list[str]:
    """Kill node1's agent; the programs and maps are pinned and need nobody."""
    pods.create(state, "mayfly", "node1")
    held = (("client", VIP.v4), ("client", VIP.v6), (host_actor("node1"), VIP.v4))
    for actor, vip in held:
        reply = ask(state.lab, actor, "hold", name=vip, to=[vip, 80], timeout=TIMEOUT)
        require("error" not in reply, f"{actor} → {vip}: {reply.get('error')}")
    pid = state.processes[nodes.agent("node1")].pid
    nodes.stop_agent(state, "node1", signal.SIGKILL)
    lines = [f"agent of node1, pid {pid}, is dead"]
    for actor, vip in held:
        reply = ask(state.lab, actor, "use", name=vip)
        require("error" not in reply, f"{actor}'s connection to {vip} broke: {reply.get('error')}")
        lines.append(f"{actor} to {vip}: the open connection answers in {reply['milliseconds']:.2f} ms")
        ask(state.lab, actor, "drop", name=vip)
    for actor in ("client", host_actor("node1")):
        took = [
            call(state, actor, vip, port, op=op)["milliseconds"]
            for vip in VIP
            for op, port in (("tcp", 80), ("udp", 7), ("udp_unconnected", 7))
        ]
        lines.append(f"{actor}: new lookups of {VIP.v4} and {VIP.v6}, TCP and UDP, {max(took):.2f} ms at most")
    for address, own in zip(addresses_of(state, "client"), NODE_ADDRESS["node1"], strict=True):
        call(state, host_actor("node1"), address, PORT, named="client", seen_as=own)
    return lines


def queued(state: State) -> list[str]:
    """ADD and DEL without an agent, and a service written meanwhile."""
    settle(lambda: nodes.agent_runs(state, "node1"), lambda runs: not runs, "the agent of node1 is to be killed")
    text, took = refusal(state, "hasty", "node1", "underlay", TRY_AGAIN)
    lines = [f"ADD: {text} ({took:.0f} ms)"]
    before = set(nodes.queued(state.lab, "node1"))
    begin = time.monotonic()
    attachment = state.attachments["mayfly"]
    pods.destroy(state, "mayfly")
    took = (time.monotonic() - begin) * 1000
    waiting = sorted(set(nodes.queued(state.lab, "node1")) - before)
    require(waiting, "DEL succeeded and nothing waits in the queue")
    held = [address for address in attachment.addresses() if address in claims(state)]
    require(held == attachment.addresses(), f"only {held} are still claimed, yet nobody can have freed addresses")
    lifecycle.apply(state.lab, "late-service.yaml")
    nodes.ctl(state.lab, "apply", "-f", "-", stdin=lifecycle.slices(state, "late"))
    return [
        *lines,
        f"DEL of mayfly: success in {took:.0f} ms, waiting: {', '.join(waiting)}",
        f"meanwhile {' and '.join(held)} stay claimed, and service late is written to the store",
    ]


def replayed(state: State) -> list[str]:
    """Start node1's agent again: it works off the queue, and learns what was written."""
    took = nodes.start_agent(state, "node1")
    lab = state.lab
    settle(lambda: nodes.queued(lab, "node1"), lambda left: not left, "the queue of node1 is to be worked off")
    uids = {attachment.uid for attachment in state.attachments.values()}
    stray = [spec for spec in claims(state).values() if spec["state"] == "Allocated" and spec["podUID"] not in uids]
    require(not stray, f"claims of pods that are gone: {stray}")
    names = [lifecycle.await_service(lab, vip, 80) for vip in LATE_VIP]
    require(all(name in BACKENDS for name in names), f"service late is answered by {names}")
    nodes.ctl(lab, "delete", "-f", f"{lifecycle.MANIFESTS}/late-service.yaml")
    nodes.ctl(lab, "delete", "-f", "-", stdin=lifecycle.slices(state, "late"))
    settle(
        lambda: ask(lab, "client", "tcp", to=[LATE_VIP.v4, 80], timeout=0.1),
        lambda reply: "error" in reply,
        "service late is to be forgotten",
    )
    return [
        f"ready after {took:.1f} s, queue worked off, addresses of mayfly free again",
        f"service late at {LATE_VIP.v4} and {LATE_VIP.v6} answers, and is gone again after its deletion",
    ]


PLURAL = {
    "cgroup": "cgroups",
    "link": "links",
    "neighbour": "fixed neighbours",
    "netns": "namespaces",
    "pin": "pins",
    "route": "routes",
    "rule": "rules",
    "spiderendpoints": "endpoints",
    "spideripclaims": "claims",
}

_start: dict[str, set[str]] = {}
"""What there was when the checks began, by name of the lab."""


def remember(state: State) -> None:
    """Take the snapshot that the last check compares with. Raises LabError."""
    _start[state.lab.name] = snapshot.take(state)


def _files_closed(state: State, node: str, level: Counter[str]) -> None:
    settle(
        lambda: Counter(snapshot.open_files(state, node)) - level,
        lambda more: not more,
        f"the agent of {node} is to close what it opened",
    )


def gone(state: State) -> list[str]:
    """Pods come, are used and go: both nodes, the store and the agents' descriptors are as they were."""
    names = {f"guest-{number}": NODES[number % len(NODES)].name for number in range(4)}

    def come_and_go() -> list[str]:
        with passing_pods(state, *names):
            lifecycle.parallel(partial(pods.create, state, pod, node) for pod, node in names.items())
            for pod, node in names.items():
                call(state, pod, VIP.v4, 80)
                call(state, host_actor(node), addresses_of(state, pod)[1], PORT, named=pod)
            return [nic(state.attachments[pod])[0] for pod in names]

    come_and_go()  # the first time, an agent opens what it keeps open
    for last in (False, True):
        files = {node.name: Counter(snapshot.open_files(state, node.name)) for node in NODES}
        macs = come_and_go()
        try:
            for node in NODES:
                _files_closed(state, node.name, files[node.name])
            break
        except LabError:
            if last:  # what it keeps for calls at the same moment may grow once; what leaks grows each time
                raise
    before = _start[state.lab.name]

    def differing() -> list[str]:
        now = snapshot.take(state)
        return [f"left {line}" for line in sorted(now - before)] + [f"lost {line}" for line in sorted(before - now)]

    settle(differing, lambda lines: not lines, "everything is to be as at the start")
    kinds = Counter(line.split(": ", 1)[-1].split(" ", 1)[0] for line in before)
    counts = ", ".join(f"{number} {PLURAL.get(kind, kind)}" for kind, number in sorted(kinds.items()))
    return [
        f"4 pods came and went again and again, the last with {', '.join(macs)}",
        f"as at the start: {counts}",
        "open files of the agents: " + ", ".join(f"{name} {sum(count.values())}" for name, count in files.items()),
    ]
