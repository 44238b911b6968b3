"""The virtual machine itself: what it hands back, and that it leaves nothing, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.vm.build import CACHE, PACKAGES, archive, closure, dependencies
from lab.vm.machine import PROGRAM
from lab.vm.run import DIED, RUNS, TIMED_OUT

BOOT = 110
"""Seconds that a machine may take until it has done next to nothing; five when this one is idle."""


def argv(*words: str, timeout: float = BOOT, options: tuple[str, ...] = ()) -> list[str]:
    start = [sys.executable, "-m", "lab.vm", "run", "--cpus", "1", "--memory", "512", "--timeout", str(timeout)]
    return [*start, *options, "--", *words]


def machines_of(runner: int) -> list[int]:
    """QEMU processes that the process started."""
    children = Path(f"/proc/{runner}/task/{runner}/children").read_text().split()
    return [int(pid) for pid in children if PROGRAM[:15] in Path(f"/proc/{pid}/comm").read_text()]


def until(condition: Callable[[], object], what: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def running(*words: str, timeout: float = BOOT) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A runner and its QEMU."""
    runner = subprocess.Popen(argv(*words, timeout=timeout), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: machines_of(runner.pid), "QEMU was started", 60)
        yield runner, machines_of(runner.pid)[0]
    finally:
        runner.kill()
        runner.communicate()


def gone(pid: int) -> bool:
    """Whether the process has ended; whoever adopted it may still have to collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_output_status_files_and_the_other_kernel(tmp_path: Path) -> None:
    script = f"uname -r; id -u; pwd; echo $WORD; echo kept > {tmp_path}/file; echo lost > /usr/bin/lost; exit 7"
    done = subprocess.run(
        argv("sh", "-c", script, options=("--write", str(tmp_path), "--env", "WORD=two words")),
        capture_output=True,
        text=True,
        check=False,
        timeout=BOOT + 30,
    )
    assert done.returncode == 7, done.stderr
    release, user, folder, word = done.stdout.splitlines()
    assert release != os.uname().release
    assert (user, folder, word) == ("0", os.getcwd(), "two words")
    assert (tmp_path / "file").read_text() == "kept\n"
    assert not Path("/usr/bin/lost").exists()


def test_a_panic_is_told() -> None:
    done = subprocess.run(
        argv("sh", "-c", "echo c > /proc/sysrq-trigger; sleep 60"),
        capture_output=True,
        text=True,
        check=False,
        timeout=BOOT + 30,
    )
    assert done.returncode == DIED
    assert "sysrq triggered crash" in done.stderr


def test_the_deadline_ends_the_machine() -> None:
    with running("sleep", "1000", timeout=3) as (runner, qemu):
        _, said = runner.communicate(timeout=30)
        assert runner.returncode == TIMED_OUT
        assert "out of time" in said
        assert gone(qemu)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_a_stopped_runner(number: signal.Signals) -> None:
    before = set(os.listdir(RUNS)) if os.path.isdir(RUNS) else set()
    with running("sleep", "1000") as (runner, qemu):
        runner.send_signal(number)
        runner.communicate(timeout=30)
        assert runner.returncode == (-9 if number == signal.SIGKILL else 130)
        until(lambda: gone(qemu), "QEMU has ended")
    left = set(os.listdir(RUNS)) - before
    assert len(left) <= (number == signal.SIGKILL)
    with running("sleep", "1000", timeout=2) as (runner, _):
        runner.communicate(timeout=30)
    assert not left & set(os.listdir(RUNS))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        argv("true"), capture_output=True, text=True, check=False, timeout=60, env={"PATH": str(tmp_path)}
    )
    assert done.returncode == 2
    assert f"{PROGRAM} is not installed: run `make vm`" in done.stderr


def test_a_folder_that_is_not_there_cannot_be_written_to(tmp_path: Path) -> None:
    done = subprocess.run(
        argv("true", options=("--write", str(tmp_path / "none"))),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "is no folder" in done.stderr


NEEDS = dependencies("a/x.ko.xz: b/y.ko.xz c/z.ko.xz\nb/y.ko.xz: c/z.ko.xz\nc/z.ko.xz:\nax/w.ko.xz:\n")


def test_modules_come_after_what_they_need() -> None:
    assert closure(NEEDS, ["a"]) == ["c/z.ko.xz", "b/y.ko.xz", "a/x.ko.xz"]
    assert closure(NEEDS, ["b/y.ko"]) == ["c/z.ko.xz", "b/y.ko.xz"]
    assert closure(NEEDS, ["nothing"]) == []


def test_the_archive_is_what_busybox_reads(tmp_path: Path) -> None:
    content = archive({"init": (0o755, b"#!"), "a/b/c": (0o644, b"12345")})
    subprocess.run(["/bin/busybox", "cpio", "-idm"], input=content, check=True, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "a/b/c").read_bytes() == b"12345"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "init"]


def test_what_was_built_is_found_again() -> None:
    build = [sys.executable, "-m", "lab.vm", "build"]
    subprocess.run(build, check=True, timeout=100, capture_output=True)
    before = {entry: os.stat(f"{CACHE}/{entry}").st_ino for entry in os.listdir(CACHE)}
    done = subprocess.run(build, check=True, timeout=20, capture_output=True, text=True)
    assert "is ready" in done.stdout
    assert {entry: os.stat(f"{CACHE}/{entry}").st_ino for entry in os.listdir(CACHE)} == before
    assert os.listdir(PACKAGES)
