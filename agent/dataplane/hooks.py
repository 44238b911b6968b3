"""The socket hooks of one cgroup: who holds them, attaching ours without a gap, taking them off.

Pins of one instance live in one directory:

    <pins>/v1/maps/…  <pins>/v1/programs/…  <pins>/v1/links/…  <pins>/v1/identity

where v1 is the schema of the maps. When maps of another layout are found they are moved aside, and removed once all
links lead to the new programs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from agent.dataplane import bpf
from agent.dataplane.bpf import BpfError
from agent.dataplane.errors import BusyError, HooksOwnedError, LoadError
from agent.dataplane.pack import SCHEMA


class Hook(NamedTuple):
    """A hook, its pin's name, our program for it and `enum bpf_attach_type`'s number."""

    name: str
    program: str
    attach_type: int


HOOKS = (
    Hook("getpeername4", "spider_peer4", 29),
    Hook("getpeername6", "spider_peer6", 30),
    Hook("recvmsg4", "spider_recvmsg4", 19),
    Hook("recvmsg6", "spider_recvmsg6", 20),
    Hook("sendmsg4", "spider_sendmsg4", 14),
    Hook("sendmsg6", "spider_sendmsg6", 15),
    Hook("connect4", "spider_connect4", 10),
    Hook("connect6", "spider_connect6", 11),
)
"""In the order of attaching: what translates back comes before what translates, so nothing is half translated."""

_OURS = "spider_"
_FOREIGN = {"cil_sock": "Cilium", "sock4_": "Cilium", "sock6_": "Cilium", "calico_": "Calico", "cali_": "Calico"}
"""Beginnings of other load balancers' program names."""

_MOUNT_SOURCE = "spiderpool"
"""Marks the BPF file system that we mounted, so that unloading may unmount it."""


