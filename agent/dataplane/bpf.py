"""The bpf(2) calls that the dataplane needs, by ctypes: pins, links, queries and batches.

BCC compiles and loads, in a process of its own; the daemon only opens what is pinned and needs no more than this.
Source: the kernel's include/uapi/linux/bpf.h, `union bpf_attr`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

_SYSCALL = {"x86_64": 321, "aarch64": 280}
"""Number of bpf(2): arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h."""

_ATTR_SIZE = 144
"""Bytes of `union bpf_attr` that we pass; the kernel accepts more than it knows while the rest is zero."""

_BATCH = 4096
"""Entries per batch call: some 100 kB of buffer, and a system call's cost is lost in it."""

BPF_MAP_TYPE_ARRAY = 2
BPF_F_ALLOW_MULTI = 2

_MOUNT_FLAGS = 2 | 4 | 8
"""MS_NOSUID, MS_NODEV, MS_NOEXEC."""


class Command(IntEnum):
    """`enum bpf_cmd`, the members in use."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_GET_FD_BY_ID = 13
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    MAP_LOOKUP_BATCH = 24
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_DETACH = 34


_BATCHES = (Command.MAP_LOOKUP_BATCH, Command.MAP_UPDATE_BATCH, Command.MAP_DELETE_BATCH)


class BpfError(OSError):
    """A bpf(2) call failed; `done` entries of a batch were processed before."""

    def __init__(self, number: int, command: Command, subject: str = "", done: int = 0) -> None:
        name = errno.errorcode.get(number, str(number))
        where = f" ({subject})" if subject else ""
        super().__init__(number, f"BPF_{command.name}{where}: {name}, {os.strerror(number)}")
        self.subject = subject
        self.done = done

    def __str__(self) -> str:
        return str(self.strerror)


class MapInfo(NamedTuple):
    """`struct bpf_map_info`, the beginning."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


class LinkInfo(NamedTuple):
    """`struct bpf_link_info` of a cgroup link; `cgroup` is 0 once the cgroup is gone."""

    program: int
    cgroup: int
    attach_type: int


class Attached(NamedTuple):
    """Programs attached to one hook of one cgroup, and how (BPF_F_*)."""

    programs: list[int]
    flags: int


_libc = ctypes.CDLL(None, use_errno=True)


def _call(command: Command, attr: bytes, subject: str = "") -> tuple[int, ctypes.Array[ctypes.c_char]]:
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise BpfError(errno.ENOSYS, command, f"architecture {platform.machine()}")
    buffer = ctypes.create_string_buffer(attr, _ATTR_SIZE)
    result = _libc.syscall(number, int(command), buffer, _ATTR_SIZE)
    if result < 0:
        code = ctypes.get_errno()
        # A refused argument leaves the count as it was given.
        done = struct.unpack_from("=I", buffer, 32)[0] if command in _BATCHES and code != errno.EINVAL else 0
        raise BpfError(code, command, subject, done)
    return result, buffer


def pin(fd: int, path: str) -> None:
    """Give the object behind `fd` a name on a BPF file system. Raises BpfError."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    _call(Command.OBJ_PIN, struct.pack("=QII", ctypes.addressof(name), fd, 0), path)


def get(path: str) -> int:
    """A new descriptor of the object pinned at `path`. Raises BpfError."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _call(Command.OBJ_GET, struct.pack("=QII", ctypes.addressof(name), 0, 0), path)[0]


def _info(fd: int, size: int) -> bytes:
    info = ctypes.create_string_buffer(size)
    _call(Command.OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, size, ctypes.addressof(info)))
    return info.raw


def map_info(fd: int) -> MapInfo:
    """What the kernel knows of a map. Raises BpfError."""
    return MapInfo(*struct.unpack_from("=6I", _info(fd, 24)))


def program_id(fd: int) -> int:
    """The kernel's number for a program. Raises BpfError."""
    number: int = struct.unpack_from("=I", _info(fd, 8), 4)[0]
    return number


def program_name(number: int) -> str:
    """Name (up to 15 characters) of the program with this id; empty if it is gone. Raises BpfError."""
    try:
        fd = _call(Command.PROG_GET_FD_BY_ID, struct.pack("=I", number), f"program {number}")[0]
    except BpfError as error:
        if error.errno == errno.ENOENT:
            return ""
        raise
    try:
        name: bytes = struct.unpack_from("16s", _info(fd, 80), 64)[0]
    finally:
        os.close(fd)
    return name.split(b"\0", 1)[0].decode()


def link_info(fd: int) -> LinkInfo:
    """Where a cgroup link is attached. Raises BpfError."""
    return LinkInfo(*struct.unpack_from("=8xI4xQI", _info(fd, 32)))


def link_create(program: int, cgroup: int, attach_type: int, subject: str = "") -> int:
    """Attach a program to a cgroup beside others; the descriptor returned holds it there. Raises BpfError."""
    return _call(Command.LINK_CREATE, struct.pack("=IIII", program, cgroup, attach_type, 0), subject)[0]


def link_update(link: int, program: int) -> None:
    """Replace a link's program; no packet or call sees a gap. Raises BpfError."""
    _call(Command.LINK_UPDATE, struct.pack("=IIII", link, program, 0, 0))


def link_detach(link: int) -> None:
    """Take a link's program out now, whoever still holds the link. Raises BpfError."""
    _call(Command.LINK_DETACH, struct.pack("=I", link))


