"""A pytest plugin that writes the outcome of every test as a line of JSON: its name, what became of it, and why."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

OUTCOMES = Path(os.environ["CONFORMANCE_OUTCOMES"])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write(report.nodeid, "failed", f"not collected: {_last_line(report.longreprtext)}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _write(report.nodeid, report.outcome, _why(report))


def _why(report: pytest.TestReport) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message) if crash else _last_line(report.longreprtext)


def _last_line(text: str) -> str:
    lines: Iterator[str] = (line for line in reversed(text.splitlines()) if line.strip())
    return next(lines, "")


def _write(name: str, outcome: str, why: str) -> None:
    with OUTCOMES.open("a") as file:
        file.write(json.dumps({"test": name, "outcome": outcome, "why": why[:2000]}) + "\n")
