"""Rules that pools and reserved addresses share: address family, lists of ranges, and how such lists are merged."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from api.meta import Resource
from api.ranges import Family, Interval, IPSet, parse_range
from api.validate.fields import FieldError, forbidden, invalid

BOTH: frozenset[Family] = frozenset({4, 6})


def merged(ranges: list[str] | None, family: Family | None) -> list[str] | None:
    """Sorted, disjoint and maximal ranges of the same addresses.

    A list of one is left as it was typed, and so is one that has a malformed entry: validation will name it.
    """
    if not ranges or len(ranges) == 1 or family is None:
        return ranges
    try:
        return IPSet.parse(ranges, family).to_ranges()
    except ValueError:
        return ranges


class Parsed(NamedTuple):
    """A list of ranges of which some may be malformed."""

    intervals: list[tuple[int, Interval]]
    """The well-formed ones with their index in the list."""
    errors: list[FieldError]
    """One for each of the others."""


def parse_list(ranges: Sequence[str] | None, family: Family, path: str) -> Parsed:
    """Parse each of `ranges`, which stand at `path`."""
    intervals: list[tuple[int, Interval]] = []
    errors = []
    for i, text in enumerate(ranges or ()):
        try:
            intervals.append((i, parse_range(text, family)))
        except ValueError as error:
            errors.append(invalid(f"{path}[{i}]", text, str(error)))
    return Parsed(intervals, errors)


def net(ips: Parsed, excluded: Parsed, family: Family) -> IPSet:
    """The addresses of the well-formed ranges."""
    return IPSet(family, (part for _, part in ips.intervals)) - IPSet(family, (part for _, part in excluded.intervals))


def lenient_net(ips: Iterable[str] | None, excluded: Iterable[str] | None, family: Family) -> IPSet:
    """The addresses of an object that nobody checked: what is malformed counts as absent."""
    return net(parse_list(list(ips or ()), family, ""), parse_list(list(excluded or ()), family, ""), family)


def version_errors(version: Family | None, source: str, families: Collection[Family]) -> Iterator[FieldError]:
    """`spec.ipVersion`, which defaulting derives from the fields that `source` names."""
    if version is None:
        yield invalid("spec.ipVersion", None, f"is not generated correctly, {source} may be invalid")
    elif version not in families:
        yield forbidden("spec.ipVersion", f"IPv{version} is disabled")


def immutable_errors(path: str, old: object, new: object) -> Iterator[FieldError]:
    """A field that may be set once, by whoever creates the object or by defaulting."""
    if old is not None and old != new:
        yield forbidden(path, f"is not changeable, it was {old}")


def is_terminating(resource: Resource) -> bool:
    """Somebody deleted it, and it waits for its finalizers."""
    return resource.metadata.deletion_timestamp is not None
