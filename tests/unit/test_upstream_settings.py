"""Upstream's conf.yml and environment variables as further names of our settings."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent.settings import SOURCES as AGENT
from controller.settings import SOURCES as CONTROLLER
from daemon import sources
from daemon.sources import SettingsError, Sources
from daemon.upstream import CONF_KEYS, WITHOUT_EFFECT, flatten, seconds, trusted, upstream


@dataclass(frozen=True)
class Room:
    """A room."""

    number: int = field(
        default=7,
        metadata=upstream(
            key=("clusterSubnetAutoPoolDefaultRedundantIPNumber", "clusterSubnetDefaultFlexibleIPNumber"),
            variable="SPIDERPOOL_THEIRS",
            required=True,
        ),
    )
    """A number."""
    timeout: float = field(
        default=50.0, metadata=upstream(key="iaasNetworkProvider.httpRequestTimeout", translate=seconds)
    )
    """Seconds."""
    on: bool = field(default=True, metadata=upstream(key="enableIPv4", variable="SPIDERPOOL_ON"))
    """A switch."""
    wait: float = field(default=1.0, metadata=upstream(factors=(("SPIDERPOOL_PAUSE", 2), ("SPIDERPOOL_TRIES", 25))))
    """Seconds."""
    names: tuple[str, ...] = field(default=(), metadata=upstream(key="podResourceInject.namespacesExclude"))
    """Names."""


@dataclass(frozen=True)
class Rooms:
    """Everything."""

    room: Room = field(default_factory=Room)


SOURCES = Sources(Rooms, "x", "X.", "x", "x.md")


def loaded(*argv: str, **environ: str) -> Room:
    return SOURCES.load(argv, environ)[0].room


def conf(tmp_path: Path, text: str) -> str:
    path = tmp_path / "conf.yml"
    path.write_text(text)
    return f"--config-path={path}"


def test_order_of_the_sources(tmp_path: Path) -> None:
    theirs = conf(tmp_path, "clusterSubnetDefaultFlexibleIPNumber: 1\n")
    ours = tmp_path / "ours.yaml"
    ours.write_text("room: {number: 2}\n")
    assert loaded().number == 7
    assert loaded(theirs).number == 1
    assert loaded(theirs, f"--config={ours}").number == 2
    environ = {"SPIDERPOOL_THEIRS": " 3 "}
    assert loaded(theirs, f"--config={ours}", **environ).number == 3
    environ["SPIDERPOOL_ROOM_NUMBER"] = " 4 "
    assert loaded(theirs, f"--config={ours}", **environ).number == 4
    assert loaded("daemon", theirs, f"--config={ours}", "--room-number=5", **environ).number == 5


def test_values_of_conf_yml(tmp_path: Path) -> None:
    room = loaded(
        conf(
            tmp_path,
            "enableIPv4: false\niaasNetworkProvider: {serverUrl: '', httpRequestTimeout: 1m30s}\n"
            "podResourceInject: {enabled: false, namespacesExclude: [a, b], namespacesInclude: []}\n"
            "clusterSubnetDefaultFlexibleIPNumber: 9\nclusterSubnetAutoPoolDefaultRedundantIPNumber: 8\n"
            "agent: {networkResourcePlugin: {anything: {deep: 1}}}\nenableIPv6:\n",
        )
    )
    assert room == Room(number=8, timeout=90.0, on=False, names=("a", "b"))
    assert loaded(conf(tmp_path, "")) == Room()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("enableIPv4: 'true'", "enableIPv4: 'true' is not true or false"),
        (
            "clusterSubnetDefaultFlexibleIPNumber: many",
            "clusterSubnetDefaultFlexibleIPNumber: 'many' is not an integer",
        ),
        ("iaasNetworkProvider: {httpRequestTimeout: 5}", "iaasNetworkProvider.httpRequestTimeout: 5 is not a string"),
        ("iaasNetworkProvider: {httpRequestTimeout: 5x}", "httpRequestTimeout: '5x' is not a duration"),
        ("podResourceInject: {namespacesExclude: [1]}", "namespacesExclude: [1] is not a list of strings"),
        ("- a", "is not a mapping"),
        ("a: [", "while parsing"),
    ],
)
def test_mistakes_in_conf_yml(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        loaded(conf(tmp_path, text))
    assert message in str(caught.value)
    assert "conf.yml" in str(caught.value)


def test_a_conf_yml_that_is_named_must_be_there() -> None:
    with pytest.raises(SettingsError, match=r"/no/conf\.yml"):
        loaded("--config-path=/no/conf.yml")


def test_unknown_keys_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert loaded(conf(tmp_path, "enableIPv44: true\nnew: {thing: 1}\nenableIPv4: false\n")).on is False
    texts = sorted(record.getMessage() for record in caplog.records)
    assert len(texts) == 2
    assert "enableIPv44 is not a key that is known; did you mean enableIPv4" in texts[0]
    assert "new.thing" in texts[1]


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SPIDERPOOL_THEIRS": "x"}, "SPIDERPOOL_THEIRS: 'x' is not an integer"),
        ({"SPIDERPOOL_THEIRS": " "}, "SPIDERPOOL_THEIRS: must not be empty"),
        ({"SPIDERPOOL_ON": "maybe"}, "SPIDERPOOL_ON: 'maybe' is neither true nor false"),
    ],
)
def test_mistakes_in_the_environment(environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        loaded(**environ)
    assert str(caught.value) == message


def test_tries_times_the_pause_between_them_is_a_wait() -> None:
    assert loaded().wait == 1.0
    assert loaded(SPIDERPOOL_PAUSE="4").wait == 100.0
    assert loaded(SPIDERPOOL_TRIES=" 3 ").wait == 6.0
    assert loaded(SPIDERPOOL_TRIES="3", SPIDERPOOL_PAUSE="0").wait == 0.0
    assert loaded(SPIDERPOOL_TRIES="3", SPIDERPOOL_ROOM_WAIT="7").wait == 7.0
    with pytest.raises(SettingsError, match=r"^SPIDERPOOL_TRIES: '-1' is not a number of at least 0"):
        loaded(SPIDERPOOL_TRIES="-1")
    assert "Upstream: `SPIDERPOOL_PAUSE` times `SPIDERPOOL_TRIES`." in SOURCES.markdown()
    agent = AGENT.load([], {"SPIDERPOOL_WAIT_SUBNET_POOL_MAX_RETRIES": "10"})[0]
    assert agent.ipam.auto_pool_wait == 20.0


def test_what_has_no_effect_is_told_and_nothing_else_is() -> None:
    keys = [*AGENT.keys(), *CONTROLLER.keys()]
    known = {name for key in keys for name in (key.variable, *key.upstream.variables)}
    assert not known & WITHOUT_EFFECT.keys()
    page = (Path(__file__).parents[2] / "docs" / "upgrade.md").read_text()
    for name, why in WITHOUT_EFFECT.items():
        assert f"| `{name}` | {why} |\n" in page


def test_an_empty_variable_is_none() -> None:
    assert loaded(SPIDERPOOL_ON="").on is True
    assert loaded(SPIDERPOOL_ON="F").on is False


@pytest.mark.parametrize(
    ("text", "value"),
    [("50s", 50), ("1m30s", 90), ("1.5h", 5400), ("100ms", 0.1), ("0", 0), (".5s", 0.5)],
)
def test_durations(text: str, value: float) -> None:
    assert float(seconds(text)) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "5", "-1s", "1s ", "s", "1d", "1s2"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        seconds(text)


def test_upstreams_command_line_brings_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "conf.yml"
    monkeypatch.setattr(sources, "CONF_PATH", str(path))
    assert loaded("daemon").on is True
    path.write_text("enableIPv4: false\n")
    assert loaded().on is True
    assert loaded("daemon").on is False


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away takes root")
def test_a_file_that_somebody_else_may_have_put_there_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "spiderpool" / "config-map"
    folder.mkdir(parents=True)
    path = folder / "conf.yml"
    path.write_text("enableIPv4: false\n")
    monkeypatch.setattr(sources, "CONF_PATH", str(path))
    assert trusted(str(path))
    for place in (path, folder, folder.parent):
        os.chown(place, 65534, -1)
        with pytest.raises(SettingsError, match="not root's"):
            loaded("daemon")
        os.chown(place, 0, -1)
    assert loaded("daemon").on is False


def test_the_reference_page_has_upstreams_names() -> None:
    page = SOURCES.markdown()
    assert "A switch. Upstream: `enableIPv4` in conf.yml, `SPIDERPOOL_ON`." in page


def test_flattening_stops_at_keys_that_are_known() -> None:
    document = {"agent": {"networkResourcePlugin": {"a": 1}, "b": 2}, "c": None}
    assert dict(flatten(document)) == {"agent.networkResourcePlugin": {"a": 1}, "agent.b": 2}
    assert "agent.networkResourcePlugin" in CONF_KEYS
