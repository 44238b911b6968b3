"""The JSON patch (RFC 6902) from one JSON object to another: exactly what changed, lists as a whole."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def difference(old: Json, new: Json, path: str = "") -> list[Json]:
    """Operations that make `old` into `new`; `path` is where both stand."""
    operations: list[Json] = [{"op": "remove", "path": f"{path}/{_escaped(key)}"} for key in old.keys() - new.keys()]
    for key, value in new.items():
        where = f"{path}/{_escaped(key)}"
        if key not in old:
            operations.append({"op": "add", "path": where, "value": value})
        elif isinstance(old[key], dict) and isinstance(value, dict):
            operations += difference(old[key], value, where)
        elif old[key] != value or type(old[key]) is not type(value):
            operations.append({"op": "replace", "path": where, "value": value})
    return operations


def _escaped(key: str) -> str:
    """`key` as a reference token (RFC 6901 section 3)."""
    return key.replace("~", "~0").replace("/", "~1")
