"""All settings of the agent: one frozen dataclass for each room, and the four places where a value may come from.

A setting `ipam.conflict_moves` is written `ipam: {conflict_moves: 3}` in the file, SPIDERPOOL_IPAM_CONFLICT_MOVES in
the environment and --ipam-conflict-moves as a flag. A flag wins over the environment, that over the file, that over
the default. `docs/settings.md` is generated from the docstrings here and in the rooms:

    python -m agent.settings --markdown     print the page
    python -m agent.settings --check        compare it with docs/settings.md
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import os
import socket
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from agent.dataplane.settings import DataplaneSettings
from plugins.coordinator.probe.settings import ProbeSettings
from plugins.ipam.settings import IpamSettings

Value = str | int | float | bool | tuple[str, ...]
_PREFIX = "SPIDERPOOL_"
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class SettingsError(Exception):
    """A setting cannot be used; the message names where it was found and what is allowed."""


def _at_least(limit: float, **values: float) -> None:
    for name, value in values.items():
        if not value >= limit:
            raise ValueError(f"{name} is {value}; it must be at least {limit}")


@dataclass(frozen=True)
class NodeSettings:
    """Which node this is."""

    name: str = ""
    """Name of the node, written into claims and endpoints; in a cluster the Kubernetes node name. Empty: the host
    name."""

    def resolve(self) -> str:
        """The name to use."""
        return self.name or socket.gethostname()


@dataclass(frozen=True)
class LogSettings:
    """Logs go to standard error, one JSON object a line."""

    level: str = "info"
    """Least important messages to write: debug, info, warning or error."""

    def __post_init__(self) -> None:
        if self.level.lower() not in ("debug", "info", "warning", "error"):
            raise ValueError(f"level is {self.level!r}; it must be debug, info, warning or error")


@dataclass(frozen=True)
class ServerSettings:
    """The Unix socket that the CNI executables call. Times are in seconds."""

    socket: str = "/var/run/spidernet/cni.sock"
    """Path of the socket; the executables have it from `.spiderpool.paths` beside them, or this default built in."""
    concurrency: int = 64
    """How many calls execute at the same time. More only compete for the kernel's RTNL lock."""
    waiting: int = 512
    """How many calls may wait for a free place; further ones are told at once to try again later. About two nodes
    full of pods: a reboot's storm fits, memory stays bounded."""
    read_deadline: float = 5.0
    """How long a caller may take to send its request, which a local process does in a millisecond."""
    add_deadline: float = 60.0
    """How long one ADD may take, waiting included; then it is rolled back. Below the 115 s of the executable and the
    two minutes of common runtimes, so that the caller reads our error and not its own."""
    deadline: float = 30.0
    """The same for DEL, CHECK, STATUS and GC."""
    stop_patience: float = 15.0
    """How long calls that execute may go on when the agent is asked to stop. Half of the 30 s after which Kubernetes
    kills."""

    def __post_init__(self) -> None:
        _at_least(1, concurrency=self.concurrency)
        _at_least(0, waiting=self.waiting, stop_patience=self.stop_patience)
        _at_least(0.01, read_deadline=self.read_deadline, add_deadline=self.add_deadline, deadline=self.deadline)
        if len(os.fsencode(self.socket)) > 100:
            raise ValueError(f"socket is {self.socket!r}; the kernel takes paths of at most 100 bytes")


@dataclass(frozen=True)
class QueueSettings:
    """The directory where the CNI executables leave deletions while there is no agent. Times are in seconds."""

    directory: str = "/var/lib/spidernet/queue"
    """Path of the queue; the executables know it as they know the socket."""
    concurrency: int = 8
    """How many containers' deletions are replayed at the same time."""
    wait: float = 20.0
    """How long an ADD or CHECK waits for the deletions queued before it; then the runtime is asked to try again."""
    attempts: int = 8
    """How often one deletion is tried before it is moved to the folder `failed`. With the pauses between, a minute."""
    backoff: float = 30.0
    """Longest pause between two attempts; the first pause is half a second, each further one twice as long."""
    keep_failed: int = 100
    """How many files the folder `failed` keeps; the oldest go."""

    def __post_init__(self) -> None:
        _at_least(1, concurrency=self.concurrency, attempts=self.attempts, keep_failed=self.keep_failed)
        _at_least(0, wait=self.wait, backoff=self.backoff)


@dataclass(frozen=True)
class StoreSettings:
    """The embedded store."""

    path: str = "/var/lib/spidernet/store.db"
    """SQLite file with pools, claims, services and endpoints; made if it is missing."""


