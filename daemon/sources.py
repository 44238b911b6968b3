"""The places where a setting may come from, and the page that describes all of them.

A setting `ipam.conflict_moves` is written `ipam: {conflict_moves: 3}` in the file, SPIDERPOOL_IPAM_CONFLICT_MOVES in
the environment and --ipam-conflict-moves as a flag. A flag wins over the environment, that over the file, that over
the default. Names, types and help all come from the dataclasses: there is nothing to keep in step.

Upstream's names work too, where a field's metadata has them (`daemon.upstream`): its environment variables come after
ours, its `conf.yml` (`--config-path`) comes after our file. So the order is flag, our variable, upstream's variable,
our file, conf.yml, default. An unknown key of conf.yml is a warning and no error: upstream's next release may have it.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import logging
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_type_hints

from daemon.logs import configure
from daemon.upstream import COMMAND, CONF_KEYS, CONF_PATH, NOTHING, Upstream, flatten, names_of, product, trusted

S = TypeVar("S")
Value = str | int | float | bool | tuple[str, ...]
_PREFIX = "SPIDERPOOL_"
_TRUE, _FALSE = ("true", "yes", "on", "1", "t"), ("false", "no", "off", "0", "f")
_log = logging.getLogger(__name__)


class SettingsError(Exception):
    """A setting cannot be used; the message names where it was found and what is allowed."""


@dataclass(frozen=True, slots=True)
class Key:
    """One setting and how it is called in each source."""

    room: str
    name: str
    type: Any
    default: Value
    upstream: Upstream = NOTHING

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


def _closest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(known)}"


def _collect(keys_by_source: Iterable[tuple[str, Key, str]]) -> dict[str, Value]:
    """Parse (source's name for it, key, text) triples. Raises SettingsError."""
    result: dict[str, Value] = {}
    for source, key, text in keys_by_source:
        try:
            result[key.path] = parse_text(key.type, text)
        except ValueError as error:
            raise SettingsError(f"{source}: {error}") from None
    return result


def _from_environment(key: Key, environ: Mapping[str, str]) -> Iterator[tuple[str, Key, str]]:
    """The variable that decides the setting, if one does. Raises SettingsError."""
    if key.variable in environ:
        yield key.variable, key, environ[key.variable].strip()
        return
    for variable in key.upstream.variables:
        text = environ.get(variable, "").strip()
        if text:
            try:
                yield variable, key, key.upstream.translate(text) if key.upstream.translate else text
            except ValueError as error:
                raise SettingsError(f"{variable}: {error}") from None
            return
        if variable in environ and key.upstream.required:
            raise SettingsError(f"{variable}: must not be empty")
    try:
        text = product(key.upstream.factors, environ) or ""
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if text:
        yield " times ".join(name for name, _ in key.upstream.factors), key, text


def to_yaml(settings: Any) -> str:
    """`settings` as a file that `--config` takes."""
    import yaml  # noqa: PLC0415 (as in read_file)

    tree = dataclasses.asdict(settings)
    plain = {
        room: {name: list(value) if isinstance(value, tuple) else value for name, value in members.items()}
        for room, members in tree.items()
    }
    return str(yaml.safe_dump(plain, sort_keys=False))


def _parse_file(path: str) -> object:
    """A YAML document; an empty one is an empty mapping. Raises SettingsError."""
    import yaml  # noqa: PLC0415 (only who has a file pays for the parser)

    try:
        with open(path, "rb") as file:
            return yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {error}") from None


def _early_warning(text: str) -> None:
    """Log before the settings that configure logging are known."""
    if not logging.getLogger().handlers:
        configure("warning")
    _log.warning(text)


def docstrings(kind: type[Any]) -> dict[str, str]:
    """The docstring below each attribute of a dataclass, in one line; inherited ones as well."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)  # noqa: S101 (getsource of a class)
    result: dict[str, str] = {}
    for base in reversed(kind.__bases__):
        result |= docstrings(base) if dataclasses.is_dataclass(base) else {}
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


def _called_upstream(names: Upstream) -> str:
    """Upstream's names, for the reference page."""
    keys = [f"`{name}` in conf.yml" for name in names.keys]
    both = keys + [f"`{name}`" for name in names.variables]
    if names.factors:
        both.append(" times ".join(f"`{name}`" for name, _ in names.factors))
    return f" Upstream: {', '.join(both)}." if both else ""


@dataclass(frozen=True, slots=True)
class Sources(Generic[S]):
    """Where the settings of one program come from."""

    settings: type[S]
    """Dataclass whose fields are the rooms, each a dataclass of settings with defaults."""
    program: str
    """Name of the executable."""
    description: str
    """What it is, for `--help`."""
    module: str
    """Name of the module that, executed, prints or checks the reference page."""
    page: str
    """Name of that page in docs/."""

    def rooms(self) -> dict[str, type[Any]]:
        """The dataclass of each room, in order."""
        hints = get_type_hints(self.settings)
        return {room.name: hints[room.name] for room in dataclasses.fields(self.settings)}  # type: ignore[arg-type]

    def keys(self) -> Iterator[Key]:
        """All settings."""
        for room, kind in self.rooms().items():
            hints = get_type_hints(kind)
            defaults = kind()
            for item in dataclasses.fields(kind):
                names = names_of(item.metadata)
                yield Key(room, item.name, hints[item.name], getattr(defaults, item.name), names)

    def read_file(self, path: str) -> dict[str, Value]:
        """Settings of a YAML file, by path. Raises SettingsError."""
        document = _parse_file(path)
        known = {key.path: key for key in self.keys()}
        result: dict[str, Value] = {}
        for name, value in self._flatten(path, document):
            if name not in known:
                raise SettingsError(f"{path}: {name} is not a setting{_closest(name, known)}")
            try:
                result[name] = parse_yaml(known[name].type, value)
            except ValueError as error:
                raise SettingsError(f"{path}: {name}: {error}") from None
        return result

    def read_conf(self, path: str) -> dict[str, Value]:
        """Settings of upstream's configuration file, by path; what is unknown is logged. Raises SettingsError."""
        document = _parse_file(path)
        if not isinstance(document, dict):
            raise SettingsError(f"{path}: the document is not a mapping of settings")
        there = dict(flatten(document))
        for name in there.keys() - CONF_KEYS:
            _early_warning(f"{path}: {name} is not a key that is known{_closest(name, dict.fromkeys(CONF_KEYS))}")
        result: dict[str, Value] = {}
        for key in self.keys():
            for name in [name for name in key.upstream.keys if name in there][:1]:
                translate = key.upstream.translate
                try:
                    if translate is None:
                        result[key.path] = parse_yaml(key.type, there[name])
                    else:
                        result[key.path] = parse_text(key.type, translate(str(parse_yaml(str, there[name]))))
                except ValueError as error:
                    raise SettingsError(f"{path}: {name}: {error}") from None
        return result

    def _flatten(self, path: str, document: object) -> Iterator[tuple[str, object]]:
        if not isinstance(document, dict):
            raise SettingsError(f"{path}: the document is not a mapping of rooms")
        for room, members in document.items():
            if room not in self.rooms():
                raise SettingsError(f"{path}: {room} is not a room{_closest(str(room), self.rooms())}")
            if not isinstance(members, dict):
                raise SettingsError(f"{path}: {room} is not a mapping of settings")
            for name, value in members.items():
                yield f"{room}.{name}", value

    def compose(self, values: Mapping[str, Value]) -> S:
        """Settings with `values` (by path) in place of defaults. Raises SettingsError."""
        built: dict[str, Any] = {}
        for room, kind in self.rooms().items():
            own = {path.partition(".")[2]: value for path, value in values.items() if path.startswith(f"{room}.")}
            try:
                built[room] = kind(**own)
            except ValueError as error:
                raise SettingsError(f"{room}: {error}") from None
        try:
            return self.settings(**built)
        except ValueError as error:  # two rooms do not go together
            raise SettingsError(str(error)) from None

    def build_parser(self, documented: bool) -> argparse.ArgumentParser:
        """The command line. The docstrings cost a parse of the sources, so they are there only for `--help`."""
        parser = argparse.ArgumentParser(self.program, allow_abbrev=False, description=self.description)
        parser.add_argument("--config", metavar="FILE", help="YAML file with settings; also SPIDERPOOL_CONFIG")
        parser.add_argument(
            "--config-path", metavar="FILE", help=f"upstream's conf.yml; after `{COMMAND}`: {CONF_PATH}"
        )
        parser.add_argument("--print-settings", action="store_true", help="print all settings as YAML and exit")
        texts = {room: docstrings(kind) if documented else {} for room, kind in self.rooms().items()}
        for key in self.keys():
            text = texts[key.room].get(key.name, "").replace("%", "%%")
            options: dict[str, Any] = {"nargs": "?", "const": "true"} if key.type is bool else {}
            parser.add_argument(key.flag, dest=key.path, metavar=_type_name(key.type).upper(), help=text, **options)
        return parser

    def load(self, argv: Sequence[str], environ: Mapping[str, str]) -> tuple[S, bool]:
        """Settings out of all sources, and whether they are only to be printed. Raises SettingsError, SystemExit."""
        as_upstream = list(argv[:1]) == [COMMAND]
        argv = argv[1:] if as_upstream else argv
        arguments = vars(self.build_parser(documented="--help" in argv or "-h" in argv).parse_args(argv))
        conf = arguments["config_path"]
        if conf is None and as_upstream and os.path.exists(CONF_PATH):
            if not trusted(CONF_PATH):
                raise SettingsError(f"{CONF_PATH}: it, or a folder above it, is not root's; name it with --config-path")
            conf = CONF_PATH
        values = self.read_conf(conf) if conf else {}
        file = arguments["config"] or environ.get(f"{_PREFIX}CONFIG", "")
        values |= self.read_file(file) if file else {}
        everything = list(self.keys())
        values |= _collect(found for key in everything for found in _from_environment(key, environ))
        values |= _collect([(k.flag, k, arguments[k.path]) for k in everything if arguments[k.path] is not None])
        return self.compose(values), bool(arguments["print_settings"])

    def markdown(self) -> str:
        """The reference page."""
        lines = [
            f"# Settings of {self.program}",
            "",
            f"<!-- Generated: python -m {self.module} --markdown > docs/{self.page} -->",
            "",
            "A setting may be given in four places; the first that has it wins: a flag (`--ipam-conflict-moves 3`",
            "for `ipam.conflict_moves`), an environment variable (`SPIDERPOOL_IPAM_CONFLICT_MOVES=3`), a YAML file",
            "(`--config FILE` or `SPIDERPOOL_CONFIG`: `ipam: {conflict_moves: 3}`), the default. Lists are separated",
            "by commas outside the file. An unknown key in the file is an error.",
            f"`{self.program} --print-settings` prints what is in force.",
            "",
            "Upstream's names are honoured where one is given below: its variable comes after ours and before the",
            "file, its `conf.yml` after the file. That is the file of `--config-path`, and after the word `daemon`,",
            f"with which upstream's command line begins, `{CONF_PATH}` if it is there.",
            "An unknown key of it is a warning. Where a key is absent the default below counts, also where",
            "upstream's program has another one than its chart. What is accepted without effect:",
            "[upgrade](upgrade.md).",
        ]
        every = list(self.keys())
        for room, kind in self.rooms().items():
            texts = docstrings(kind)
            lines += ["", f"## {room}", "", " ".join((inspect.getdoc(kind) or "").split())]
            lines += ["", "| setting | type | default | meaning |", "|---|---|---|---|"]
            for key in every:
                if key.room == room:
                    meaning = texts.get(key.name, "").replace("|", "\\|") + _called_upstream(key.upstream)
                    lines.append(f"| `{key.path}` | {_type_name(key.type)} | `{_written(key.default)}` | {meaning} |")
        return "\n".join(lines) + "\n"

    def main(self, argv: Sequence[str]) -> int:
        """Print the reference page, or compare it with the one in docs/."""
        if list(argv) == ["--markdown"]:
            sys.stdout.write(self.markdown())
            return 0
        if list(argv) != ["--check"]:
            sys.stderr.write(f"usage: python -m {self.module} --markdown | --check\n")
            return 2
        path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs", self.page)
        undocumented = [key.path for key in self.keys() if not docstrings(self.rooms()[key.room]).get(key.name)]
        for setting in undocumented:
            sys.stderr.write(f"{setting} has no docstring\n")
        with open(path, encoding="utf-8") as file:
            fresh = file.read() == self.markdown()
        if not fresh:
            sys.stderr.write(f"{path} is out of date: run make generate\n")
        return 0 if fresh and not undocumented else 1
