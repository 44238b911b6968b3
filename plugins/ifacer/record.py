"""Which attachments use which master: one small file for each, so that a restart of the agent forgets none.

The folder lies in memory on most nodes: what it tells of, links, does not survive the node either.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import msgspec


class Use(msgspec.Struct, frozen=True):
    """One attachment."""

    container: str
    ifname: str
    network: str
    """Name of the network's configuration."""
    links: tuple[str, ...]
    """Names of the masters that were made for it, or found."""


@dataclass(frozen=True, slots=True)
class Record:
    """A folder. Its methods raise OSError."""

    folder: str

    def add(self, use: Use) -> bool:
        """Remember, durable for as long as the node runs; whether it was not known before."""
        path = self._path(use.container, use.ifname)
        data = msgspec.json.encode(use)
        with suppress(FileNotFoundError), open(path, "rb") as file:
            if file.read() == data:
                return False
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        with open(f"{path}.new", "wb") as file:
            file.write(data)
        os.replace(f"{path}.new", path)
        return True

    def remove(self, container: str, ifname: str) -> None:
        """Forget one attachment; not knowing it is fine."""
        with suppress(FileNotFoundError):
            os.unlink(self._path(container, ifname))

    def prune(self, network: str, valid: Collection[tuple[str, str]]) -> None:
        """Forget the attachments of `network` that are not in `valid` (container id, ifname)."""
        for use in self._all():
            if use.network == network and (use.container, use.ifname) not in valid:
                self.remove(use.container, use.ifname)

    def used(self) -> frozenset[str]:
        """Names of the links in use."""
        return frozenset(_names(self._all()))

    def _path(self, container: str, ifname: str) -> str:
        # The kernel allows names that no file may have, and both together may be too long for one.
        return f"{self.folder}/{hashlib.sha256(f'{container}/{ifname}'.encode()).hexdigest()[:40]}.json"

    def _all(self) -> Iterator[Use]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return
        for name in names:
            if not name.endswith(".json"):
                continue
            with suppress(FileNotFoundError), open(f"{self.folder}/{name}", "rb") as file:
                try:
                    yield msgspec.json.decode(file.read(), type=Use)
                except msgspec.DecodeError as error:
                    raise OSError(0, f"not a record of ours: {error}", f"{self.folder}/{name}") from None


def _names(uses: Iterable[Use]) -> Iterator[str]:
    for use in uses:
        yield from use.links
