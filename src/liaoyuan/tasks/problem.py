"""What a task is: it makes problems, each a function of (seed, index, level, split), and judges answers."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from liaoyuan.data import Message, Record

Split = Literal["train", "validation", "test"]
SHARES: dict[int, Split] = {0: "test", 1: "validation"}  # of ten hash values; the other eight are training
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
TEST_SEED = 0  # of the test problems, the same in every run and for every model


@dataclass(frozen=True)
class Problem:
    """A question, its right answer and one worked solution (`thought`); `key` identifies its content.

    steps: the pieces of which the thought is made, where its maker says so. source, licence: whose it is, if a file's.
    solution: what is said to answer it, where the right answer is not: a program, of which it is the tests; empty: not
        known.
    """

    task: str
    question: str
    answer: str
    thought: str
    level: int
    key: str
    steps: tuple[str, ...] = ()
    source: str = "generated"
    licence: str = ""
    solution: str | None = None


@dataclass(frozen=True)
class Score:
    """What an answer is worth.

    value: 1 is right and 0 wrong, rewards may give more, less, or anything between; None: it cannot be judged, which
        is counted and never taken for wrong. parsed: what was read as the answer, if anything. reason: for people.
    """

    value: float | None
    parsed: str | None = None
    reason: str = ""

    @property
    def is_right(self) -> bool:
        return self.value is not None and self.value >= 1.0


class Task(Protocol):
    """A kind of problem. `levels` are its levels of difficulty, easiest first; one between may be missing."""

    @property
    def name(self) -> str: ...

    @property
    def levels(self) -> Sequence[int]: ...

    def problem(self, seed: int, index: int, level: int, split: Split = "train") -> Problem:
        """Return problem `index` of the stream `seed`; the same arguments give the same problem for ever."""
        ...

    def check(self, problem: Problem, text: str) -> Score:
        """Judge `text`, what was written after the thought: 1 if it is a right answer and nothing else."""
        ...


def matches(problem: Problem, text: str, shape: re.Pattern[str]) -> Score:
    """Return the score of a text that is to be the problem's answer itself, which has this shape."""
    parsed = text.strip()
    if not shape.fullmatch(parsed):
        return Score(0.0, None, "no answer of the wanted shape")
    return Score(float(parsed == problem.answer), parsed, "" if parsed == problem.answer else f"not {problem.answer}")


def half_width(text: str) -> str:
    """Return the text with the forms of full width, U+FF01 to U+FF5E and the wide space, as ASCII."""
    return text.translate(HALF_WIDTH)


def split_of(key: str) -> Split:
    """Return the split to which a problem belongs, decided by its content alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return SHARES.get(int.from_bytes(digest, "big") % 10, "train")


def to_record(problem: Problem, thinking: bool = True, left_out: int = 0) -> Record:
    """Return the worked solution as a conversation to learn: with its thought, or with the answer at once.

    Where nobody knows what to say, it is a prompt, and nothing of it is learned.
    The record's `id` is the problem's key, a slash, and how it is told: "slow", "fast", "slow-zh".

    left_out: so many of the last steps are left out of the thought, if it has more.
    """
    whole = not left_out or len(problem.steps) <= left_out
    thought = problem.thought if whole else "".join(problem.steps[:-left_out])
    said = problem.answer if problem.solution is None else problem.solution
    answer = Message(role="assistant", content=said, think=thought if thinking else "")
    asked = Message(role="user", content=problem.question)
    name, colon, _ = problem.key.partition(":")
    wording = problem.task.removeprefix(name) if colon and problem.task.startswith(name) else ""
    return Record(
        id=f"{problem.key}/{'slow' if thinking else 'fast'}{wording}",
        kind="chat" if said else "prompt",
        messages=(asked, answer) if said else (asked,),
        task=problem.task,
        answer=problem.answer,
        level=problem.level,
        source=problem.source,
        licence=problem.licence,
    )


def spread(task: Task, seed: int, levels: Sequence[int], count: int, split: Split) -> list[Problem]:
    """Return `count` different problems of one split, evenly over the levels.

    A level with too few problems of the split for its share gives those it has, again and again.
    """
    problems, seen, fresh = [], set[str](), 0
    for place in range(count):
        for _ in range(20):  # redraws of a problem that is there already
            problem = task.problem(seed, fresh, levels[place % len(levels)], split)
            fresh += 1
            if problem.key not in seen:
                break
        seen.add(problem.key)
        problems.append(problem)
    return problems


def held_out_problems(task: Task, levels: Sequence[int], count: int) -> list[Problem]:
    """Return the fixed test problems on which every model is measured."""
    return spread(task, TEST_SEED, levels, count, "test")
