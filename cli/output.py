"""Resources as tables, YAML, JSON or names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

import yaml

from api.columns import COLUMNS, Column, select
from api.meta import Resource, encode, now
from api.schema import conform, schema_of
from cli.naming import identifier

FORMATS = ("wide", "yaml", "json", "name")

_NOTHING = "<none>"

_AGES = (  # seconds from which on, larger unit, seconds in it, smaller unit, seconds in it; smaller is left out if None
    (8 * 31_536_000, "y", 31_536_000, None, 1),
    (2 * 31_536_000, "y", 31_536_000, "d", 86_400),
    (8 * 86_400, "d", 86_400, None, 1),
    (2 * 86_400, "d", 86_400, "h", 3600),
    (8 * 3600, "h", 3600, None, 1),
    (3 * 3600, "h", 3600, "m", 60),
    (600, "m", 60, None, 1),
    (120, "m", 60, "s", 1),
)
"""kubectl's ages (k8s.io/apimachinery/pkg/util/duration, HumanDuration): two digits or so of what matters."""


def render(kind: type[Resource], resources: Sequence[Resource], form: str, *, single: bool, namespaces: bool) -> str:
    """The text of `resources` in one of FORMATS, or as a table.

    `single`: the user named one object, which is then not wrapped in a List. `namespaces`: the table has them.
    """
    documents = [_document(resource) for resource in resources]
    if form == "name":
        return "".join(f"{identifier(kind, resource.metadata.name)}\n" for resource in resources)
    if form in {"json", "yaml"}:
        whole = documents[0] if single else {"apiVersion": "v1", "kind": "List", "items": documents}
        if form == "json":
            return json.dumps(whole, indent=4, ensure_ascii=False) + "\n"
        return as_yaml(whole)
    columns = [column for column in COLUMNS[kind.TYPE.kind] if form == "wide" or not column.priority]
    head = ["NAMESPACE"] * namespaces + ["NAME", *(column.name for column in columns)]
    return table(head, [_row(document, columns, namespaces=namespaces) for document in documents])


def as_yaml(value: object) -> str:
    """YAML that `api.yamltext` and kubectl read as `value` again."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=200)


_BREAKS = frozenset("\x85\u2028\u2029")


class _Dumper(yaml.SafeDumper):
    """Quotes every text that looks like a number, and escapes the rarer line breaks.

    PyYAML leaves `1e5` and `0o7` bare, since its own reader wants a point in a float; Kubernetes' tools read numbers.
    Between single quotes it writes U+0085 and its like as they are, which readers fold into a blank.
    """


def _scalar(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if _BREAKS.intersection(text) else "'" if _numeric(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _scalar)


def _numeric(text: str) -> bool:
    for read in (float, lambda digits: int(digits, 0)):
        with suppress(ValueError):
            read(text)
            return True
    return False


def _document(resource: Resource) -> dict[str, Any]:
    """The object as an API server shows it: with the defaults that storing leaves out."""
    written = json.loads(encode(resource))
    shown = conform(written, schema_of(type(resource)), "", [])
    return {"apiVersion": written["apiVersion"], "kind": written["kind"], **shown}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, three blanks between them."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def age(seconds: float) -> str:
    """A duration as kubectl prints it: `75s`, `5m30s`, `3h`, `9d`."""
    whole = max(int(seconds), 0)
    for start, large, large_seconds, small, small_seconds in _AGES:
        if whole >= start:
            rest = whole % large_seconds // small_seconds if small else 0
            return f"{whole // large_seconds}{large}" + (f"{rest}{small}" if rest else "")
    return f"{whole}s"


def _row(document: dict[str, Any], columns: Sequence[Column], *, namespaces: bool) -> list[str]:
    metadata = document["metadata"]
    start = [metadata.get("namespace", "")] if namespaces else []
    return [*start, metadata["name"], *(_cell(document, column) for column in columns)]


def _cell(document: dict[str, Any], column: Column) -> str:
    values = select(document, column.json_path)
    if column.type == "date":
        return age((now() - datetime.fromisoformat(values[0])).total_seconds()) if values else "<unknown>"
    return ",".join(map(_text, values)) or _NOTHING


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
