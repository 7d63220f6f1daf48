"""Countdown: reach a target with each of `level` numbers once, by +, - and *.

The answer is an expression; text that a model wrote is never handed to `eval` (see `expression`).
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from liaoyuan.tasks.expression import Expression, read_expression
from liaoyuan.tasks.generated import Wording, Written, content_of, phrase
from liaoyuan.tasks.problem import Problem, Score

LARGEST = 12  # of the given numbers
TARGETS = range(1, 100)
LONGEST = 64  # characters of an answer
DEEPEST = 8  # nested brackets
SHAPE = re.compile(r"[0-9+\-*() ]+")
SIGNED = re.compile(r"(?:^|\() *[-+]")  # a sign that joins no two terms
TOKEN = re.compile(r" *([0-9]{1,4}|[-+*()])")
PHRASES = {
    "compact": ("{content}",),
    "en": (
        "Use each of the numbers {numbers} once, with +, - and * and brackets, to make {target}. Write the expression.",
        "Make {target} out of {numbers}: each number exactly once, joined by +, - or *. Answer with an expression.",
        "Which expression has the value {target} and uses {numbers}, each once, with +, - and * only?",
    ),
    "zh": (
        "用{numbers}这几个数各一次，通过+、-、*和括号得到{target}。请写出算式。",
        "请用+、-、*把{numbers}连成一个等于{target}的算式，每个数恰好用一次。",
        "哪个算式等于{target}？只能用{numbers}各一次，以及+、-、*和括号。",
    ),
}


class Countdown:
    """ "3 5 8 > 24": the answer is an expression such as "8*(5-2)"; the thought shows the steps to it."""

    name = "countdown"
    levels = range(2, 6)

    def make(self, chance: random.Random, level: int) -> "Target":
        """Draw numbers, join two of the terms at a time until one is left, and take its value for the target."""
        while True:
            numbers = [chance.randint(1, LARGEST) for _ in range(level)]
            terms, steps = [_Term(str(number), number) for number in numbers], []
            while len(terms) > 1:
                chance.shuffle(terms)
                left, right = terms.pop(), terms.pop()
                operator, joined = chance.choice(list(_joins(left, right)))
                steps.append(f"{left.value}{operator}{right.value}={joined.value}")
                terms.append(joined)
            if terms[0].value in TARGETS:
                return Target(tuple(sorted(numbers)), terms[0], tuple(steps))

    def check(self, problem: Problem, text: str) -> Score:
        numbers, target = content_of(problem).split(" > ")
        found = read_answer(text.strip())
        if found is None:
            return Score(0.0, None, "no expression")
        if sorted(found.numbers) != sorted(int(number) for number in numbers.split()):
            return Score(0.0, text.strip(), "other numbers than the given ones")
        is_right = found.value == int(target)
        return Score(float(is_right), text.strip(), "" if is_right else f"it is {found.value}")


def read_answer(text: str) -> Expression | None:
    """Return the expression that an answer is; None if it is none of +, - and * within the limits."""
    if len(text) > LONGEST or not SHAPE.fullmatch(text) or SIGNED.search(text):
        return None
    return read_expression(text, TOKEN, DEEPEST)


@dataclass(frozen=True)
class _Term:
    text: str
    value: int
    is_sum: bool = False

    @property
    def factor(self) -> str:
        return f"({self.text})" if self.is_sum else self.text


@dataclass(frozen=True)
class Target:
    """The given numbers, sorted, an expression of them, and the steps to it."""

    numbers: tuple[int, ...]
    found: _Term
    steps: tuple[str, ...]

    @property
    def content(self) -> str:
        return f"{' '.join(map(str, self.numbers))} > {self.found.value}"

    def written(self, wording: Wording, chance: random.Random) -> Written:
        numbers = ("、" if wording == "zh" else ", ").join(map(str, self.numbers))
        question = phrase(PHRASES, wording, chance, content=self.content, numbers=numbers, target=self.found.value)
        spaced = (f" {step}" if place else step for place, step in enumerate(self.steps))
        return Written(question, self.found.text, tuple(spaced))


def _joins(left: _Term, right: _Term) -> Iterator[tuple[str, _Term]]:
    yield "+", _Term(f"{left.text}+{right.text}", left.value + right.value, True)
    if left.value > right.value:
        yield "-", _Term(f"{left.text}-{right.factor}", left.value - right.value, True)
    yield "*", _Term(f"{left.factor}*{right.factor}", left.value * right.value)