@dataclass(frozen=True)
class HealthSettings:
    """The HTTP servers for health checks and metrics. Addresses are the local machine's unless set otherwise: nothing
    listens to the network that was not asked to."""

    host: str = "127.0.0.1"
    """Address for /v1/runtime/startup, /v1/runtime/readiness and /v1/runtime/liveness; empty: all addresses."""
    port: int = 5710
    """Its TCP port; 0: no health server."""
    metrics_host: str = "127.0.0.1"
    """Address for /metrics; empty: all addresses, for a Prometheus elsewhere."""
    metrics_port: int = 5711
    """Its TCP port; 0: no metrics server."""

    def __post_init__(self) -> None:
        for name, port in (("port", self.port), ("metrics_port", self.metrics_port)):
            if not 0 <= port <= 65535:
                raise ValueError(f"{name} is {port}; it must be between 0 and 65535")


@dataclass(frozen=True)
class Settings:
    """Everything, by room."""

    node: NodeSettings = field(default_factory=NodeSettings)
    log: LogSettings = field(default_factory=LogSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    queue: QueueSettings = field(default_factory=QueueSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    health: HealthSettings = field(default_factory=HealthSettings)
    ipam: IpamSettings = field(default_factory=IpamSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    dataplane: DataplaneSettings = field(default_factory=DataplaneSettings)


@dataclass(frozen=True, slots=True)
class Key:
    """One setting and how it is called in each source."""

    room: str
    name: str
    type: Any
    default: Value

    @property
    def path(self) -> str:
        """Name in the file and in messages."""
        return f"{self.room}.{self.name}"

    @property
    def variable(self) -> str:
        """Name in the environment."""
        return f"{_PREFIX}{self.room}_{self.name}".upper()

    @property
    def flag(self) -> str:
        """Name on the command line."""
        return f"--{self.room}-{self.name}".replace("_", "-")


def rooms() -> dict[str, type[Any]]:
    """The dataclass of each room, in order."""
    hints = get_type_hints(Settings)
    return {room.name: hints[room.name] for room in dataclasses.fields(Settings)}


def keys() -> Iterator[Key]:
    """All settings."""
    for room, kind in rooms().items():
        hints = get_type_hints(kind)
        defaults = kind()
        for item in dataclasses.fields(kind):
            yield Key(room, item.name, hints[item.name], getattr(defaults, item.name))


def parse_text(kind: Any, text: str) -> Value:
    """The value of type `kind` that is written as `text`; tuples are separated by commas. Raises ValueError."""
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        raise ValueError(f"{text!r} is neither true nor false")
    if kind is int or kind is float:
        try:
            return int(text) if kind is int else float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_yaml(kind: Any, value: object) -> Value:
    """The same for a value that YAML has typed already. Raises ValueError."""
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str | int | bool) and type(value) is kind:
        return value
    if kind == tuple[str, ...] and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    wanted = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    raise ValueError(f"{value!r} is not {wanted.get(kind, 'a list of strings')}")


def read_file(path: str) -> dict[str, Value]:
    """Settings of a YAML file, by path. Raises SettingsError."""
    import yaml  # noqa: PLC0415 (only who has a file pays for the parser)

    try:
        with open(path, "rb") as file:
            document = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {error}") from None
    known = {key.path: key for key in keys()}
    result: dict[str, Value] = {}
    for name, value in _flatten(path, document):
        if name not in known:
            raise SettingsError(f"{path}: {name} is not a setting{_closest(name, known)}")
        try:
            result[name] = parse_yaml(known[name].type, value)
        except ValueError as error:
            raise SettingsError(f"{path}: {name}: {error}") from None
    return result


def _flatten(path: str, document: object) -> Iterator[tuple[str, object]]:
    if not isinstance(document, dict):
        raise SettingsError(f"{path}: the document is not a mapping of rooms")
    for room, members in document.items():
        if room not in rooms():
            raise SettingsError(f"{path}: {room} is not a room{_closest(str(room), rooms())}")
        if not isinstance(members, dict):
            raise SettingsError(f"{path}: {room} is not a mapping of settings")
        for name, value in members.items():
            yield f"{room}.{name}", value


def _closest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(known)}"


def _collect(keys_by_source: Sequence[tuple[str, Key, str]]) -> dict[str, Value]:
    """Parse (source's name for it, key, text) triples. Raises SettingsError."""
    result: dict[str, Value] = {}
    for source, key, text in keys_by_source:
        try:
            result[key.path] = parse_text(key.type, text)
        except ValueError as error:
            raise SettingsError(f"{source}: {error}") from None
    return result


def compose(values: Mapping[str, Value]) -> Settings:
    """Settings with `values` (by path) in place of defaults. Raises SettingsError."""
    built: dict[str, Any] = {}
    for room, kind in rooms().items():
        own = {path.partition(".")[2]: value for path, value in values.items() if path.startswith(f"{room}.")}
        try:
            built[room] = kind(**own)
        except ValueError as error:
            raise SettingsError(f"{room}: {error}") from None
    return Settings(**built)


def build_parser(documented: bool) -> argparse.ArgumentParser:
    """The command line. The docstrings cost a parse of the sources, so they are there only for `--help`."""
    parser = argparse.ArgumentParser("spiderpool-agent", allow_abbrev=False, description="Spiderpool's node daemon.")
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings; also SPIDERPOOL_CONFIG")
    parser.add_argument("--print-settings", action="store_true", help="print all settings as YAML and exit")
    texts = {room: docstrings(kind) if documented else {} for room, kind in rooms().items()}
    for key in keys():
        text = texts[key.room].get(key.name, "").replace("%", "%%")
        options: dict[str, Any] = {"nargs": "?", "const": "true"} if key.type is bool else {}
        parser.add_argument(key.flag, dest=key.path, metavar=_type_name(key.type).upper(), help=text, **options)
    return parser


def load(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Settings, bool]:
    """Settings out of all sources, and whether they are only to be printed. Raises SettingsError, SystemExit."""
    arguments = vars(build_parser(documented="--help" in argv or "-h" in argv).parse_args(argv))
    file = arguments["config"] or environ.get(f"{_PREFIX}CONFIG", "")
    values = read_file(file) if file else {}
    everything = list(keys())
    values |= _collect([(k.variable, k, environ[k.variable]) for k in everything if k.variable in environ])
    values |= _collect([(k.flag, k, arguments[k.path]) for k in everything if arguments[k.path] is not None])
    return compose(values), bool(arguments["print_settings"])


def to_yaml(settings: Settings) -> str:
    """`settings` as a file that `--config` takes."""
    import yaml  # noqa: PLC0415 (as in read_file)

    tree = dataclasses.asdict(settings)
    plain = {
        room: {name: list(value) if isinstance(value, tuple) else value for name, value in members.items()}
        for room, members in tree.items()
    }
    return str(yaml.safe_dump(plain, sort_keys=False))


def docstrings(kind: type[Any]) -> dict[str, str]:
    """The docstring below each attribute of a dataclass, in one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)  # noqa: S101 (getsource of a class)
    result: dict[str, str] = {}
    for member, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name) and isinstance(below, ast.Expr):
            text = below.value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                result[member.target.id] = " ".join(text.value.split())
    return result


def _type_name(kind: Any) -> str:
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    return names.get(kind, "list")


def _written(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(value) or "(none)"
    return str(value) if value != "" else "(empty)"


def markdown() -> str:
    """The reference page."""
    lines = [
        "# Settings of the agent",
        "",
        "<!-- Generated: python -m agent.settings --markdown > docs/settings.md -->",
        "",
        "A setting may be given in four places; the first that has it wins: a flag (`--ipam-conflict-moves 3`),",
        "an environment variable (`SPIDERPOOL_IPAM_CONFLICT_MOVES=3`), a YAML file (`--config FILE` or",
        "`SPIDERPOOL_CONFIG`: `ipam: {conflict_moves: 3}`), the default. Lists are separated by commas outside the",
        "file. An unknown key in the file is an error. `spiderpool-agent --print-settings` prints what is in force.",
    ]
    every = list(keys())
    for room, kind in rooms().items():
        texts = docstrings(kind)
        lines += ["", f"## {room}", "", " ".join((inspect.getdoc(kind) or "").split())]
        lines += ["", "| setting | type | default | meaning |", "|---|---|---|---|"]
        for key in every:
            if key.room == room:
                meaning = texts.get(key.name, "").replace("|", "\\|")
                lines.append(f"| `{key.path}` | {_type_name(key.type)} | `{_written(key.default)}` | {meaning} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Print the reference page, or compare it with the one in docs/."""
    if list(argv) == ["--markdown"]:
        sys.stdout.write(markdown())
        return 0
    if list(argv) != ["--check"]:
        sys.stderr.write("usage: python -m agent.settings --markdown | --check\n")
        return 2
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs", "settings.md")
    undocumented = [key.path for key in keys() if not docstrings(rooms()[key.room]).get(key.name)]
    for setting in undocumented:
        sys.stderr.write(f"{setting} has no docstring\n")
    with open(path, encoding="utf-8") as file:
        fresh = file.read() == markdown()
    if not fresh:
        sys.stderr.write(f"{path} is out of date: run make generate\n")
    return 0 if fresh and not undocumented else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