class Pins:
    """Paths below one pins directory."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.version = f"{directory}/v{SCHEMA}"
        self.maps = f"{self.version}/maps"
        self.programs = f"{self.version}/programs"
        self.identity = f"{self.version}/identity"

    def link(self, hook: Hook) -> str:
        """Where the hook's link is pinned."""
        return f"{self.version}/links/{hook.name}"

    def others(self) -> list[str]:
        """Directories of other versions, and those moved aside."""
        with os.scandir(self.directory) as entries:
            return sorted(e.path for e in entries if e.is_dir() and e.path != self.version)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from changing the same pins. Raises BusyError at once if one does."""
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(f"another process is changing the pins below {self.directory}") from None
            yield
        finally:
            os.close(fd)


def find_cgroup(cgroup: str) -> str:
    """`cgroup`, or where cgroup2 is mounted if that is empty. Raises LoadError if there is none."""
    if cgroup:
        return cgroup
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        found = [fields[1] for fields in map(str.split, mounts) if fields[2] == "cgroup2"]
    if not found:
        raise LoadError("cgroup2 is not mounted; services need it (on a hybrid system at /sys/fs/cgroup/unified)")
    # The usual places first, or the shortest path, for runtimes mount further ones inside of containers.
    return min(found, key=lambda path: (not path.startswith("/sys/fs/cgroup"), len(path)))


def _is_bpffs(path: str) -> bool:
    """Whether `path` lies on a BPF file system: the last mount that contains it is one."""
    best, kind = "", ""
    real = os.path.realpath(path)
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        for fields in map(str.split, mounts):
            if (real + "/").startswith(fields[1].rstrip("/") + "/") and len(fields[1]) >= len(best):
                best, kind = fields[1], fields[2]
    return kind == "bpf"


def ensure_bpffs(root: str) -> None:
    """Mount a BPF file system for `root` unless it lies on one. Raises OSError."""
    if _is_bpffs(root):
        return
    usual = "/sys/fs/bpf"
    target = usual if (root + "/").startswith(usual + "/") else root
    if target != usual:
        os.makedirs(target, mode=0o700, exist_ok=True)
    bpf.mount_bpffs(_MOUNT_SOURCE, target)


def _unmount_ours(path: str) -> None:
    real = os.path.realpath(path)
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        ours = [f[1] for f in map(str.split, mounts) if f[0] == _MOUNT_SOURCE and f[2] == "bpf"]
    for target in ours:
        # The kernel puts two iterators of its own, *.debug, into every BPF file system.
        left = [name for name in os.listdir(target) if not name.endswith(".debug")]
        if (real + "/").startswith(target + "/") and not left:
            bpf.unmount(target)


def _ancestry(cgroup: str) -> Iterator[str]:
    """`cgroup` and the cgroups above it."""
    path = os.path.realpath(cgroup)
    while os.path.exists(f"{path}/cgroup.controllers"):
        yield path
        path = os.path.dirname(path)


def _open_cgroup(path: str) -> int:
    if not os.path.exists(f"{path}/cgroup.controllers"):
        raise LoadError(f"{path} is not a cgroup of version 2")
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _own_programs(pins: Pins) -> set[int]:
    """Ids of the programs that the links of this instance hold."""
    programs = set()
    for directory in [pins.version, *pins.others()]:
        for hook in HOOKS:
            fd = _get(f"{directory}/links/{hook.name}")
            if fd is not None:
                programs.add(bpf.link_info(fd).program)
                os.close(fd)
    return programs


def check_owner(cgroup: str, pins: Pins) -> None:
    """Refuse to go where another load balancer is. Raises HooksOwnedError, which names it, or LoadError.

    The hooks of the cgroup and of all above it run one after the other for the same call, so another balancer on any
    of them meets our addresses. An attachment that does not allow company (flags other than ALLOW_MULTI) would make
    attaching fail, or be replaced by ours for this cgroup: both are its owner's to decide.
    """
    os.close(_open_cgroup(cgroup))
    own = _own_programs(pins)
    for depth, path in enumerate(_ancestry(cgroup)):
        fd = _open_cgroup(path)
        try:
            for hook in HOOKS:
                attached = bpf.query(fd, hook.attach_type)
                others = {number: bpf.program_name(number) for number in attached.programs if number not in own}
                if others and not attached.flags & bpf.BPF_F_ALLOW_MULTI:
                    names = ", ".join(others.values())
                    raise HooksOwnedError(f"{hook.name} of {path} is held exclusively by the BPF program {names}")
                for name in others.values():
                    _check_name(name, hook, path, same_cgroup=depth == 0)
        finally:
            os.close(fd)


def _check_name(name: str, hook: Hook, path: str, *, same_cgroup: bool) -> None:
    owner = next((owner for start, owner in _FOREIGN.items() if name.startswith(start)), "")
    if name.startswith(_OURS) and same_cgroup:
        owner = "another Spiderpool with other pins"
    if owner:
        raise HooksOwnedError(f"{hook.name} of {path} is served by {owner} (BPF program {name})")


def _get(path: str) -> int | None:
    try:
        return bpf.get(path)
    except BpfError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def attach(cgroup: str, pins: Pins) -> None:
    """Let all hooks of `cgroup` run the pinned programs; those that ran older ones change over without a gap.

    The caller holds the lock. Raises HooksOwnedError, LoadError, BpfError.
    """
    check_owner(cgroup, pins)
    cgroup_fd = _open_cgroup(cgroup)
    try:
        os.makedirs(f"{pins.version}/links", mode=0o700, exist_ok=True)
        for hook in HOOKS:
            program = bpf.get(f"{pins.programs}/{hook.program}")
            try:
                _attach_one(cgroup_fd, hook, program, pins)
            finally:
                os.close(program)
    finally:
        os.close(cgroup_fd)
    for directory in pins.others():
        _remove(directory)


def _attach_one(cgroup: int, hook: Hook, program: int, pins: Pins) -> None:
    path = pins.link(hook)
    for candidate in [path, *(f"{other}/links/{hook.name}" for other in pins.others())]:
        link = _get(candidate)
        if link is None:
            continue
        try:
            if bpf.link_info(link).cgroup == os.fstat(cgroup).st_ino:
                bpf.link_update(link, program)
                if candidate != path:
                    os.rename(candidate, path)
                return
            # For another cgroup, as the settings were before, or for one that is gone.
            with suppress(BpfError):
                bpf.link_detach(link)
            os.unlink(candidate)
        finally:
            os.close(link)
    link = bpf.link_create(program, cgroup, hook.attach_type, hook.name)
    try:
        bpf.pin(link, path)
    finally:
        os.close(link)


def is_attached(cgroup: str, pins: Pins) -> bool:
    """Whether every hook of `cgroup` runs the program that is pinned for it."""
    inode = os.stat(cgroup).st_ino
    for hook in HOOKS:
        link, program = _get(pins.link(hook)), _get(f"{pins.programs}/{hook.program}")
        try:
            if link is None or program is None:
                return False
            info = bpf.link_info(link)
            if info.cgroup != inode or info.program != bpf.program_id(program):
                return False
        finally:
            for fd in (link, program):
                if fd is not None:
                    os.close(fd)
    return True


def unload(pins: Pins) -> list[str]:
    """Take everything of this instance out of the kernel; returns the pins removed. Raises BusyError, BpfError."""
    if not os.path.isdir(pins.directory):
        return []
    removed: list[str] = []
    with pins.locked():
        for directory in [pins.version, *pins.others()]:
            for hook in reversed(HOOKS):  # first what translates, then what translates back
                link = _get(f"{directory}/links/{hook.name}")
                if link is not None:
                    with suppress(BpfError):  # its cgroup may be gone, and it with it
                        bpf.link_detach(link)
                    os.close(link)
            removed += _remove(directory)
        os.rmdir(pins.directory)
    _unmount_ours(pins.directory)
    return removed


def _remove(directory: str) -> list[str]:
    removed = [os.path.join(top, name) for top, _, names in os.walk(directory) for name in names]
    shutil.rmtree(directory, ignore_errors=True)
    return removed
