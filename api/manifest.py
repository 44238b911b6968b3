"""Manifests to resources: every document of a YAML or JSON text, and everything that is wrong with them.

A document goes through what an API server does before admission: unknown members and nulls are pruned, schema defaults
applied, the schema checked. Defaulting and validation by kind come after (`api.validate`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from api import kinds
from api.meta import Resource
from api.schema import conform, schema_of
from api.validate.fields import FieldError, invalid, not_supported, required
from api.yamltext import YamlError, documents


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a manifest, well-formed or not."""

    place: str
    """For messages: `document 2: SpiderIPPool "web-v4"`."""
    resource: Resource | None
    """None if there are errors."""
    errors: tuple[FieldError | str, ...] = ()
    """A string where there is no field to speak of, as in a text that is not YAML."""


def parse(data: bytes) -> list[Entry]:
    """All objects of the text in order, members of List kinds included; empty documents are passed over.

    Nothing is raised: a text that stops being YAML half way ends with an entry that says where.
    """
    entries: list[Entry] = []
    number = 0
    try:
        for number, document in enumerate(documents(data), 1):
            if document is not None:
                entries += _entries(f"document {number}", document)
    except YamlError as error:
        entries.append(Entry(f"document {number + 1}", None, (f"not YAML: {error}",)))
    return entries


def _entries(place: str, document: object) -> Iterator[Entry]:
    if not isinstance(document, dict):
        yield Entry(place, None, ("must be a mapping with apiVersion, kind and metadata",))
        return
    head = [
        required(member, "must be a string")
        for member in ("apiVersion", "kind")
        if not isinstance(document.get(member), str) or not document[member]
    ]
    if head:
        yield Entry(f"{place}{_called(document)}", None, tuple(head))
        return
    api_version, kind = document["apiVersion"], document["kind"]
    if (api_version, kind) in _LISTS:
        yield from _list_entries(place, document)
    elif (api_version, kind) in kinds.BY_NAME:
        yield _entry(place + _called(document), kinds.BY_NAME[api_version, kind], document)
    else:
        yield Entry(place + _called(document), None, (_unknown(api_version, kind),))


_LISTS = {("v1", "List"), *((version, f"{kind}List") for version, kind in kinds.BY_NAME)}


def _list_entries(place: str, document: dict[str, Any]) -> Iterator[Entry]:
    """The members of a List; those of a `SpiderIPPoolList` may leave out their apiVersion and kind."""
    items = document.get("items")
    if items is None:
        items = []
    if not isinstance(items, list):
        yield Entry(place, None, (invalid("items", items, "must be a list"),))
        return
    implied = {}
    if document["kind"] != "List":
        implied = {"apiVersion": document["apiVersion"], "kind": document["kind"].removesuffix("List")}
    for i, item in enumerate(items):
        nested = isinstance(item, dict) and str(item.get("kind", "")).endswith("List")
        where = f"{place}, items[{i}]"
        if nested:
            yield Entry(where, None, (invalid("kind", item["kind"], "a List within a List is not allowed"),))
        else:
            yield from _entries(where, implied | item if isinstance(item, dict) else item)


def _entry(place: str, kind: type[Resource], document: dict[str, Any]) -> Entry:
    errors: list[FieldError] = []
    conformed = conform(document, schema_of(kind), "", errors)
    if not errors:
        try:
            return Entry(place, msgspec.convert(conformed, kind))
        except msgspec.ValidationError as error:  # what a structural schema cannot say, as the format of a time
            text, _, path = str(error).partition(" - at `$.")
            errors.append(invalid(path.rstrip("`"), None, text))
    return Entry(place, None, tuple(errors))


def _unknown(api_version: str, kind: str) -> FieldError:
    versions = [version for version, name in kinds.BY_NAME if name == kind]
    if versions:
        return not_supported("apiVersion", api_version, versions)
    return not_supported("kind", kind, [name for _, name in kinds.BY_NAME])


def _called(document: dict[str, Any]) -> str:
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    kind = document.get("kind")
    called = f': {kind if isinstance(kind, str) and kind else "object"} "{name}"' if isinstance(name, str) else ""
    return called or (f": {kind}" if isinstance(kind, str) else "")
