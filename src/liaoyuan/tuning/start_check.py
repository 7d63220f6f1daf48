"""Whether supervised fine-tuning has left reinforcement learning something to choose, told before RL is paid for.

RL finds quickly which of a model's ways of thinking is best, and raises the skill in each slowly
(docs/notes/regime.md). So at each level one way, long thoughts or short ones, must already be right in a third of the
samples that take it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from liaoyuan.checkpoint import load_model
from liaoyuan.data import Tokenizer
from liaoyuan.rundir import Report
from liaoyuan.tasks import Right, Rollout, solution_records
from liaoyuan.tuning.doctor import Finding
from liaoyuan.tuning.rollout import roll_out
from liaoyuan.tuning.stages import VALIDATION_SEED, Lesson
from liaoyuan.tuning.validation import tuning_engine

ENOUGH = 1 / 3  # share of a way's samples that are right, from which RL was seen to lead in every seed
LONG = 0.75  # of the way from the shortest worked thought to the longest: where long thoughts begin
RARE = 0.02  # share of the samples below which a way is too rare to count

Ways = dict[str, dict[str, float]]  # "long" and "short": the `share` of samples that think so, and that is `right`


def look_at_start(folder: Path, report: Report, lesson: Lesson, start: str) -> dict[str, Any]:
    """Sample the validation problems from the model in `start`, a job of a study; return its ways level by level.

    `finding` is what is to be told, empty if RL can begin.
    """
    tokenizer, task = Tokenizer.load(Path(start)), lesson.chosen_task
    with torch.inference_mode():
        engine = tuning_engine(load_model(Path(start)).eval(), lesson.max_tokens)
        drawn = roll_out(
            engine, tokenizer, Right(task), lesson.validation(), lesson.samples, VALIDATION_SEED, lesson.max_tokens
        )
    right = [score.is_right for score in drawn.scores]
    found = ways(drawn.answers, right, bounds(lesson))
    finding = finding_of(found)
    return {"ways": {str(level): way for level, way in found.items()}, "finding": str(finding) if finding else ""}


def bounds(lesson: Lesson) -> dict[int, float]:
    """Return for each level from how many characters on a thought is a long one, by its worked solutions."""
    given = (lesson.chosen_task, lesson.levels, lesson.solutions, lesson.seed, 0, lesson.hurried)
    lengths: dict[int, list[int]] = {}
    for record in solution_records(*given):
        lengths.setdefault(record.level, []).append(len(record.messages[-1].think))
    return {level: min(found) + LONG * (max(found) - min(found)) for level, found in lengths.items()}


def ways(answers: Sequence[Rollout], right: Sequence[bool], long_from: Mapping[int, float]) -> dict[int, Ways]:
    """Return of each level which share of the samples thinks long, which short, and how many of each are right.

    long_from: see `bounds`.
    """
    found = {}
    for level in long_from:
        placed = [
            (len(answer.thought) >= long_from[level], is_right)
            for answer, is_right in zip(answers, right, strict=True)
            if answer.problem.level == level
        ]
        split = {"long": [one for long, one in placed if long], "short": [one for long, one in placed if not long]}
        found[level] = {
            name: {"share": len(some) / max(1, len(placed)), "right": sum(some) / max(1, len(some))}
            for name, some in split.items()
        }
    return found


def finding_of(found: Mapping[int, Ways]) -> Finding | None:
    """Return what is wrong with a start whose ways are these, if anything is."""
    best = {
        level: max((way["right"] for way in some.values() if way["share"] >= RARE), default=0.0)
        for level, some in found.items()
    }
    poor = [f"level {level} ({100 * right:.0f}%)" for level, right in best.items() if right < ENOUGH]
    if not poor:
        return None
    return Finding(
        "start",
        "warning",
        f"SFT has left little for RL to choose at {', '.join(poor)}: neither long thoughts nor short ones are right "
        f"in {100 * ENOUGH:.0f}% of the samples.",
        "Give SFT more solutions (study.lesson.solutions) and steps (study.sft_steps), or lower the levels.",
    )
