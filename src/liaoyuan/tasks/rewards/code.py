"""Whether a program passes its unit tests, which run in the jail; the program in another one, where it cannot cheat.

The right "answer" of such a problem is its tests, `CodeTests` as JSON: so `data` makes it of the rows of MBPP and
Exercism, and so writes it whoever has tests of his own.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pydantic import Field, ValidationError

from liaoyuan.config import Config
from liaoyuan.safety import Limits, RefusedError, Tests, Verdict, require, try_code
from liaoyuan.tasks.problem import Score
from liaoyuan.tasks.reward import Rollout

FENCED = re.compile(  # possessive: a line of a million characters is read once, not tried in every way
    r"^[ \t]*+(```++|~~~++)[ \t]*+([^\s`]*+)[^\n]*+\n(.*?)(?:^[ \t]*+\1[ \t]*+$|\Z)", re.DOTALL | re.MULTILINE
)
PYTHON = ("", "python", "py", "python3")  # what such a block calls itself
MEBIBYTE = 1 << 20
LONGEST = 1_000_000  # characters of a program


class CodeConfig(Config):
    """share: the share of tests that pass, not all or nothing. at_once: programs judged at the same time. The rest:
    limits of the tests and of the code, each."""

    share: bool = False
    seconds: float = Field(15.0, gt=0)
    cpu_seconds: int = Field(5, gt=0)
    memory_mib: int = Field(512, ge=64)
    at_once: int = Field(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, gt=0)


class CodeTests(Config):
    """How tests are written down: the fields of `safety.Tests`."""

    tests: tuple[str, ...] = ()
    setup: str = ""
    source: str = ""
    module: str = ""


@dataclass(frozen=True)
class UnitTests:
    """1 if the program passes all its tests, else 0; no value if the tests are broken, or where there is no jail."""

    config: CodeConfig = field(default_factory=CodeConfig)
    name: str = "code"

    def __call__(self, rollout: Rollout) -> Score:
        if rollout.flaw:
            return Score(0.0, None, rollout.flaw)
        code, tests = code_of(rollout.text), read_tests(rollout.problem.answer)
        if tests is None:
            return Score(None, code, "the problem has no tests in its answer")
        if not code.strip():
            return Score(0.0, None, "no Python program")
        if len(code) > LONGEST:
            return Score(0.0, None, f"a program of more than {LONGEST:,} characters")
        try:
            verdict = try_code(code, tests, self._limits())
        except RefusedError as error:
            return Score(None, code, str(error))
        return self._score(code, verdict)

    def score_all(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Judge many rollouts, `at_once` of them at the same time."""
        with ThreadPoolExecutor(self.config.at_once) as pool:
            return list(pool.map(self, rollouts))

    def _limits(self) -> Limits:
        config = self.config
        return Limits(config.seconds, config.cpu_seconds, config.memory_mib * MEBIBYTE)

    def _score(self, code: str, verdict: Verdict) -> Score:
        if verdict.broken:
            return Score(None, code, f"the tests are broken: {verdict.reason}")
        value = verdict.share if self.config.share else float(verdict.is_right)
        return Score(value, code, verdict.reason)


def open_unit_tests(config: CodeConfig) -> UnitTests:
    """Return the reward; raises LiaoyuanError, which says what lacks, where this host cannot run untrusted code."""
    require()
    return UnitTests(config)


def code_of(text: str) -> str:
    """Return the Python of an answer: its fenced blocks in their order, or the whole text if it has none.

    Blocks that name another language, and interactive sessions, are left out.
    """
    blocks = [(match[2].lower(), match[3]) for match in FENCED.finditer(text)]
    if not blocks:
        return text
    return "\n".join(code for kind, code in blocks if kind in PYTHON and not code.lstrip().startswith(">>>"))


def read_tests(answer: str) -> Tests | None:
    """Return the tests that a problem's right answer is, or None if it is none."""
    try:
        found = CodeTests.model_validate_json(answer)
    except (ValidationError, ValueError):
        return None
    tests = Tests(**found.model_dump())
    return tests if tests.tests or (tests.source and tests.module) else None
