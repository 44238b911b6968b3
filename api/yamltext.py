"""YAML text to plain values, by the rules that Kubernetes' tools read manifests with.

PyYAML's own loaders would do three things wrong here: they turn times into datetimes and `10:20:30` into a sexagesimal
number, they take the last of two equal keys without a word, and the C one crashes the process on a hundred thousand
opening brackets. So values are built from the parser's events, with a bound on nesting.
Source: YAML 1.1 as sigs.k8s.io/yaml reads it; https://yaml.org/type/
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

_MAX_DEPTH = 64
"""Deepest nesting of lists and mappings; no manifest of ours comes near."""

_MAX_ALIASED = 1_000_000
"""How many values aliases may stand for in one document, so that a few lines cannot grow into gigabytes."""

_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLS = {
    spelling: value
    for value, words in ((True, ("true", "yes", "on")), (False, ("false", "no", "off")))
    for word in words
    for spelling in (word, word.capitalize(), word.upper())
}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,30})|0x[0-9a-fA-F]{1,30}|0o?[0-7]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class YamlError(ValueError):
    """The text is not YAML, or uses what manifests may not; the message names line and column."""


class _Builder:
    """Builds the values of one document."""

    def __init__(self, events: Iterator[Any]) -> None:
        self._events = events
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._count = 0

    def value(self, event: Any, depth: int = 0) -> Any:
        """The value that starts with `event`."""
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if depth > _MAX_DEPTH:
            raise YamlError(f"nested more than {_MAX_DEPTH} levels deep{_at(event)}")
        before = self._count
        self._count += 1
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
                value.append(self.value(item, depth + 1))
        else:
            value = self._mapping(depth)
        if event.anchor:
            self._anchors[event.anchor] = (value, self._count - before)
        return value

    def _mapping(self, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        defaults: dict[str, Any] = {}
        while not isinstance(key := next(self._events), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                raise YamlError(f"a key must be a plain text{_at(key)}")
            value = self.value(next(self._events), depth + 1)
            if key.value == "<<" and key.implicit[0]:
                for part in value if isinstance(value, list) else [value]:
                    if not isinstance(part, dict):
                        raise YamlError(f"only mappings can be merged by '<<'{_at(key)}")
                    defaults = part | defaults
            elif key.value in result:
                raise YamlError(f"key {key.value!r} is there twice{_at(key)}")
            else:
                result[key.value] = value
        return defaults | result

    def _alias(self, event: Any) -> Any:
        if event.anchor not in self._anchors:
            raise YamlError(f"alias {event.anchor!r} names no anchor above it{_at(event)}")
        value, size = self._anchors[event.anchor]
        self._count += size
        if self._count > _MAX_ALIASED:
            raise YamlError(f"aliases stand for more than {_MAX_ALIASED} values{_at(event)}")
        return value


def documents(data: bytes) -> Iterator[Any]:
    """The documents of a YAML stream, empty ones as None, in order. Raises YamlError when it comes to a fault."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlError(f"not UTF-8: byte {error.start} is {data[error.start]:#04x}") from None
    try:
        events = iter(yaml.parse(text, Loader=_Loader))
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                yield _Builder(events).value(next(events))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = error.problem or error.context or "malformed"
        raise YamlError(f"{what}{_position(mark)}") from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from None


def _scalar(event: Any) -> Any:
    text: str = event.value
    if event.tag in {None, "!"}:
        return _plain(text) if event.implicit[0] else text
    if event.tag == "tag:yaml.org,2002:str":
        return text
    if event.tag in {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null")}:
        return _plain(text)
    raise YamlError(f"tag {event.tag!r} is not allowed in a manifest{_at(event)}")


def _plain(text: str) -> Any:
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text):
        digits = text.lstrip("+-")
        if len(digits) > 1 and digits[0] == "0" and digits[1] not in "xo":
            return int(digits, 8)
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _at(event: Any) -> str:
    return _position(event.start_mark)


def _position(mark: Any) -> str:
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
