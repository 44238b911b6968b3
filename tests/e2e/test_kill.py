"""Pods come and go while the agent is killed at random moments: no address is held twice, none is lost."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from lab import chain, nodes
from lab.layout import Lab, LabError
from lab.state import Attachment, State

PAIRS = 200
WORKERS = 4
NODE = "node1"
ATTEMPTS = 12
"""How often a runtime may have to make a new sandbox for one pod before the test calls it lost."""
DEADLINE = 240.0


class Registry:
    """Who holds which address, as the runtimes see it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, str] = {}
        self.most = 0

    def take(self, addresses: list[str], who: str) -> None:
        with self._lock:
            for address in addresses:
                assert address not in self._held, f"{address} was given to {who} and {self._held[address]} has it"
                self._held[address] = who
            self.most = max(self.most, len(self._held))

    def give_back(self, addresses: list[str]) -> None:
        with self._lock:
            for address in addresses:
                del self._held[address]


@contextmanager
def namespace(lab: Lab, name: str) -> Iterator[None]:
    subprocess.run(["ip", "netns", "add", lab.netns(name)], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "netns", "delete", lab.netns(name)], check=True)


def one_pod(lab: Lab, registry: Registry, name: str, deadline: float) -> int:
    """A pod as kubelet and containerd have it: after a failure, DEL and a new sandbox for the same pod UID.

    Returns the number of sandboxes it took.
    """
    uid = str(uuid.uuid4())
    for attempt in range(1, ATTEMPTS + 1):
        assert time.monotonic() < deadline, "the test takes too long"
        netns = f"{name}-{attempt}"
        attachment = Attachment(
            pod=name,
            node=NODE,
            network="underlay",
            container_id=secrets.token_hex(32),
            uid=uid,
            netns=lab.netns_path(netns),
        )
        with namespace(lab, netns):
            try:
                attached = chain.add(lab, attachment)
            except LabError:
                chain.delete(lab, attachment)
                continue
            addresses = attached.addresses()
            assert len(addresses) == 2, f"{addresses} is not dual-stack"
            registry.take(addresses, f"{name} {attached.container_id[:8]}")
            registry.give_back(addresses)
            chain.delete(lab, attached)
            return attempt
    raise AssertionError(f"{name} got no address in {ATTEMPTS} sandboxes")


def killer(state: State, randomness: random.Random, done: threading.Event, failure: list[BaseException]) -> int:
    """Kill the agent and start it again until `done`; the number of times."""
    kills = 0
    try:
        while not done.wait(randomness.uniform(0.02, 1.0)):
            os.kill(state.processes[nodes.agent(NODE)].pid, signal.SIGKILL)
            nodes.stop_agent(state, NODE, signal.SIGKILL)
            nodes.start_agent(state, NODE)
            kills += 1
    except BaseException as error:
        failure.append(error)
        raise
    return kills


def node_state(lab: Lab) -> dict[str, list[str]]:
    """Everything on the node that an attachment adds to."""
    looks = {
        "links": ["ip", "-o", "link", "show", "type", "veth"],
        "rules4": ["ip", "-4", "rule"],
        "rules6": ["ip", "-6", "rule"],
        "routes4": ["ip", "-4", "route", "show", "table", "500"],
        "routes6": ["ip", "-6", "route", "show", "table", "500"],
        "neighbours": ["ip", "neigh", "show", "nud", "permanent"],
    }
    prefix = ["ip", "netns", "exec", lab.netns(NODE)]
    return {
        name: sorted(subprocess.run([*prefix, *argv], check=False, capture_output=True, text=True).stdout.splitlines())
        for name, argv in looks.items()
    }


def claims(lab: Lab) -> set[str]:
    return {claim["metadata"]["name"] for claim in nodes.ctl_list(lab, "SpiderIPClaim")}


@pytest.mark.timeout(420)
def test_killed_agent_never_duplicates_or_loses_an_address(lab: Lab) -> None:
    seed = int(os.environ.get("SEED", "0")) or secrets.randbits(32)
    print(f"SEED={seed}")
    state = State.load(lab)
    registry, done, failure = Registry(), threading.Event(), list[BaseException]()
    before_claims, before_node = claims(lab), node_state(lab)
    deadline = time.monotonic() + DEADLINE
    with ThreadPoolExecutor(WORKERS + 1) as threads:
        kills = threads.submit(killer, state, random.Random(seed), done, failure)
        pods = [threads.submit(one_pod, lab, registry, f"kill{number}", deadline) for number in range(PAIRS)]
        try:
            sandboxes = [pod.result() for pod in pods]
        finally:
            done.set()
    assert not failure
    assert kills.result() >= 10, "the agent was hardly ever killed, so this has shown nothing"
    assert sum(sandboxes) > PAIRS, "no call was ever interrupted, so this has shown nothing"
    print(f"{kills.result()} kills, {sum(sandboxes) - PAIRS} of {sum(sandboxes)} sandboxes interrupted")

    end = time.monotonic() + 30
    while nodes.queued(lab, NODE) and time.monotonic() < end:
        time.sleep(0.05)
    assert not nodes.queued(lab, NODE), "every queued deletion was replayed"
    assert not os.listdir(f"{lab.queue(NODE)}/failed")
    assert claims(lab) == before_claims
    assert node_state(lab) == before_node
