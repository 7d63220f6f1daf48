"""Unit tests of code that nobody has read: tests in one jail, the code in another, the verdict out of its reach."""

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from liaoyuan.safety.jail import Job, Limits, Outcome, finish, last_line, printable, start
from liaoyuan.safety.mechanisms import require

PROGRAM = "from liaoyuan.safety.apart import {0}\n{0}.main()\n"
LONGEST_REASON = 400  # characters


@dataclass(frozen=True)
class Tests:
    """Unit tests: statements after a setup, which use the code's names; or the source of a file of unittest.

    module: the name by which such a file imports the code under test.
    """

    __test__ = False  # it is not one of pytest's

    tests: tuple[str, ...] = ()
    setup: str = ""
    source: str = ""
    module: str = ""


@dataclass(frozen=True)
class Verdict:
    """How many tests passed, of how many, and the first reason why not all did; broken: the tests cannot be run."""

    passed: int
    total: int
    reason: str = ""
    broken: bool = False

    @property
    def share(self) -> float:
        return self.passed / self.total if self.total else 0.0

    @property
    def is_right(self) -> bool:
        return not self.broken and 0 < self.total == self.passed


def try_code(code: str, tests: Tests, limits: Limits | None = None) -> Verdict:
    """Return what the tests say of the code. Raises RefusedError where this host has no jail: nothing has run then."""
    require()
    limits = limits or Limits()
    asks, is_asked = os.pipe(), os.pipe()  # what the judge writes, what it reads: each (reading end, writing end)
    given = {"tests.json": json.dumps(asdict(tests)).encode()}, {"code.txt": as_source(code)}
    judge = Job(PROGRAM.format("judge"), given[0], limits, (is_asked[0], asks[1]))
    server = Job(PROGRAM.format("server"), given[1], limits, (asks[0], is_asked[1]))
    jails = []
    try:
        for job in (judge, server):
            jails.append(start(job))
    finally:
        for descriptor in (*asks, *is_asked):
            os.close(descriptor)
        if len(jails) == 1:
            finish(jails)
    judged, served = finish(jails)
    return verdict(judged, served, limits)


def as_source(code: str) -> bytes:
    return code.encode("utf-8", "replace")  # half of a surrogate pair is no text


def verdict(judge: Outcome, code: Outcome, limits: Limits) -> Verdict:
    """Return the judge's word, or the reason why there is none, which always counts against the code."""
    found = word_of(judge)
    if found.get("broken"):
        return Verdict(0, 0, printable(found["reason"], LONGEST_REASON), broken=True)
    if found and not found.get("gone"):
        return Verdict(found["passed"], found["total"], printable(found["reason"], LONGEST_REASON))
    if "time" in (judge.status, code.status):
        return Verdict(0, 0, f"the tests were not over after {limits.seconds:g} s")
    if code.status == "stopped" or (code.is_well and not found):
        return Verdict(0, 0, why_ended(judge, limits, "the tests"))
    return Verdict(0, 0, why_ended(code, limits, "the code"))


def word_of(judge: Outcome) -> dict[str, Any]:
    """Return what the judge says, or nothing: tests can end him before he says it."""
    try:
        found = json.loads(judge.output) if judge.is_well else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def why_ended(outcome: Outcome, limits: Limits, who: str) -> str:
    """Return why a program ended before there was a verdict."""
    if outcome.status == "cpu":
        return f"{who} used more than {limits.cpu_seconds} s of processor time"
    if outcome.status == "output":
        return f"{who} wrote more than {limits.output_bytes:,} bytes of output"
    if outcome.status == "killed":
        return f"{who} was killed by signal {-(outcome.exit_code or 0)}"
    told = last_line(outcome.errors)
    return f"{who} ended the process before the tests were over, with exit code {outcome.exit_code}" + (
        f" ({told})" if told else ""
    )
