"""Where settings come from, which source wins, and what a mistake looks like."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from agent.settings import EXECUTABLE_DEADLINE, SOURCES, ServerSettings, Settings
from daemon.sources import SettingsError, docstrings, to_yaml


def loaded(*argv: str, **environ: str) -> Settings:
    return SOURCES.load(argv, environ)[0]


def test_defaults() -> None:
    assert loaded() == Settings()
    assert loaded().server.socket == "/var/run/spidernet/cni.sock"
    with pytest.raises(FrozenInstanceError):
        loaded().server.socket = "/x"  # type: ignore[misc]


def test_an_add_is_undone_before_its_executable_gives_up() -> None:
    folder = Path(__file__).parents[2] / "plugins" / "shim"
    (limit,) = {found for file in folder.glob("*.c") for found in re.findall(r"OVERALL_MS (\d+)", file.read_text())}
    assert int(limit) == EXECUTABLE_DEADLINE * 1000
    given = loaded(SPIDERPOOL_SERVER_ADD_DEADLINE="100", SPIDERPOOL_IPAM_ROLLBACK_DEADLINE="15")
    assert given.server.add_deadline + given.ipam.rollback_deadline == EXECUTABLE_DEADLINE


def test_a_flag_wins_over_the_environment_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("server: {concurrency: 2, waiting: 3, deadline: 4}\nnode: {name: f}\n")
    got = loaded(
        f"--config={file}", "--server-concurrency", "8", SPIDERPOOL_SERVER_WAITING="9", SPIDERPOOL_CONFIG="/no"
    )
    assert (got.server.concurrency, got.server.waiting, got.server.deadline) == (8, 9, 4.0)
    assert got.node.name == "f"
    assert loaded(SPIDERPOOL_CONFIG=str(file), SPIDERPOOL_NODE_NAME="e").node.name == "e"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("No", False), ("off", False)])
def test_booleans(text: str, value: bool) -> None:
    assert loaded(SPIDERPOOL_DATAPLANE_ENABLED=text).dataplane.enabled is value
    assert loaded("--dataplane-enabled", text).dataplane.enabled is value


def test_a_boolean_flag_alone_is_true() -> None:
    assert loaded("--dataplane-enabled", SPIDERPOOL_DATAPLANE_ENABLED="no").dataplane.enabled is True


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SPIDERPOOL_SERVER_CONCURRENCY": "abc"}, "SPIDERPOOL_SERVER_CONCURRENCY: 'abc' is not an integer"),
        ({"SPIDERPOOL_SERVER_DEADLINE": "abc"}, "SPIDERPOOL_SERVER_DEADLINE: 'abc' is not a number"),
        ({"SPIDERPOOL_DATAPLANE_ENABLED": "abc"}, "SPIDERPOOL_DATAPLANE_ENABLED: 'abc' is neither true nor false"),
        ({"SPIDERPOOL_SERVER_CONCURRENCY": "0"}, "server: concurrency is 0; it must be at least 1"),
        ({"SPIDERPOOL_SERVER_ADD_DEADLINE": "inf"}, "server: add_deadline is inf; it must be at least 0.01"),
        ({"SPIDERPOOL_IPAM_PARTIAL_GRACE": "0"}, "ipam: partial_grace is 0.0; it must be at least 0.1"),
        (
            {"SPIDERPOOL_IPAM_ADD_DEADLINE": "60"},
            "ipam.add_deadline is 60; it must be less than server.add_deadline, 60",
        ),
        ({"SPIDERPOOL_SERVER_ADD_DEADLINE": "55"}, "ipam.add_deadline is 55; it must be less than server.add_deadline"),
        ({"SPIDERPOOL_SERVER_ADD_DEADLINE": "110"}, "server.add_deadline and ipam.rollback_deadline are 120 together"),
        ({"SPIDERPOOL_COLLECTOR_SWEEP": "nan"}, "collector: sweep is nan; it must be at least 0.01"),
        ({"SPIDERPOOL_COORDINATOR_KERNEL_TIMEOUT": "0"}, "coordinator: kernel_timeout is 0.0; it must be at least"),
        ({"SPIDERPOOL_PROBE_WAIT": "0"}, "probe: wait is 0.0; it must be at least"),
        ({"SPIDERPOOL_SERVER_DEADLINE": "nan"}, "server: deadline is nan"),
        ({"SPIDERPOOL_SERVER_SOCKET": "/" + "x" * 120}, "server: socket is"),
        ({"SPIDERPOOL_HEALTH_PORT": "70000"}, "health: port is 70000"),
        ({"SPIDERPOOL_LOG_LEVEL": "loud"}, "log: level is 'loud'"),
        ({"SPIDERPOOL_CONFIG": "/no/such/file"}, "/no/such/file"),
    ],
)
def test_mistakes_in_the_environment_name_it(environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        loaded(**environ)
    assert str(caught.value).startswith(message)


def test_mistakes_in_flags_name_them() -> None:
    with pytest.raises(SettingsError, match="--server-waiting: 'x' is not an integer"):
        loaded("--server-waiting=x")
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as stderr:
        loaded("--server-wait=3")
    assert "--server-wait" in stderr.getvalue()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server: {concurency: 3}", "server.concurency is not a setting; did you mean server.concurrency"),
        ("sever: {concurrency: 3}", "sever is not a room; did you mean server"),
        ("server: 3", "server is not a mapping"),
        ("- server", "not a mapping of rooms"),
        ("server: {concurrency: '3'}", "server.concurrency: '3' is not an integer"),
        ("server: {concurrency: true}", "server.concurrency: True is not an integer"),
        ("server: {concurrency: 3.5}", "server.concurrency: 3.5 is not an integer"),
        ("server: {deadline: true}", "server.deadline: True is not a number"),
        ("server: {socket: 3}", "server.socket: 3 is not a string"),
        ("dataplane: {enabled: 1}", "dataplane.enabled: 1 is not true or false"),
        ("server: {1: 2}", "server.1 is not a setting"),
        ("server: [", "while parsing"),
    ],
)
def test_mistakes_in_the_file_name_it(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        loaded(f"--config={file}")
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_variables_that_kubernetes_adds_for_services_are_no_settings() -> None:
    assert loaded(SPIDERPOOL_CONTROLLER_SERVICE_HOST="10.0.0.1", SPIDERPOOL_AGENT_PORT="tcp://x:1") == Settings()


def test_printed_settings_can_be_read_back(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    wanted = loaded("--server-deadline=7", "--node-name=n", "--dataplane-enabled=no")
    file.write_text(to_yaml(wanted))
    assert loaded(f"--config={file}") == wanted
    assert SOURCES.load(["--print-settings"], {})[1] is True


def test_every_setting_is_documented_and_named_once() -> None:
    every = list(SOURCES.keys())
    assert len({key.variable for key in every}) == len({key.flag for key in every}) == len(every)
    page = SOURCES.markdown()
    for key in every:
        assert f"| `{key.path}` |" in page
    assert "|  |" not in page
    assert SOURCES.main(["--check"]) == 0


def test_help_tells_what_the_docstrings_tell() -> None:
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stdout(io.StringIO()) as stdout:
        loaded("--help")
    assert caught.value.code == 0
    assert "how many calls execute at the same time" in " ".join(stdout.getvalue().lower().split())
    assert docstrings(ServerSettings)["waiting"].startswith("How many calls may wait")
