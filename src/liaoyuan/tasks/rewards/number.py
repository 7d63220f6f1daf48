"""Whether the final answer is the right number."""

import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from liaoyuan.config import Config
from liaoyuan.tasks.expression import read_expression
from liaoyuan.tasks.problem import Score
from liaoyuan.tasks.reward import Rollout
from liaoyuan.tasks.rewards.marks import final_answers
from liaoyuan.tasks.rewards.numbers import Number, only_number, plain, read_number

ASKS_PERCENT = re.compile(r"%|percent|per cent|百分", re.IGNORECASE)
SOME_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:\s*/\s*[0-9]+)?%?")


class NumberConfig(Config):
    """read: "marked" (a marked answer, or a text that is nothing else), or "last": else the last number written.

    tolerance: by how much of the right value an answer may be off; 0: not at all.
    """

    read: Literal["marked", "last"] = "marked"
    tolerance: float = 0.0


@dataclass(frozen=True)
class NumberReward:
    """1 if the final answer is the right number, else 0; no value where the right answer cannot be read.

    "50%" is right where 0.5 is, and where 50 is and the question asks for percent; where "50%" is right, "50" is not.
    An expression is an answer only where the right answer is one itself, lest the question's own be copied.
    """

    config: NumberConfig = field(default_factory=NumberConfig)
    name: str = "number"

    def __call__(self, rollout: Rollout) -> Score:
        if rollout.flaw:
            return Score(0.0, None, rollout.flaw)
        gold, may_reckon = read_gold(rollout.problem.answer)
        if gold is None:
            return Score(None, None, f"the right answer '{rollout.problem.answer[:60]}' is no number that can be read")
        found, why = self._read(rollout.text, may_reckon)
        if found is None:
            return Score(0.0, None, why)
        right = same(found, gold, rollout.problem.question, self.config.tolerance)
        return Score(float(right), written(found), "" if right else f"not {rollout.problem.answer}")

    def _read(self, text: str, may_reckon: bool) -> tuple[Number | None, str]:
        mark, contents = final_answers(text)
        if mark == "whole" and self.config.read == "last":
            matches = SOME_NUMBER.findall(plain(text))
            contents = matches[-1:] or contents
        numbers = [read_number(one) or (only_number(one) if mark == "phrase" else None) for one in contents]
        if may_reckon:
            numbers = [number or _reckoned(content) for number, content in zip(numbers, contents, strict=True)]
        if not numbers or numbers[-1] is None:
            what = "no marked answer, and the text is no number" if mark == "whole" else "what is marked is no number"
            return None, what
        if any(number is None or number.value != numbers[-1].value for number in numbers):
            return None, "several answers"
        return numbers[-1], ""


def read_gold(answer: str) -> tuple[Number | None, bool]:
    """Return a right answer as a number, and whether it is written as an expression."""
    number = read_number(answer)
    return (number, False) if number else (_reckoned(answer), True)


def same(found: Number, gold: Number, question: str, tolerance: float = 0.0) -> bool:
    """Whether an answer is the right number; see `NumberReward` for percents."""
    values = [found.value]
    if gold.percent and not found.percent and found.value == gold.value * 100:
        return False
    if found.percent and not gold.percent and ASKS_PERCENT.search(question):
        values.append(found.value * 100)
    room = abs(gold.value) * Fraction(tolerance)
    return any(abs(value - gold.value) <= room for value in values)


def written(number: Number) -> str:
    """Return the number as text, percents divided by 100."""
    value = number.value
    exact = value.denominator == 1 or not (value.denominator % 2 and value.denominator % 5)
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}" if exact else str(value)


def _reckoned(text: str) -> Number | None:
    found = read_expression(plain(text))
    return None if found is None else Number(Fraction(found.value))
