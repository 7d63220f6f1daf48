"""What was rolled out, kept in the run folder: a file a step, `rollouts/000012.jsonl.zst`, a line a rollout.

A file is whole or absent, and a function of the step's rollouts alone, so a resumed run writes the same bytes again.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from liaoyuan.data.records import read_lines
from liaoyuan.rundir import write_atomic
from liaoyuan.tuning.rollout import Rollouts
from liaoyuan.tuning.update import Lesson

FOLDER = "rollouts"


class RolloutLog:
    """The folder `rollouts` of a run; the oldest files give way when all together are larger than `most` bytes."""

    def __init__(self, run: Path, every: int, most: int, resume_from: int = 0) -> None:
        """Files of step `resume_from` and later, of a run that went further, are deleted."""
        self.folder, self._every, self._most = run / FOLDER, every, most
        self._sizes: dict[Path, int] = {}
        for path in sorted(self.folder.glob("*.jsonl.zst")):
            if step_of(path) >= resume_from:
                path.unlink()
            else:
                self._sizes[path] = path.stat().st_size

    def write(self, step: int, rollouts: Rollouts, lesson: Lesson | None) -> None:
        """Keep a step's rollouts, if it is one of those that are kept.

        lesson: what was learned from them, if anything.
        """
        if not self._every or step % self._every:
            return
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(step, rollouts, lesson))
        data = zstandard.compress("".join(lines).encode())
        path = self.folder / f"{step:06d}.jsonl.zst"
        write_atomic(path, data)
        self._sizes[path] = len(data)
        while sum(self._sizes.values()) > self._most and len(self._sizes) > 1:
            oldest = min(self._sizes, key=step_of)
            oldest.unlink(missing_ok=True)
            del self._sizes[oldest]


def step_of(path: Path) -> int:
    """Return the step whose rollouts a file holds."""
    return int(path.name.split(".")[0])


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """Return the rows of one file.

    Raises:
        LiaoyuanError: it is missing or torn.
    """
    return [json.loads(line) for _, line in read_lines(path)]


def rows_of(step: int, rollouts: Rollouts, lesson: Lesson | None) -> Iterator[dict[str, Any]]:
    """Yield what is kept of each rollout."""
    rewards = rollouts.rewards.flatten().tolist()
    learned = [None] * len(rewards)
    if lesson:
        pairs = zip(lesson.advantages.flatten().tolist(), lesson.samples.flatten().tolist(), strict=True)
        learned = [round(advantage, 6) if chosen else None for advantage, chosen in pairs]
    for place, (answer, score) in enumerate(zip(rollouts.answers, rollouts.scores, strict=True)):
        problem = answer.problem
        yield {
            "step": step,
            "group": place // rollouts.group,
            "sample": place % rollouts.group,
            "problem": problem.key,
            "task": problem.task,
            "level": problem.level,
            "question": problem.question,
            "gold": problem.answer,
            "thought": answer.thought,
            "text": answer.text,
            "flaw": answer.flaw,
            "reward": None if score.value is None else round(rewards[place], 6),
            "parsed": score.parsed,
            "reason": score.reason,
            "tokens": len(rollouts.completions[place].tokens),
            "advantage": learned[place],
        }