def query(cgroup: int, attach_type: int) -> Attached:
    """What is attached to this very cgroup (not to its ancestors). Raises BpfError."""
    most = 64  # BPF_CGROUP_MAX_PROGS
    ids = (ctypes.c_uint32 * most)()
    attr = struct.pack("=IIIIQI", cgroup, attach_type, 0, 0, ctypes.addressof(ids), most)
    buffer = _call(Command.PROG_QUERY, attr)[1]
    flags, count = struct.unpack_from("=I", buffer, 12)[0], struct.unpack_from("=I", buffer, 24)[0]
    return Attached(list(ids[:count]), flags)


def mount_bpffs(source: str, target: str) -> None:
    """Mount a BPF file system that root alone can enter; `source` is the name it shows as. Raises OSError."""
    if _libc.mount(source.encode(), os.fsencode(target), b"bpf", _MOUNT_FLAGS, b"mode=0700"):
        raise OSError(ctypes.get_errno(), f"mounting a BPF file system at {target}: {os.strerror(ctypes.get_errno())}")


def unmount(target: str) -> None:
    """Unmount. Raises OSError."""
    if _libc.umount2(os.fsencode(target), 0):
        raise OSError(ctypes.get_errno(), f"unmounting {target}: {os.strerror(ctypes.get_errno())}")


def possible_cpus() -> int:
    """How many values a per-CPU map has for each key."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        ranges = [part.split("-") for part in file.read().strip().split(",")]
    return sum(int(r[-1]) - int(r[0]) + 1 for r in ranges)


class Map:
    """An open map whose keys and values are bytes; per-CPU maps have one value of 8 bytes for each possible CPU."""

    def __init__(self, fd: int, name: str, *, per_cpu: bool = False) -> None:
        self.fd = fd
        self.name = name
        self.info = map_info(fd)
        self.value_size = 8 * possible_cpus() if per_cpu else self.info.value_size

    @classmethod
    def open(cls, path: str, *, per_cpu: bool = False) -> Map:
        """Open the map pinned at `path`. Raises BpfError."""
        return cls(get(path), os.path.basename(path), per_cpu=per_cpu)

    @classmethod
    def create_array(cls, name: str, value_size: int) -> Map:
        """A new array of one value, key 0. Raises BpfError."""
        attr = struct.pack("=IIIIIII16s", BPF_MAP_TYPE_ARRAY, 4, value_size, 1, 0, 0, 0, name.encode())
        return cls(_call(Command.MAP_CREATE, attr, name)[0], name)

    def close(self) -> None:
        """Give the descriptor back; the map lives on while it is pinned or used."""
        os.close(self.fd)

    def lookup(self, key: bytes) -> bytes | None:
        """The value of `key`, or None. Raises BpfError."""
        k, v = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(self.value_size)
        try:
            _call(Command.MAP_LOOKUP_ELEM, struct.pack("=I4xQQQ", self.fd, ctypes.addressof(k), ctypes.addressof(v), 0))
        except BpfError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return v.raw

    def set(self, key: bytes, value: bytes) -> None:
        """Write one entry. Raises BpfError."""
        k, v = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value, len(value))
        attr = struct.pack("=I4xQQQ", self.fd, ctypes.addressof(k), ctypes.addressof(v), 0)
        _call(Command.MAP_UPDATE_ELEM, attr, self.name)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All entries, in no order. An entry written meanwhile may be missing, or come twice. Raises BpfError."""
        key_size, value_size, size = self.info.key_size, self.value_size, _BATCH
        position = (ctypes.create_string_buffer(max(4, key_size)), ctypes.create_string_buffer(max(4, key_size)))
        first = True
        while True:
            keys, values = ctypes.create_string_buffer(size * key_size), ctypes.create_string_buffer(size * value_size)
            start = 0 if first else ctypes.addressof(position[0])
            end = ctypes.addressof(position[1])
            try:
                count = self._batch(Command.MAP_LOOKUP_BATCH, keys, values, size, (start, end))
                last = False
            except BpfError as error:
                if error.errno == errno.ENOSPC:  # one hash bucket has more entries than the buffer
                    size *= 2
                    continue
                if error.errno != errno.ENOENT:
                    raise
                count, last = error.done, True
            ks, vs = keys.raw, values.raw
            for i in range(count):
                yield ks[i * key_size : (i + 1) * key_size], vs[i * value_size : (i + 1) * value_size]
            if last:
                return
            position, first = (position[1], position[0]), False

    def update(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Write entries, in order. Raises BpfError, whose `done` counts those written before."""
        for start in range(0, len(entries), _BATCH):
            part = entries[start : start + _BATCH]
            keys = ctypes.create_string_buffer(b"".join(k for k, _ in part), len(part) * self.info.key_size)
            values = ctypes.create_string_buffer(b"".join(v for _, v in part), len(part) * self.value_size)
            try:
                self._batch(Command.MAP_UPDATE_BATCH, keys, values, len(part))
            except BpfError as error:
                error.done += start
                raise

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove entries; those that are not there count as removed. Raises BpfError."""
        start = 0
        while start < len(keys):
            part = keys[start : start + _BATCH]
            buffer = ctypes.create_string_buffer(b"".join(part), len(part) * self.info.key_size)
            try:
                self._batch(Command.MAP_DELETE_BATCH, buffer, None, len(part))
                start += len(part)
            except BpfError as error:
                if error.errno != errno.ENOENT:
                    raise
                start += error.done + 1

    def _batch(
        self,
        command: Command,
        keys: ctypes.Array[ctypes.c_char],
        values: ctypes.Array[ctypes.c_char] | None,
        count: int,
        positions: tuple[int, int] = (0, 0),
    ) -> int:
        v = ctypes.addressof(values) if values is not None else 0
        attr = struct.pack("=QQQQIIQQ", *positions, ctypes.addressof(keys), v, count, self.fd, 0, 0)
        done: int = struct.unpack_from("=I", _call(command, attr, self.name)[1], 32)[0]
        return done
