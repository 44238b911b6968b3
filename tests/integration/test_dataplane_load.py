"""Loading, loading again, refusing, unloading."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from agent.dataplane import bpf
from agent.dataplane.hooks import HOOKS, is_attached
from tests.integration.dataplane_node import FOUR, VIP4, Node, backends, frontend

PROG_LOAD, PROG_ATTACH, PROG_DETACH = 5, 8, 9
CONNECT4 = 10
ALLOW_MULTI = 2


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(str(tmp_path)) as node:
        yield node


@contextmanager
def attached(cgroup: str, name: str, flags: int) -> Iterator[None]:
    """A program of somebody else, which lets everything pass, on connect4 of the cgroup."""
    instructions = ctypes.create_string_buffer(bytes.fromhex("b7000000010000009500000000000000"))  # r0 = 1; exit
    licence = ctypes.create_string_buffer(b"GPL")
    head = struct.pack("=IIQQ", 18, 2, ctypes.addressof(instructions), ctypes.addressof(licence))
    load = head + struct.pack("=24x16s4xI", name.encode(), CONNECT4)
    program = bpf._call(PROG_LOAD, load)[0]  # type: ignore[arg-type]
    directory = os.open(cgroup, os.O_RDONLY)
    bpf._call(PROG_ATTACH, struct.pack("=IIII", directory, program, CONNECT4, flags))  # type: ignore[arg-type]
    try:
        yield
    finally:
        bpf._call(PROG_DETACH, struct.pack("=III", directory, program, CONNECT4))  # type: ignore[arg-type]
        os.close(directory)
        os.close(program)


def identities(node: Node) -> dict[str, int]:
    """The kernel's numbers for the programs that the hooks run and for the maps."""
    result = {}
    for hook in HOOKS:
        fd = bpf.get(node.pins.link(hook))
        result[hook.name] = bpf.link_info(fd).program
        os.close(fd)
    for name in os.listdir(node.pins.maps):
        opened = bpf.Map.open(f"{node.pins.maps}/{name}")
        result[name] = opened.info.id
        opened.close()
    return result


def hooked(cgroup: str) -> list[int]:
    fd = os.open(cgroup, os.O_RDONLY)
    try:
        return [number for hook in HOOKS for number in bpf.query(fd, hook.attach_type).programs]
    finally:
        os.close(fd)


def test_loading_twice_changes_nothing(node: Node) -> None:
    assert node.load() == {
        "ok": True, "maps": "created", "programs": "loaded", "cgroup": node.cgroup, "attached": True,
    }  # fmt: skip
    with node.tables() as tables:
        tables.program({frontend(VIP4, 80): backends(*FOUR)})
    before = identities(node)
    second = node.load()
    assert (second["maps"], second["programs"]) == ("kept", "kept")
    assert identities(node) == before
    assert node.contents() == {frontend(VIP4, 80): backends(*FOUR)}


def test_missing_program_pin_is_loaded_again_over_the_same_maps(node: Node) -> None:
    """As after a loader that was killed half way."""
    node.load()
    with node.tables() as tables:
        tables.program({frontend(VIP4, 80): backends(*FOUR)})
    os.unlink(f"{node.pins.programs}/spider_connect4")
    assert node.load()["programs"] == "loaded"
    assert is_attached(node.cgroup, node.pins)
    assert node.contents() == {frontend(VIP4, 80): backends(*FOUR)}
    assert len(hooked(node.cgroup)) == len(HOOKS)


@pytest.mark.parametrize("damage", ["sizes", "no identity", "foreign map"])
def test_maps_of_another_layout_are_replaced_and_removed(node: Node, damage: str) -> None:
    node.load()
    before = identities(node)
    if damage == "no identity":
        os.unlink(node.pins.identity)
    elif damage == "foreign map":
        os.unlink(f"{node.pins.maps}/slots")
        fake = bpf.Map.create_array("slots", 4)
        bpf.pin(fake.fd, f"{node.pins.maps}/slots")
        fake.close()
    result = node.load(*(["--max-services=100"] if damage == "sizes" else []))
    assert (result["maps"], result["programs"]) == ("replaced", "loaded")
    assert not set(identities(node).values()) & set(before.values())
    assert os.listdir(node.pins.directory) == ["v1"]
    assert len(hooked(node.cgroup)) == len(HOOKS)


def test_deferred_attachment_leaves_the_hooks_alone(node: Node) -> None:
    assert node.load("--defer-attach")["attached"] is False
    assert hooked(node.cgroup) == []


