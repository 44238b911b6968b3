"""Run the benchmarks of one machine (or those named), print a table, write build/bench.json.

    python -m tests.bench [ipam] [coordinator] [probe] [service] [agent] [store]

Each row: name, value and reference (medians, in `unit`), ratio (value / reference; null for an absolute figure),
samples, and whatever else the benchmark tells (p99, confidence bounds).
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

SUITES = ("ipam", "coordinator", "probe", "service", "agent")
WITH_API_SERVER = ("store", "alloc", "reclaim")
"""Run by name only: they need what `make kube` builds."""
OUTPUT = Path("build/bench.json")
FIELDS = ("name", "value", "reference", "ratio", "unit", "samples")


def text(value: Any) -> str:
    """A figure with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    rest = "  ".join(f"{key} {text(value)}" for key, value in row.items() if key not in FIELDS)
    return (
        f"{row['name']:<34}{text(row['value']):>10} {row['unit']:<4}"
        f"{text(row['reference']):>10}{text(row['ratio']):>9}{row['samples']:>8}  {rest}"
    )


def main(names: list[str]) -> int:
    """Run the suites in `names`, or all."""
    unknown = set(names) - {*SUITES, *WITH_API_SERVER}
    if unknown:
        known = ", ".join(SUITES + WITH_API_SERVER)
        print(f"unknown benchmark {', '.join(sorted(unknown))}; there are {known}", file=sys.stderr)
        return 2
    print(f"{'name':<34}{'value':>10} {'':<4}{'reference':>10}{'ratio':>9}{'samples':>8}")
    rows: list[dict[str, Any]] = []
    for name in names or SUITES:
        for row in importlib.import_module(f"tests.bench.bench_{name}").rows():
            rows.append(row)
            print(show(row), flush=True)
    OUTPUT.parent.mkdir(exist_ok=True)
    kept = json.loads(OUTPUT.read_text()) if names and OUTPUT.exists() else []
    measured = {row["name"] for row in rows}
    OUTPUT.write_text(json.dumps([row for row in kept if row["name"] not in measured] + rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
