"""Whether the final answer is the right mathematical expression, through math-verify.

math-verify says whether two expressions are equal. Beside it stand rules for what equality does not see: numbers are
compared exactly, not to six decimals; words by their letters; a number's base counts; what the question itself says
("factor $x^2-1$": "x^2-1") or an integral left undone is no answer; nor is "3 or 4" where 3 is right.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from liaoyuan.config import Config
from liaoyuan.tasks.problem import Score
from liaoyuan.tasks.reward import Rollout
from liaoyuan.tasks.rewards import maths_worker
from liaoyuan.tasks.rewards.latex import (
    ALTERNATIVE,
    BASED,
    HUGE,
    UNDONE,
    bare,
    contents_of,
    formulas_of,
    named,
    sides,
    strange_words,
    tidy,
    words_of,
)
from liaoyuan.tasks.rewards.number import same
from liaoyuan.tasks.rewards.numbers import Number, plain, read_number
from liaoyuan.tasks.rewards.workers import Reply, Workers

PATIENCE = 10.0  # times its limit, by the clock: a worker on a busy machine is not ended for that
WORKERS = 4


class MathsConfig(Config):
    """read: "marked" (a marked answer, or a text that is nothing else), or "last": else the last formula written.

    seconds: of processor time that one comparison may take; workers: processes that compare at the same time, at most.
    """

    read: Literal["marked", "last"] = "marked"
    seconds: float = Field(3.0, gt=0)
    workers: int = Field(min(WORKERS, os.cpu_count() or 1), gt=0)


@dataclass(frozen=True)
class MathsReward:
    """1 if the final answer equals the right one, else 0; no value where that cannot be said."""

    config: MathsConfig = field(default_factory=MathsConfig)
    name: str = "maths"
    workers: Workers = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        program, seconds = Path(str(maths_worker.__spec__.origin)), self.config.seconds
        workers = Workers(program, [str(seconds)], PATIENCE * seconds, self.config.workers)
        object.__setattr__(self, "workers", workers)

    def __call__(self, rollout: Rollout) -> Score:
        return self.score_all([rollout])[0]

    def score_all(self, rollouts: Sequence[Rollout]) -> list[Score]:
        first = [self._without_library(rollout) for rollout in rollouts]
        asked = [found for found in first if isinstance(found, _Question)]
        replies = self.workers.ask_all([question.words for question in asked])
        return [found if isinstance(found, Score) else _score(found, next(replies)) for found in first]

    def _without_library(self, rollout: Rollout) -> "Score | _Question":
        """Return the score if it can be told without math-verify, else what it is to be asked."""
        if rollout.flaw:
            return Score(0.0, None, rollout.flaw)
        gold = tidy(rollout.problem.answer)
        if not gold:
            return Score(None, None, "the right answer is empty")
        contents = contents_of(rollout.text, self.config.read == "last")
        if not contents:
            return Score(0.0, None, "no marked answer, and the text is no formula")
        if any(not _alike(content, contents[-1]) for content in contents):
            return Score(0.0, None, "several answers")
        return _compare(gold, contents[-1], rollout.problem.question)


@dataclass(frozen=True)
class _Question:
    gold: str
    answer: str
    words: dict[str, Any]


def _compare(gold: str, answer: str, question: str) -> Score | _Question:
    if bare(gold) == bare(answer):
        return Score(1.0, answer)
    wanted = words_of(gold)
    if wanted is not None or words_of(answer) is not None:
        return _verdict(wanted is not None and words_of(answer) == wanted, gold, answer)
    bases = [BASED.fullmatch(bare(text)) for text in (gold, answer)]
    if any(bases):
        return _verdict(_same_in_base(bases[0], bases[1], bare(answer)), gold, answer)
    return _compare_values(gold, answer, question)


def _compare_values(gold: str, answer: str, question: str) -> Score | _Question:
    """Compare numbers exactly; of equations that name a value, the value; leave the rest to math-verify."""
    formulas = formulas_of(question)
    (gold_name, wanted), (name, found) = named(gold), named(answer)
    if gold_name and name and bare(gold_name) != bare(name):
        return Score(0.0, answer, f"it says what {name} is, not {gold_name}")
    relations = sides(wanted), sides(found)
    numbers = _number(wanted), _number(found)
    if numbers[0] and numbers[1]:
        right = same(numbers[1], numbers[0], question)
        if right and plain(wanted) != plain(found) and any(plain(one) == plain(found) for one in formulas):
            return Score(0.0, answer, "it is what the question says")
        return _verdict(right, gold, answer)
    why = _refused(gold, answer)
    if why:
        return Score(0.0, answer, why)
    if bool(relations[0]) != bool(relations[1]):
        return Score(0.0, answer, "an equation is wanted" if relations[0] else "no equation is wanted")
    if relations[0]:
        return _Question(gold, answer, {"gold": relations[0], "answer": relations[1], "question": []})
    return _Question(gold, answer, {"gold": _list(wanted), "answer": _list(found), "question": formulas})


def _refused(gold: str, answer: str) -> str:
    """Return why an answer is none that may be compared, or nothing."""
    if ALTERNATIVE.search(answer) and not (ALTERNATIVE.search(gold.replace("\\;", " ")) or "," in bare(gold)):
        return "it names more than one thing"
    if strange_words(_list(answer), gold):
        return "words stand beside its formula"
    if UNDONE.search(answer) and not UNDONE.search(gold):
        return "it leaves the work undone"
    if HUGE.search(answer) and not HUGE.search(gold):
        return "its powers or factorials are too large to be looked at"
    return ""


def _number(text: str) -> Number | None:
    """Return a number with its unit, if it has one of several letters: the s of "3s^2" is a quantity."""
    letters = re.sub(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+", " ", text)
    return None if sides(text) or re.search(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", letters) else read_number(text)


def _list(text: str) -> str:
    """Return "1, 2 and 3" as "1,2,3"."""
    return re.sub(r",\s*,", ",", ALTERNATIVE.sub(",", text))


def _alike(one: str, other: str) -> bool:
    numbers = _number(named(one)[1]), _number(named(other)[1])
    return bare(one) == bare(other) or (None not in numbers and numbers[0] == numbers[1])


def _same_in_base(gold: re.Match[str] | None, answer: re.Match[str] | None, written: str) -> bool:
    """Whether digits and base agree; an answer may leave out the base that the question asked for, never add one."""
    if gold is None:
        return False
    return answer.groups() == gold.groups() if answer else written == gold[1]


def _verdict(right: bool, gold: str, answer: str) -> Score:
    return Score(float(right), answer, "" if right else f"not {gold}")


def _score(question: _Question, reply: Reply) -> Score:
    if reply.value is None:
        return Score(None, question.answer, f"it cannot be judged: {reply.why}")
    equal, why = reply.value["equal"], reply.value["why"]
    if equal is None:
        return Score(None, question.answer, f"it cannot be judged: {why}")
    return Score(float(equal), question.answer, "" if equal else why or f"not {question.gold}")
