"""Prints what was proven, for people and for machines."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TextIO

GREEN, RED, DIM, BOLD, PLAIN = "\033[32m", "\033[31m", "\033[2m", "\033[1m", "\033[0m"


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was to be proven."""

    name: str
    """For machines; stable."""
    title: str
    ok: bool
    evidence: tuple[str, ...]
    """Lines; what was seen, or what was wrong."""
    seconds: float


class Paper:
    """Where lines go; colour only on a terminal."""

    def __init__(self, file: TextIO = sys.stdout) -> None:
        self._file = file
        self._colour = self.live = file.isatty()
        self._passing = False
        self.width = max(72, min(150, shutil.get_terminal_size((118, 24)).columns if self._colour else 118))

    def paint(self, colour: str, text: str) -> str:
        """`text` in a colour, if there is colour."""
        return f"{colour}{text}{PLAIN}" if self._colour else text

    def line(self, text: str = "") -> None:
        """One line, at once."""
        if self._passing:
            self._file.write("\r\033[K")
            self._passing = False
        print(text, file=self._file, flush=True)

    def passing(self, text: str) -> None:
        """A line about the moment: the next one takes its place on a terminal."""
        if not self.live:
            self.line(text)
            return
        self._file.write(f"\r\033[K{self.paint(DIM, text[: self.width])}")
        self._file.flush()
        self._passing = True

    def mark(self, ok: bool) -> str:
        """A check mark or a cross."""
        return self.paint(GREEN, "✔") if ok else self.paint(RED, "✘")

    def step(self, text: str, seconds: float) -> None:
        """Something that `up` or `down` has done."""
        self.line(f"  {self.mark(True)} {text:<{self.width - 14}} {self.paint(DIM, f'{seconds:6.2f} s')}")

    def heading(self, text: str) -> None:
        """What comes now."""
        self.line(f"\n{self.paint(BOLD, text)}")

    def row(self, row: Row) -> None:
        """A title with its time, and the evidence below."""
        title = self.paint(BOLD if row.ok else RED, row.title)
        padding = " " * max(1, self.width - 15 - len(row.title))
        self.line(f"  {self.mark(row.ok)} {title}{padding}{self.paint(DIM, f'{row.seconds * 1000:7.0f} ms')}")
        for line in row.evidence:
            indent = "      "
            for part in textwrap.wrap(line, self.width - 8, break_long_words=False, subsequent_indent="  ") or [""]:
                self.line(f"{indent}{self.paint(DIM, part) if row.ok else part}")

    def verdict(self, rows: Sequence[Row], seconds: float) -> None:
        """How many of how many."""
        proven = sum(row.ok for row in rows)
        ok = proven == len(rows)
        text = f"{proven} of {len(rows)} proven in {seconds:.1f} s"
        self.line(f"\n  {self.mark(ok)} {self.paint(GREEN if ok else RED, text)}")
        for row in rows:
            if not row.ok:
                self.line(f"      {row.title}: {row.evidence[0] if row.evidence else ''}")


def as_json(rows: Iterable[Row]) -> str:
    """The rows as a JSON object: `ok` for all, and `checks` with name, title, ok, evidence, seconds."""
    listed = list(rows)
    return json.dumps({"ok": all(row.ok for row in listed), "checks": [asdict(row) for row in listed]}, indent=1)
