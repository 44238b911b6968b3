"""A header tree for BCC made of the UAPI headers that every distribution packages for its C library.

BCC wants the headers of the running kernel's build, which a node should not need: our programs touch UAPI structures
only. So this makes a directory of the shape that BCC expects of `BCC_KERNEL_SOURCE`: links to the installed UAPI
headers, and a few files in place of the kernel's own headers that BCC's prelude includes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile

from agent.dataplane.errors import HeadersMissingError

_BCC_ARCH = {"x86_64": "x86", "aarch64": "arm64"}
"""The name that BCC looks below `arch/` for."""

_TYPES = """\
#ifndef SPIDERPOOL_LINUX_TYPES_H
#define SPIDERPOOL_LINUX_TYPES_H
#include <uapi/linux/types.h>
typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s8 s8;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
typedef u8 uint8_t;
typedef u16 uint16_t;
typedef u32 uint32_t;
typedef u64 uint64_t;
typedef _Bool bool;
typedef int pid_t;
typedef unsigned long size_t;
typedef unsigned long uintptr_t;
enum { false = 0, true = 1 };
#define NULL ((void *)0)
#undef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif
"""

_FILES = {
    "include/linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n",
    "include/linux/types.h": _TYPES,
    "include/linux/version.h": "#include <uapi/linux/version.h>\n",
    "include/linux/log2.h": "",
    "include/asm/page.h": "",
    # BCC brings its own copy, of its own version: the installed one would define everything twice.
    "arch/{arch}/include/uapi/linux/bpf.h": "#include <bcc/bpf.h>\n",
}


def _uapi_directories(include: str, machine: str) -> dict[str, str]:
    """Where the tree's links point. Raises HeadersMissingError."""
    asm = next(
        (
            path
            for path in (f"{include}/{machine}-linux-gnu/asm", f"{include}/asm")
            if os.path.exists(f"{path}/types.h")
        ),
        None,
    )
    if asm is None or not os.path.exists(f"{include}/linux/bpf.h"):
        raise HeadersMissingError(
            f"no UAPI headers below {include} for {machine}: install linux-libc-dev (Debian) or kernel-headers (Fedora)"
        )
    return {"linux": f"{include}/linux", "asm-generic": f"{include}/asm-generic", "asm": asm}


def build(cache: str, include: str = "/usr/include", machine: str = "") -> str:
    """Path of the tree below `cache`, made if it is not there; for `machine` (default: this one).

    Safe beside another process that does the same. Raises HeadersMissingError, OSError.
    """
    machine = machine or platform.machine()
    if machine not in _BCC_ARCH:
        raise HeadersMissingError(f"architecture {machine} is not supported, only {', '.join(_BCC_ARCH)} are")
    links = _uapi_directories(include, machine)
    files = {path.format(arch=_BCC_ARCH[machine]): text for path, text in _FILES.items()}
    digest = hashlib.sha256(repr((links, files)).encode()).hexdigest()[:16]
    tree = f"{cache}/{digest}"
    if os.path.isdir(tree):
        return tree
    os.makedirs(cache, mode=0o755, exist_ok=True)
    draft = tempfile.mkdtemp(prefix=f"{digest}.", dir=cache)
    try:
        for path, text in files.items():
            os.makedirs(os.path.dirname(f"{draft}/{path}"), exist_ok=True)
            with open(f"{draft}/{path}", "w", encoding="ascii") as file:
                file.write(text)
        os.makedirs(f"{draft}/include/uapi")
        for name, target in links.items():
            os.symlink(target, f"{draft}/include/uapi/{name}")
        try:
            os.rename(draft, tree)
        except OSError:
            if not os.path.isdir(tree):  # else somebody else was first
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return tree
