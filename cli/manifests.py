"""The objects that the files of `-f` hold."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from api.manifest import parse
from api.meta import Resource
from cli.naming import CliError

_MAX_BYTES = 64 << 20
"""Largest file taken: tens of thousands of services fit, an endless stream does not."""


@dataclass(frozen=True, slots=True)
class Given:
    """One object that the user gave."""

    place: str
    """For messages: `pools.yaml, document 2: SpiderIPPool "web-v4"`."""
    resource: Resource


def load(files: Iterable[str], namespace: str) -> list[Given]:
    """All objects of `files` (`-` is standard input), each named once; those without a namespace get `namespace`.

    Raises CliError with every problem of every file.
    """
    problems: list[str] = []
    objects: list[Given] = []
    for file in files:
        before = len(objects) + len(problems)
        for entry in parse(_read(file)):
            place = f"{'standard input' if file == '-' else file}, {entry.place}"
            problems += [f"{place}: {error}" for error in entry.errors]
            if entry.resource is not None:
                objects.append(Given(place, _placed(entry.resource, namespace)))
        if len(objects) + len(problems) == before:
            problems.append(f"no objects in {'standard input' if file == '-' else file}")
    problems += _repeated(objects)
    if problems:
        raise CliError(*problems)
    return objects


def _read(file: str) -> bytes:
    try:
        if file == "-":
            data = sys.stdin.buffer.read(_MAX_BYTES + 1)
        else:
            with open(file, "rb") as stream:
                data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CliError(f"cannot read {file}: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise CliError(f"{file} is larger than {_MAX_BYTES >> 20} MiB")
    return data


def _placed(resource: Resource, namespace: str) -> Resource:
    """A cluster-scoped object loses a namespace that it was given by mistake, as the API server has it."""
    metadata = resource.metadata
    wanted = (metadata.namespace or namespace) if resource.TYPE.namespaced else ""
    return replace(resource, metadata=replace(metadata, namespace=wanted))


def _repeated(objects: Iterable[Given]) -> Iterator[str]:
    seen: dict[tuple[str, str, str], str] = {}
    for given in objects:
        metadata = given.resource.metadata
        key = (given.resource.TYPE.kind, metadata.namespace, metadata.name)
        if metadata.name and key in seen:
            yield f"{given.place}: the same object as {seen[key]}"
        seen.setdefault(key, given.place)
