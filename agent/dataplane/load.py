"""Load, attach or unload the socket programs: `python -m agent.dataplane.load [load|attach|unload] --pins …`.

A process of its own, for BCC brings a compiler into memory that the daemon should not carry. It prints one line of
JSON, `{"ok": true, …}` or `{"ok": false, "error": …, "reason": …}`, and ends with 0 or 1. Doing it twice is the same
as once: maps of the same layout stay with all that is in them, programs of the same source stay, and where the source
changed every hook is switched over without a gap.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from agent.dataplane import bpf, headers, hooks
from agent.dataplane.errors import DataplaneError, LoadError
from agent.dataplane.hooks import HOOKS, Pins
from agent.dataplane.pack import layout_digest, layouts
from agent.dataplane.settings import DataplaneSettings

SOURCES = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "bpf")
"""Directory of the C sources."""

_CGROUP_SOCK_ADDR = 18
"""`enum bpf_prog_type`: BPF_PROG_TYPE_CGROUP_SOCK_ADDR."""

_KEY = bytes(4)
_UNKNOWN = bytes(32)
_INCLUDE = re.compile(r'^#include "([a-z_]+\.h)"\n', re.MULTILINE)


def read_source(name: str) -> str:
    """The text of `bpf/<name>` with our own headers put in once each, at their first inclusion.

    BCC translates its dialect (`map.lookup(&key)`) in the main file only, so there must be no other.
    """
    return _expand(name, set())


def _expand(name: str, seen: set[str]) -> str:
    with open(os.path.join(SOURCES, name), encoding="utf-8") as file:
        parts = _INCLUDE.split(file.read())
    for index in range(1, len(parts), 2):
        header = parts[index]
        known = header in seen
        seen.add(header)
        parts[index] = "" if known else _expand(header, seen)
    return "".join(parts)


@dataclass(frozen=True, slots=True)
class Loader:
    """One run, for one set of pins."""

    pins: Pins
    settings: DataplaneSettings

    def prepare(self) -> dict[str, Any]:
        """Pin maps and programs. The caller holds the lock. Raises DataplaneError, OSError."""
        maps = self._settle_maps()
        flags = [
            f'-DPINS="{self.pins.maps}"',
            f"-DMAX_SERVICES={self.settings.max_services}",
            f"-DMAX_BACKENDS={self.settings.max_backends}",
            f"-DMAX_FLOWS={2 * self.settings.max_udp_flows}",
        ]
        text = read_source("service.bpf.c")
        layout, source = layout_digest(self.settings), hashlib.sha256(repr((text, flags)).encode()).digest()
        if self._identity() == layout + source and self._has_programs():
            return {"maps": maps, "programs": "kept"}
        self._write_identity(layout + _UNKNOWN)
        self._compile(text, flags)
        self._write_identity(layout + source)
        return {"maps": maps, "programs": "loaded"}

    def _settle_maps(self) -> str:
        """Keep the pinned maps if they are of our layout, else move them aside, for running programs use them."""
        if not os.path.isdir(self.pins.version):
            found = "created"
        elif self._identity()[:32] == layout_digest(self.settings) and self._maps_fit():
            return "kept"
        else:
            os.rename(self.pins.version, f"{self.pins.directory}/old-{os.urandom(4).hex()}")
            found = "replaced"
        for path in (self.pins.maps, self.pins.programs, f"{self.pins.version}/links"):
            os.makedirs(path, mode=0o700)
        return found

    def _identity(self) -> bytes:
        """Digest of the layout, then that of the source, of what is pinned."""
        if not os.path.exists(self.pins.identity):
            return _UNKNOWN + _UNKNOWN
        pinned = bpf.Map.open(self.pins.identity)
        try:
            return pinned.lookup(_KEY) or _UNKNOWN + _UNKNOWN
        finally:
            pinned.close()

    def _write_identity(self, value: bytes) -> None:
        if os.path.exists(self.pins.identity):
            pinned = bpf.Map.open(self.pins.identity)
        else:
            pinned = bpf.Map.create_array("spider_identity", len(value))
            bpf.pin(pinned.fd, self.pins.identity)
        try:
            pinned.set(_KEY, value)
        finally:
            pinned.close()

    def _maps_fit(self) -> bool:
        """Whether the kernel says of every pinned map what the layout says. Missing ones will be created."""
        for name, layout in layouts(self.settings).items():
            path = f"{self.pins.maps}/{name}"
            if os.path.exists(path):
                pinned = bpf.Map.open(path)
                info = pinned.info
                pinned.close()
                if (info.type, info.key_size, info.value_size, info.max_entries) != layout:
                    return False
        return True

    def _has_programs(self) -> bool:
        paths = [f"{self.pins.programs}/{hook.program}" for hook in HOOKS]
        paths += [f"{self.pins.maps}/{name}" for name in layouts(self.settings)]
        return all(os.path.exists(path) for path in paths)

    def _compile(self, text: str, flags: list[str]) -> None:
        module = compile_source(text, flags, self.settings.headers_cache)
        for hook in HOOKS:
            try:
                function = module.load_func(hook.program, _CGROUP_SOCK_ADDR, None, hook.attach_type)
            except Exception as error:  # BCC raises nothing more specific
                needed = f"Linux 5.18 or its BPF is needed, this is {platform.release()}"
                raise LoadError(f"the kernel refused {hook.program} ({needed}): {error}") from error
            draft = f"{self.pins.programs}/new"
            with suppress(FileNotFoundError):  # left by a run that was killed
                os.unlink(draft)
            bpf.pin(function.fd, draft)
            os.rename(draft, f"{self.pins.programs}/{hook.program}")
        if not self._maps_fit():
            raise LoadError("the maps that were compiled are not those of agent/dataplane/pack.py")


def compile_source(text: str, flags: list[str], headers_cache: str) -> Any:
    """The compiled BCC module; its maps exist. Warnings are errors. Raises LoadError, HeadersMissingError."""
    os.environ["BCC_KERNEL_SOURCE"] = headers.build(headers_cache)
    os.environ.pop("ARCH", None)  # BCC would compile for it
    try:
        from bcc import BPF  # noqa: PLC0415 (brings LLVM into memory: only when there is something to compile)
    except ImportError as error:
        raise LoadError(f"BCC is not installed ({error}): install python3-bpfcc") from None
    try:
        return BPF(text=text, cflags=["-Wall", "-Werror", *flags])
    except Exception as error:  # BCC raises nothing more specific
        raise LoadError(f"compiling the programs failed: {error}") from error


def run(action: str, cgroup: str, pins: Pins, settings: DataplaneSettings, *, defer: bool = False) -> dict[str, Any]:
    """Do what the command line asks for. Raises DataplaneError, OSError."""
    if action == "compile":
        with tempfile.TemporaryDirectory(prefix="spiderpool-headers-") as cache:
            compile_source(read_source("service.bpf.c"), [], cache)
        return {"compiled": True}
    if action == "unload":
        return {"removed": len(hooks.unload(pins))}
    path = hooks.find_cgroup(cgroup)
    hooks.ensure_bpffs(os.path.dirname(pins.directory))
    os.makedirs(pins.directory, mode=0o700, exist_ok=True)
    with pins.locked():
        hooks.check_owner(path, pins)
        result = Loader(pins, settings).prepare()
        if not defer:
            hooks.attach(path, pins)
    return {**result, "cgroup": path, "attached": not defer}


def main() -> int:
    """The command. The exit status is 0, or 1 if the JSON line says why not."""
    defaults = DataplaneSettings()
    parser = argparse.ArgumentParser(prog="python -m agent.dataplane.load", description="Load the socket programs.")
    parser.add_argument("action", nargs="?", choices=("load", "unload"), default="load")
    parser.add_argument("--pins", default=f"{defaults.bpffs}/spiderpool", help="directory for our pins (%(default)s)")
    parser.add_argument("--cgroup", default="", help="cgroup v2 directory to serve (default: all of the node)")
    parser.add_argument("--headers-cache", default=defaults.headers_cache, help="(%(default)s)")
    parser.add_argument("--max-services", type=int, default=defaults.max_services, help="(%(default)s)")
    parser.add_argument("--max-backends", type=int, default=defaults.max_backends, help="(%(default)s)")
    parser.add_argument("--max-udp-flows", type=int, default=defaults.max_udp_flows, help="(%(default)s)")
    parser.add_argument("--defer-attach", action="store_true", help="leave the hooks as they are")
    parser.add_argument("--compile-only", action="store_true", help="compile, pin and attach nothing")
    arguments = parser.parse_args()
    action = "compile" if arguments.compile_only else arguments.action
    try:
        settings = DataplaneSettings(
            headers_cache=arguments.headers_cache,
            max_services=arguments.max_services,
            max_backends=arguments.max_backends,
            max_udp_flows=arguments.max_udp_flows,
        )
        if not re.fullmatch(r"/[\w./-]+", arguments.pins):
            raise LoadError(f"--pins {arguments.pins!r} must be an absolute path of letters, digits, '.', '_', '-'")
        pins = Pins(os.path.normpath(arguments.pins))
        result = {"ok": True, **run(action, arguments.cgroup, pins, settings, defer=arguments.defer_attach)}
    except (DataplaneError, OSError, ValueError) as error:
        result = {"ok": False, "error": str(error), "reason": type(error).__name__}
    print(json.dumps(result))  # noqa: T201 (the result is this program's output)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
