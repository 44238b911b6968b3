"""The CNI executable by itself: what it says and does when there is no agent."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.installation import CONFIG, NAMES, ROOT, Installation, Outcome, collect, variables

VERSIONS = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
LIMIT = 1 << 20


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    subprocess.run([ROOT / "plugins/shim/build.sh", "native"], check=True)


@pytest.fixture
def cni(tmp_path: Path) -> Installation:
    return Installation(tmp_path)


def config(version: str) -> dict[str, Any]:
    return {**CONFIG, "cniVersion": version}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("version", VERSIONS)
def test_version_is_answered_locally(cni: Installation, name: str, version: str) -> None:
    outcome = cni.call("VERSION", {"cniVersion": version}, name=name)
    assert outcome.status == 0
    assert outcome.json == {"cniVersion": version, "supportedVersions": VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("command", "code"), [("CHECK", 11), ("STATUS", 50)])
def test_without_an_agent_calls_fail_in_the_callers_version(
    cni: Installation, version: str, command: str, code: int
) -> None:
    error = cni.call(command, config(version)).error(code, version)
    assert str(cni.socket) in error["details"]


def test_add_waits_for_a_restarting_agent_but_not_for_ever(cni: Installation) -> None:
    started = time.monotonic()
    cni.call("ADD").error(11)
    assert 4 < time.monotonic() - started < 8


@pytest.mark.parametrize("command", ["DEL", "GC"])
def test_deletions_are_queued(cni: Installation, command: str) -> None:
    started = time.monotonic()
    cni.call(command, CONFIG, CNI_NETNS="/nowhere", CNI_ARGS="K8S_POD_NAME=p").empty()
    assert time.monotonic() - started < 2
    (path,) = cni.queued()
    env, stdin = variables(path.read_bytes())
    assert env == {
        "SPIDERPOOL_PLUGIN": "spiderpool",
        "SPIDERPOOL_CNI_VERSION": "1.0.0",
        "SPIDERPOOL_NETNS_ERROR": "No such file or directory",
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "c1",
        "CNI_IFNAME": "eth0",
        "CNI_NETNS": "/nowhere",
        "CNI_PATH": str(cni.bin),
        "CNI_ARGS": "K8S_POD_NAME=p",
    }
    assert json.loads(stdin) == CONFIG
    assert cni.queue.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_order_of_queue_files_is_the_order_in_time(cni: Installation) -> None:
    for number in range(20):
        cni.call("DEL", CNI_CONTAINERID=f"c{number}").empty()
    order = [variables(path.read_bytes())[0]["CNI_CONTAINERID"] for path in cni.queued()]
    assert order == [f"c{number}" for number in range(20)]


def test_queue_files_of_concurrent_callers_do_not_collide(cni: Installation) -> None:
    running = [cni.start("DEL", CNI_CONTAINERID=f"c{number}") for number in range(64)]
    for process in running:
        collect(process).empty()
    owners = {variables(path.read_bytes())[0]["CNI_CONTAINERID"] for path in cni.queued()}
    assert owners == {f"c{number}" for number in range(64)}


def test_what_can_neither_be_executed_nor_queued_fails(cni: Installation) -> None:
    cni.queue.parent.mkdir(parents=True)
    cni.queue.write_text("in the way")
    error = cni.call("DEL").error(5)
    assert "Not a directory" in error["details"]


def test_a_full_disk_leaves_no_half_written_file(cni: Installation) -> None:
    limited = subprocess.run(
        ["prlimit", "--fsize=4096", cni.bin / "spiderpool"],
        env=cni.environment("DEL"),
        input=json.dumps({**CONFIG, "x": "y" * 100_000}).encode(),
        capture_output=True,
        check=False,
    )
    assert "File too large" in Outcome(limited.returncode, limited.stdout).error(5)["details"]
    assert not list(cni.queue.iterdir())


def test_queueing_can_be_seen_to_reach_the_disk(cni: Installation) -> None:
    trace = cni.root / "trace"
    calls = "fsync,rename,renameat,renameat2,syncfs"
    result = subprocess.run(
        ["strace", "-f", "-o", trace, "-e", f"trace={calls}", cni.bin / "spiderpool"],
        env=cni.environment("DEL"),
        input=b"{}",
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0
    order = [line.split("(")[0].split()[-1] for line in trace.read_text().splitlines() if "(" in line]
    assert order == ["syncfs", "fsync", "renameat", "fsync"] or order == ["syncfs", "fsync", "renameat2", "fsync"]


@pytest.mark.parametrize("command", ["ADD", "DEL"])
@pytest.mark.parametrize("size", [LIMIT + 1, 3 * LIMIT])
def test_too_large_input_names_the_limit(cni: Installation, command: str, size: int) -> None:
    text = b'{"cniVersion":"0.4.0","x":"' + b"y" * size
    error = cni.call(command, text).error(6, "0.4.0")
    assert str(LIMIT) in error["details"]
    assert cni.queued() == []


def test_the_largest_input_is_taken(cni: Installation) -> None:
    text = b'{"cniVersion":"0.4.0","x":"'
    text += b"y" * (LIMIT - len(text) - 2) + b'"}'
    cni.call("DEL", text).empty()
    (path,) = cni.queued()
    assert variables(path.read_bytes())[1] == text


def test_too_large_environment_names_the_limit(cni: Installation) -> None:
    error = cni.call("DEL", CNI_ARGS="a" * 100_000, CNI_PATH="b" * 100_000).error(4)
    assert str(128 << 10) in error["details"]
    assert cni.queued() == []


@pytest.mark.parametrize("command", [None, "", "add", "FROB", "ADD ", 'A"B\\C\n', "x" * 5000, "\udcff\udcfe"])
def test_a_missing_or_unknown_command_is_named(cni: Installation, command: str | None) -> None:
    error = cni.call(command, config("0.3.1")).error(4, "0.3.1")
    assert "CNI_COMMAND" in error["msg"]


@pytest.mark.parametrize(
    ("stdin", "version"),
    [
        (b"", "1.0.0"),
        (b"{", "1.0.0"),
        (b"null", "1.0.0"),
        (b"\xff\xfe\x00", "1.0.0"),
        (b'{"cniVersion":"9.9.9"}', "1.0.0"),
        (b'{"cniVersion":4}', "1.0.0"),
        (b'{"cniVersion":"0.4.0', "1.0.0"),
        (b'{"cniVersion":"0.4.0"', "0.4.0"),
        (b'{"cniVersion" : "0.4.0", "na', "0.4.0"),
        (b'\n\t{ "a\xff": 1, "cniVersion"\n:\n"0.4.0"}', "0.4.0"),
        (b'{"prevResult":{"cniVersion":"0.3.0"},"cniVersion":"0.4.0"}', "0.4.0"),
        (b'{"cniVersion":"0.4.0","prevResult":{"cniVersion":"0.3.0"}}', "0.4.0"),
        (b'{"prevResult":{"cniVersion":"0.3.0"}}', "1.0.0"),
        (b'{"a":[{"cniVersion":"0.3.0"}],"cniVersion":"0.4.0"}', "0.4.0"),
        (b'{"a":"}{\\"cniVersion\\":\\"0.3.0\\"","cniVersion":"0.4.0"}', "0.4.0"),
        (b'{"a":"\\"","cniVersion":"0.4.0"}', "0.4.0"),
        (b'{"a\\"":"b","cniVersion":"0.4.0"}', "0.4.0"),
        (b'{"a\\\\":"\\\\","cniVersion":"0.4.0"}', "0.4.0"),
        (b'{"name":"cniVersion","x":"0.3.0","cniVersion":"0.4.0"}', "0.4.0"),
        (b'{"cniVersion":"0.3.0","cniVersion":"0.4.0"}', "0.4.0"),
        (b'{"cniVersion":{"a":"0.3.0"}}', "1.0.0"),
        (b'[{"cniVersion":"0.3.0"}]', "1.0.0"),
        (b'{} {"cniVersion":"0.3.0"}', "1.0.0"),
        (b'"cniVersion":"0.3.0"', "1.0.0"),
        (b'{"cniVersion":"0.4.0\\u0000"}', "1.0.0"),
    ],
)
def test_the_version_is_found_in_any_text(cni: Installation, stdin: bytes, version: str) -> None:
    cni.call("STATUS", stdin).error(50, version)


keys = st.sampled_from(["cniVersion", "name", "prevResult", 'a"b', "\\", "{", "ü"])
scalars = (
    st.sampled_from([*VERSIONS, "cniVersion", '"cniVersion":"0.3.0"', "}", "]", "\\", '"']) | st.none() | st.integers()
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=st.dictionaries(keys, values, max_size=4), compact=st.booleans(), ascii_only=st.booleans())
def test_the_version_is_what_a_parser_finds(
    cni: Installation, document: dict[str, Any], compact: bool, ascii_only: bool
) -> None:
    text = json.dumps(document, separators=(",", ":") if compact else None, ensure_ascii=ascii_only)
    wanted = document.get("cniVersion")
    cni.call("STATUS", text.encode()).error(50, wanted if wanted in VERSIONS else "1.0.0")


@pytest.mark.parametrize("text", ["", "/one\n", "relative\n/two\n", "/one\nrelative\n", "/" + "x" * 5000 + "\n/y\n"])
def test_malformed_installed_paths_are_named(cni: Installation, text: str) -> None:
    cni.settle(text)
    error = cni.call("ADD").error(5)
    assert ".spiderpool.paths" in error["details"]


def test_a_socket_path_that_the_kernel_cannot_take(cni: Installation) -> None:
    cni.settle("/" + "x" * 200 + f"\n{cni.queue}\n")
    assert "too long" in cni.call("ADD").error(11)["details"]
    cni.call("DEL").empty()
    assert len(cni.queued()) == 1


def test_the_environment_cannot_redirect_a_call(cni: Installation) -> None:
    cni.call("DEL", SPIDERPOOL_SOCKET="/tmp/x", SPIDERPOOL_QUEUE="/tmp/y", SPIDERPOOL_PLUGIN="z").empty()
    env, _ = variables(cni.queued()[0].read_bytes())
    assert env["SPIDERPOOL_PLUGIN"] == "spiderpool"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_descriptors_do_no_harm(cni: Installation, closed: str) -> None:
    result = subprocess.run(
        ["sh", "-c", f'exec "$0" {closed}', cni.bin / "spiderpool"],
        env=cni.environment("DEL", netns="/proc/self/ns/net"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, b"")
    assert len(cni.queued()) == 1


def test_a_reader_that_is_gone_kills_nothing(cni: Installation) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        result = subprocess.run(
            [cni.bin / "spiderpool"], env=cni.environment("STATUS"), input=b"{}", stdout=write, check=False
        )
    finally:
        os.close(write)
    assert result.returncode == 1


def test_a_fifo_as_netns_is_not_waited_for(cni: Installation) -> None:
    fifo = cni.root / "fifo"
    os.mkfifo(fifo)
    started = time.monotonic()
    cni.call("DEL", netns=str(fifo)).empty()
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_cross_builds_are_static_executables(architecture: str) -> None:
    subprocess.run([ROOT / "plugins/shim/build.sh", architecture], check=True)
    folder = ROOT / f"build/cni-{architecture}"
    head = (folder / "spiderpool").read_bytes()
    assert head[:4] == b"\x7fELF"
    assert int.from_bytes(head[18:20], "little") == {"amd64": 62, "arm64": 183}[architecture]
    assert b"/lib/ld-" not in head
    assert len({(folder / name).stat().st_ino for name in NAMES}) == 1
