"""Holders that are to be looked at, and from when on. In memory: a scan finds them all again."""

from __future__ import annotations


class Suspects:
    """Each holder waits at most once. Times are of the event loop's clock."""

    def __init__(self) -> None:
        self._due: dict[str, dict[str, float]] = {}
        """Namespace to holder to when it is due."""

    def add(self, namespace: str, holder: str, due: float) -> None:
        """Look at the holder at `due`, or sooner if it is to be looked at sooner anyway."""
        there = self._due.setdefault(namespace, {})
        there[holder] = min(due, there.get(holder, due))

    def take(self, namespace: str, moment: float, most: int) -> list[str]:
        """Take out the holders that are due, up to `most`."""
        there = self._due.get(namespace, {})
        found: list[str] = []
        for holder, due in there.items():
            if due <= moment:
                found.append(holder)
                if len(found) == most:
                    break
        for holder in found:
            del there[holder]
        if not there:
            self._due.pop(namespace, None)
        return found

    def next_due(self, namespace: str) -> float | None:
        """When the first of the namespace is due; None if none waits."""
        return min(self._due.get(namespace, {}).values(), default=None)

    def __len__(self) -> int:
        return sum(len(there) for there in self._due.values())
