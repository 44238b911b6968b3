"""Which test proves which of upstream's end-to-end cases: tests/COVERAGE.md, from markers and results.

    python -m tests.coverage            write the page from the last results
    python -m tests.coverage --check    compare; a case whose tests did not all pass is named

A test says what it proves with `@pytest.mark.upstream("A00004", ...)`. `pytest -p tests.coverage` (pyproject.toml has
it) writes down how each such test ended, in build/upstream-results.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "tests" / "upstream.yaml"
RESULTS = ROOT / "build" / "upstream-results.json"
PAGE = ROOT / "tests" / "COVERAGE.md"

Results = dict[str, dict[str, str]]
"""Case to test to how it ended."""


def cases() -> dict[str, tuple[str, str]]:
    """Id to what the case proves and why it is not proven here (or nothing)."""
    raw: dict[str, str | list[str]] = yaml.safe_load(CASES.read_text())
    return {key: (text, "") if isinstance(text, str) else (text[0], text[1]) for key, text in raw.items()}


class Recorder:
    """The pytest plugin."""

    def __init__(self) -> None:
        self.known = cases()
        self.results: Results = {}
        self.marked: dict[str, list[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Note who proves what; an id that there is not is an error."""
        for item in items:
            ids = [str(name) for mark in item.iter_markers("upstream") for name in mark.args]
            unknown = [name for name in ids if name not in self.known]
            if unknown:
                raise pytest.UsageError(f"{item.nodeid}: no such case in {CASES.name}: {', '.join(unknown)}")
            if ids:
                self.marked[item.nodeid] = ids

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how it ended; a failure in any phase counts."""
        for case in self.marked.get(report.nodeid, ()):
            test = report.nodeid.partition("[")[0]
            known = self.results.setdefault(case, {})
            if report.failed or (report.when == "call" and known.get(test) != "failed"):
                known[test] = report.outcome

    def pytest_sessionfinish(self) -> None:
        """Write it down, beside what other runs found."""
        if not self.results:
            return
        before: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        for case, tests in self.results.items():
            before.setdefault(case, {}).update(tests)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(before, indent=1, sort_keys=True))


def pytest_configure(config: Any) -> None:
    """Register the plugin."""
    config.pluginmanager.register(Recorder(), "upstream-cases")


def page(results: Results) -> str:
    """The page."""
    rows = list(_rows(results))
    proven = sum(1 for row in rows if row[2] == "passed")
    lines = [
        "# Upstream's end-to-end cases",
        "",
        "<!-- Generated: python -m tests.coverage, after make test-all -->",
        "",
        f"{proven} of {len(rows)} cases are proven here by a test that passed.",
        "",
        "| case | proves | here | by |",
        "|---|---|---|---|",
    ]
    lines += [f"| {case} | {text} | {state} | {by} |" for case, text, state, by in rows]
    return "\n".join(lines) + "\n"


def _rows(results: Results) -> Iterator[tuple[str, str, str, str]]:
    for case, (text, why_not) in cases().items():
        tests = results.get(case, {})
        names = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in sorted(tests))
        if tests:
            yield case, text, "passed" if set(tests.values()) == {"passed"} else "FAILED", names
        else:
            yield case, text, "no", why_not or "not tested yet"


def main(argv: list[str]) -> int:
    """Write or check the page; 1 if it is not what the last results say."""
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    fresh = page(results)
    if argv != ["--check"]:
        PAGE.write_text(fresh)
        return 0
    if PAGE.exists() and PAGE.read_text() == fresh:
        return 0
    sys.stderr.write(f"{PAGE} is not what the last results say: run python -m tests.coverage, look at the change\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
