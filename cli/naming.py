"""How a user names kinds and objects, and what he is told when there is no such thing."""

from __future__ import annotations

import difflib

from api import kinds
from api.meta import Resource


class CliError(Exception):
    """What went wrong, for the user: one line per problem."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def find_kind(text: str) -> type[Resource]:
    """The kind with this kind, plural, singular or short name, with or without its group. Raises CliError."""
    found = _NAMES.get(text.lower())
    if found is not None:
        return found
    close = difflib.get_close_matches(text.lower(), _NAMES, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise CliError(f'unknown kind "{text}"{hint}; kinds are: {KIND_LIST}')


def identifier(kind: type[Resource], name: str) -> str:
    """`spiderippool.spiderpool.spidernet.io/web-v4`, as kubectl prints it."""
    group = f".{kind.TYPE.group}" if kind.TYPE.group else ""
    return f"{kind.TYPE.kind.lower()}{group}/{name}"


def _names() -> dict[str, type[Resource]]:
    names = {}
    for kind in kinds.ALL:
        called = kind.TYPE
        for name in (called.kind.lower(), called.plural):
            names[name] = names[f"{name}.{called.group}"] = kind
        if called.short:
            names[called.short] = kind
    return names


_NAMES = _names()

KIND_LIST = ", ".join(f"{k.TYPE.plural} ({k.TYPE.short})" if k.TYPE.short else k.TYPE.plural for k in kinds.ALL)
"""All kinds for a help text."""
