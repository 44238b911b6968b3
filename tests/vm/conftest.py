"""Tests of guest/ run in a virtual machine, all of a session in one, and are reported here as if they had run here.

On this machine they are only collected. The first of them starts the machine, where pytest runs those that were
selected and writes down each report; here each test waits for its own. So `-k`, node ids, markers and tests.coverage
work as with other tests, and a failure has its traceback. A machine that does not start, or ends too early, fails all
tests that it left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUEST = Path(__file__).resolve().parent / "guest"
REPORTS = "SPIDERPOOL_VM_REPORTS"
"""Environment variable of the guest's pytest: the file that it writes reports to."""
BUDGET = int(os.environ.get("SPIDERPOOL_VM_BUDGET", "390"))
"""Seconds that the machine lives at most: with the tests of the machine itself, the tier stays below eight minutes.

The environment variable is for machines that are busy with other things: computing slowly, the guest gets even slower.
"""
MEMORY = 2048


class Teller:
    """The guest's side."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config = config
        self.file = open(path, "a")  # noqa: SIM115 it is written to until the process ends

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(json.dumps(data) + "\n")
        self.file.flush()


class Machine:
    """This machine's side of one guest."""

    def __init__(self, config: pytest.Config, tests: list[str]) -> None:
        self.config = config
        self.last = tests[-1]
        self.end = time.monotonic() + BUDGET + 30
        self.folder = tempfile.TemporaryDirectory(prefix="spt-vm-")
        self.reports = Path(self.folder.name, "reports")
        self.reports.touch()
        self.told: dict[str, list[pytest.TestReport]] = {}
        self.failed = False
        self._read = self.reports.open()
        self._rest = ""
        self.output = Path(self.folder.name, "output")
        selected = Path(self.folder.name, "tests")
        selected.write_text("".join(f"{test}\n" for test in tests))
        pytest_there = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", "-v", f"@{selected}"]
        argv = [sys.executable, "-m", "lab.vm", "run", "--memory", str(MEMORY), "--timeout", str(BUDGET)]
        argv += ["--write", self.folder.name, "--env", f"{REPORTS}={self.reports}", "--", *pytest_there]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def wait_for(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The test's reports; a failed one of our own if the machine has none."""
        while not any(report.when == "teardown" for report in self.told.get(item.nodeid, ())):
            ended = self.process.poll() is not None
            if not self._learn() and (ended or time.monotonic() > self.end):
                return [*self.told.get(item.nodeid, ()), self._complain(item, "the machine did not run this test")]
            time.sleep(0.1)
        reports = self.told[item.nodeid]
        if item.nodeid == self.last and (status := self.process.wait(60)) and not self.failed:
            reports.append(self._complain(item, f"pytest in the machine ended with {status}"))
        return reports

    def _learn(self) -> bool:
        """Read what is new; whether anything was."""
        *lines, self._rest = (self._rest + self._read.read()).split("\n")
        for line in lines:
            data = json.loads(line)
            if isinstance(data["longrepr"], list):  # a tuple: where and why a test was skipped
                data["longrepr"] = tuple(data["longrepr"])
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
            self.told.setdefault(report.nodeid, []).append(report)
            self.failed = self.failed or report.failed
        return bool(lines)

    def _complain(self, item: pytest.Item, what: str) -> pytest.TestReport:
        self.failed = True
        said = self.output.read_text(errors="replace")[-6000:]
        text = f"{what}; it said:\n{said}"
        keywords: dict[str, Any] = dict.fromkeys(item.keywords, 1)
        return pytest.TestReport(item.nodeid, item.location, keywords, "failed", text, "teardown")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self._read.close()
        self.folder.cleanup()


class Proxy:
    """Reports the guest's tests."""

    def __init__(self) -> None:
        self.machine: Machine | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if _is_of_guest(item):  # the guest watches over its own time
                item.add_marker(pytest.mark.timeout(0), append=False)

    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not _is_of_guest(item):
            return None
        if self.machine is None:
            self.machine = Machine(item.config, [each.nodeid for each in item.session.items if _is_of_guest(each)])
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.machine.wait_for(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        # Fixtures of the test before that this one does not share are torn down, as after every test.
        item.session._setupstate.teardown_exact(nextitem)
        return True

    def pytest_sessionfinish(self) -> None:
        if self.machine is not None:
            self.machine.close()


def _is_of_guest(item: pytest.Item) -> bool:
    return GUEST in item.path.parents


def pytest_configure(config: pytest.Config) -> None:
    """Register the side that this is."""
    path = os.environ.get(REPORTS)
    plugin: object = Teller(config, path) if path else Proxy()
    config.pluginmanager.register(plugin, "spiderpool-vm")
