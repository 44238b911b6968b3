"""Which store `spiderpoolctl` works on, and which pools it says a NIC may use."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from api.claim import Claim
from api.pool import Pool
from api.reclaim import Action
from cli.__main__ import main
from cli.explain import Row, Seen, judged
from cli.holder import on_machine
from cli.naming import CliError
from cli.target import DEFAULT_STORE, choose
from plugins.ipam.candidates import Asker, pool_facts
from plugins.ipam.source import Source
from store.open import StoreSettings

FILE = StoreSettings(path="/a.db")
DEFAULT = StoreSettings(path=DEFAULT_STORE)


def cluster(kubeconfig: str = "", context: str = "") -> StoreSettings:
    return StoreSettings(kind="kubernetes", kubeconfig=kubeconfig, context=context)


@pytest.mark.parametrize(
    ("flags", "environ", "wanted"),
    [
        ({}, {}, DEFAULT),
        ({"store": "/a.db"}, {}, FILE),
        ({"store": "/a.db"}, {"SPIDERPOOL_STORE_KIND": "kubernetes", "KUBECONFIG": "/k"}, FILE),
        ({"kubeconfig": "/k"}, {"SPIDERPOOL_STORE_PATH": "/a.db"}, cluster("/k")),
        ({"context": "c"}, {}, cluster("", "c")),
        ({}, {"SPIDERPOOL_STORE_PATH": "/a.db"}, FILE),
        ({}, {"SPIDERPOOL_STORE_PATH": "/a.db", "KUBECONFIG": "/k"}, FILE),
        ({}, {"SPIDERPOOL_STORE_PATH": "/a.db", "KUBERNETES_SERVICE_HOST": "10.96.0.1"}, FILE),
        ({}, {"SPIDERPOOL_STORE_KIND": "kubernetes", "SPIDERPOOL_STORE_PATH": "/a.db"}, cluster()),
        ({}, {"SPIDERPOOL_STORE_KIND": "sqlite", "KUBECONFIG": "/k"}, DEFAULT),
        ({}, {"SPIDERPOOL_STORE_KUBECONFIG": "/k", "SPIDERPOOL_STORE_CONTEXT": "c"}, cluster("/k", "c")),
        ({}, {"KUBECONFIG": "/k"}, cluster()),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, cluster()),
    ],
)
def test_flags_go_before_our_variables_and_these_before_kubernetes(
    flags: Mapping[str, str], environ: Mapping[str, str], wanted: StoreSettings
) -> None:
    given = argparse.Namespace(**{"store": "", "kubeconfig": "", "context": "", **flags})
    assert choose(given, environ).settings == wanted


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["get", "sp", "--store", "/a.db", "--context", "c"], "give one of them"),
        (["gc", "--store", "/a.db"], "this command is for clusters"),
        (["pool", "explain", "p", "--store", "/a.db"], "this command is for clusters"),
        (["ip", "show"], "which address?"),
        (["ip", "release", "10.0.0.1", "--ip", "10.0.0.2"], "which address?"),
        (["ip", "set", "--ip", "10.0.0.1", "--pod", "p", "--namespace", "n"], "by the agent of the pod's node alone"),
        (["get", "sp", "--kubeconfig", "/no/such/file"], "/no/such/file"),
    ],
)
def test_what_cannot_be_done_is_told(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["apply", "-f", write(tmp_path), "--store", str(tmp_path / "store.db")]) == 0
    capsys.readouterr()
    if "--store" not in words and "--kubeconfig" not in words:
        words = [*words, "--store", str(tmp_path / "store.db")]
    assert main(words) == 1
    assert text in capsys.readouterr().err


def write(folder: Path) -> str:
    """A manifest with a pool."""
    path = folder / "pool.yaml"
    head = "apiVersion: spiderpool.spidernet.io/v2beta1\nkind: SpiderIPPool\nmetadata: {name: p}\n"
    path.write_text(f"{head}spec: {{subnet: 10.0.0.0/24, ips: [10.0.0.1]}}\n")
    return str(path)


def test_a_wrong_kind_of_store_is_told() -> None:
    with pytest.raises(CliError, match="must be sqlite or kubernetes"):
        choose(argparse.Namespace(store="", kubeconfig="", context=""), {"SPIDERPOOL_STORE_KIND": "etcd"})


def facts(name: str, **spec: Any) -> Any:
    whole = {"subnet": "10.0.0.0/24", "ipVersion": 4, "ips": ["10.0.0.1"], **spec}
    return pool_facts(msgspec.convert({"metadata": {"name": name}, "spec": whole}, Pool))


def test_every_pool_has_its_place_or_its_reason() -> None:
    pools = {
        each.name: each
        for each in (
            facts("plain"),
            facts("mine", nodeName=["n1"]),
            facts("theirs", nodeName=["n2"]),
            facts("young"),
            facts("full"),
            facts("unasked"),
            facts("six", subnet="fd00::/64", ipVersion=6, ips=["fd00::1"]),
        )
    }
    seen = Seen(pools, {"young": "overlaps"}, {name: 0 if name == "full" else 3 for name in pools})
    named = {4: ("plain", "theirs", "gone", "young", "full", "mine"), 6: ()}
    rows = judged(Source("the annotation"), named, Asker(node="n1"), seen)  # type: ignore[arg-type]
    assert rows == [
        Row(4, "mine", 1, 3, ""),
        Row(4, "plain", 2, 3, ""),
        Row(4, "full", 3, 0, "no free address is left"),
        Row(4, "theirs", 0, 3, "nodeName does not list node n1"),
        Row(4, "gone", 0, None, "there is no such pool, or none that matches"),
        Row(4, "young", 0, 3, "overlaps"),
        Row(4, "unasked", 0, 3, "not asked for by the annotation"),
        Row(6, "six", 0, 3, "not asked for by the annotation"),
    ]


def claim(**spec: Any) -> Claim:
    whole = {"address": "10.0.0.1", "ipVersion": 4, "pool": "p", "containerID": "c", **spec}
    return msgspec.convert({"metadata": {"name": "10.0.0.1"}, "spec": whole}, Claim)


def test_on_a_machine_a_namespace_that_is_there_is_in_use(tmp_path: Path) -> None:
    path = str(tmp_path)
    inode = os.stat(path).st_ino
    held = on_machine(claim(netns=path, netnsInode=inode))
    assert (held.verdict.action, bool(held.locked)) == (Action.KEEP, True)
    for other in (claim(netns=path, netnsInode=inode + 1), claim(netns="/no/such", netnsInode=inode), claim()):
        left = on_machine(other)
        assert (left.verdict.action, left.locked) == (Action.KEEP, "")
    ends = {"reason": "r", "mac": "m", "until": "2000-01-01T00:00:00Z"}
    assert on_machine(claim(state="Quarantined", quarantine=ends)).verdict.action is Action.RELEASE
    later = {**ends, "until": "2999-01-01T00:00:00Z"}
    assert on_machine(claim(state="Quarantined", quarantine=later)).verdict.action is Action.LATER