def test_another_cgroup_takes_the_hooks_along(node: Node) -> None:
    node.load()
    other = f"{node.cgroup}/inner"
    os.mkdir(other)
    try:
        assert node.load(f"--cgroup={other}")["ok"]
        assert hooked(node.cgroup) == []
        assert len(hooked(other)) == len(HOOKS)
    finally:
        node.load(action="unload")
        os.rmdir(other)


@pytest.mark.parametrize(
    ("name", "flags", "below", "message"),
    [
        ("somebody", 0, False, "connect4 of {} is held exclusively by the BPF program somebody"),
        ("somebody", 0, True, "connect4 of {} is held exclusively by the BPF program somebody"),
        ("cil_sock4_conne", ALLOW_MULTI, True, "connect4 of {} is served by Cilium (BPF program cil_sock4_conne)"),
        ("calico_connect_", ALLOW_MULTI, False, "connect4 of {} is served by Calico (BPF program calico_connect_)"),
    ],
)
def test_other_load_balancers_are_not_disturbed(node: Node, name: str, flags: int, below: bool, message: str) -> None:
    cgroup = f"{node.cgroup}/inner" if below else node.cgroup
    os.makedirs(cgroup, exist_ok=True)
    with attached(node.cgroup, name, flags):
        result = node.load(f"--cgroup={cgroup}")
        assert result == {"ok": False, "error": message.format(node.cgroup), "reason": "HooksOwnedError"}
        assert len(hooked(node.cgroup)) == 1
    if below:
        os.rmdir(cgroup)


def test_company_that_is_no_load_balancer_is_welcome(node: Node) -> None:
    with attached(node.cgroup, "firewall", ALLOW_MULTI):
        assert node.load()["ok"]
        assert len(hooked(node.cgroup)) == len(HOOKS) + 1


def test_second_instance_on_the_same_cgroup_is_refused(node: Node) -> None:
    node.load()
    result = node.load(f"--pins={node.bpffs}/second")
    assert result["reason"] == "HooksOwnedError"
    assert "another Spiderpool" in result["error"]
    node.load(f"--pins={node.bpffs}/second", action="unload")


def test_concurrent_change_is_refused(node: Node) -> None:
    node.load()
    with node.pins.locked():
        assert node.load()["reason"] == "BusyError"
    assert node.load()["ok"]


def test_cgroup_must_be_one(node: Node, tmp_path: Path) -> None:
    assert node.load(f"--cgroup={tmp_path}") == {
        "ok": False, "error": f"{tmp_path} is not a cgroup of version 2", "reason": "LoadError",
    }  # fmt: skip


def test_unloading_leaves_nothing_and_twice_is_fine(node: Node) -> None:
    node.load()
    assert os.path.ismount(node.bpffs)
    assert node.load(action="unload")["ok"]
    assert hooked(node.cgroup) == []
    assert not os.path.ismount(node.bpffs)
    assert os.listdir(node.bpffs) == []
    assert node.load(action="unload") == {"ok": True, "removed": 0}


def test_somebody_elses_bpf_file_system_stays(node: Node) -> None:
    os.mkdir(node.bpffs)
    subprocess.run(["mount", "-t", "bpf", "theirs", node.bpffs], check=True)
    assert node.load()["ok"]
    assert node.load(action="unload")["ok"]
    assert os.path.ismount(node.bpffs)
    assert not os.path.exists(node.pins.directory)


def test_batches_larger_than_one_call(node: Node) -> None:
    """More entries than one batch holds, and reading all of them back."""
    node.load()
    services = bpf.Map.open(f"{node.pins.maps}/services")
    try:
        entries = [(b"%020d" % number, b"%08d" % number) for number in range(10_000)]
        services.update(entries)
        assert sorted(services.items()) == entries
        services.delete([key for key, _ in entries[::2]])
        services.delete([key for key, _ in entries])  # half of them are gone already
        assert list(services.items()) == []
    finally:
        services.close()


def test_map_sizes_come_from_the_settings(node: Node) -> None:
    node.load("--max-services=7", "--max-backends=9", "--max-udp-flows=1000")
    sizes = {}
    for name in ("services", "slots", "flows"):
        opened = bpf.Map.open(f"{node.pins.maps}/{name}")
        sizes[name] = opened.info.max_entries
        opened.close()
    assert sizes == {"services": 7, "slots": 9, "flows": 2000}
    assert replace(node.settings).max_services != 7
