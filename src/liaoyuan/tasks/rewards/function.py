"""A Python function of the user's as a reward: "path.py:function".

It is called with those of these arguments that it names: question, gold, thought, text, flaw, length, level, task.
It returns a number, None where it cannot judge, or a pair of either and a reason.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from liaoyuan.config import Config
from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.tasks.problem import Score
from liaoyuan.tasks.reward import Rollout
from liaoyuan.tasks.rewards import function_worker
from liaoyuan.tasks.rewards.workers import Reply, Workers

FIELDS = ("question", "gold", "thought", "text", "flaw", "length", "level", "task")
FEWEST = 20  # calls before the share of failures is looked at


class FunctionConfig(Config):
    """path: "FILE.py:FUNCTION". seconds: of one call; workers: processes; failures: their share that stops the run."""

    path: str
    seconds: float = Field(5.0, gt=0)
    workers: int = Field(1, gt=0)
    failures: float = Field(0.2, ge=0, le=1)


@dataclass
class _Count:
    calls: int = 0
    failed: int = 0


class FunctionReward:
    """The value that the function returns; none where it raises, takes too long or returns no number.

    Raises (when opened, and when called):
        LiaoyuanError: the file or function is missing or wants unknown arguments; too large a share of calls failed.
    """

    def __init__(self, config: FunctionConfig, name: str = "function") -> None:
        self.name, self.config, self.count = name, config, _Count()
        file, colon, function = config.path.rpartition(":")
        if not colon or not file.endswith(".py") or not function.isidentifier():
            raise LiaoyuanError(f"The reward function '{config.path}' must look like path.py:function.")
        if not Path(file).is_file():
            raise LiaoyuanError(f"The file {file} of the reward function does not exist.")
        program = Path(str(function_worker.__spec__.origin))
        self._workers = Workers(program, [file, function], config.seconds, config.workers)
        self._wants = self._checked(self._workers.hello())

    def __call__(self, rollout: Rollout) -> Score:
        return self.score_all([rollout])[0]

    def score_all(self, rollouts: Sequence[Rollout]) -> list[Score]:
        questions = [self._fields(rollout) for rollout in rollouts]
        with contextlib.closing(self._workers.ask_all(questions)) as replies:  # after too many failures, no more
            return [self._score(reply) for reply in replies]

    def _checked(self, said: dict[str, Any]) -> list[str]:
        if "failed" in said:
            function = self.config.path.rpartition(":")[2]
            hint = nearest(function, said.get("names", ())) or "."
            raise LiaoyuanError(f"The reward function {self.config.path} cannot be loaded: {said['failed']}{hint}")
        for name in said["wants"]:
            if name not in FIELDS:
                raise LiaoyuanError(
                    f"The reward function {self.config.path} wants '{name}', but there are "
                    f"{', '.join(FIELDS)}{nearest(name, FIELDS) or '.'}"
                )
        return list(said["wants"])

    def _fields(self, rollout: Rollout) -> dict[str, Any]:
        problem = rollout.problem
        values = (problem.question, problem.answer, rollout.thought, rollout.text, rollout.flaw, rollout.length)
        known = dict(zip(FIELDS, (*values, problem.level, problem.task), strict=True))
        return {name: known[name] for name in self._wants}

    def _score(self, reply: Reply) -> Score:
        found = reply.value or {"failed": reply.why}
        value, why = found.get("value"), found.get("failed", "")
        if not why and value is not None and not math.isfinite(value):
            why = f"it returned {value}"
        self.count.calls += 1
        self.count.failed += bool(why)
        if why:
            self._look(why)
            return Score(None, None, f"{self.config.path} failed: {why}")
        return Score(value, None, found["reason"])

    def _look(self, why: str) -> None:
        calls, failed = self.count.calls, self.count.failed
        if calls >= FEWEST and failed > self.config.failures * calls:
            raise LiaoyuanError(
                f"The reward function {self.config.path} failed for {failed} of {calls} answers (lastly: {why}). "
                "Mend it, or allow more with `failures`."
            )
