"""Written-out subtraction: the smaller of two numbers of `level` digits from the larger, column by column."""

import random
from dataclasses import dataclass

from liaoyuan.tasks.addition import NUMBER
from liaoyuan.tasks.generated import Wording, Written, phrase
from liaoyuan.tasks.problem import Problem, Score, matches

PHRASES = {
    "compact": ("{left}-{right}=?",),
    "en": (
        "What is {left} minus {right}?",
        "Subtract {right} from {left}.",
        "By how much is {left} more than {right}?",
        "A counter shows {left}. It goes down by {right}. What does it show then?",
    ),
    "zh": (
        "{left}减去{right}等于多少？",
        "求{left}与{right}的差。",
        "{left}比{right}多多少？",
        "计数器显示{left}，又减少了{right}，现在显示多少？",
    ),
}


class Subtraction:
    """Questions such as "4827-1659=?"; the thought has of each column both digits, what is borrowed, what is left."""

    name = "subtraction"
    levels = range(1, 9)

    def make(self, chance: random.Random, level: int) -> "Difference":
        low, high = (10 ** (level - 1) if level > 1 else 0), 10**level
        right, left = sorted((chance.randrange(low, high), chance.randrange(low, high)))
        return Difference(left, right, level)

    def check(self, problem: Problem, text: str) -> Score:
        return matches(problem, text, NUMBER)


@dataclass(frozen=True)
class Difference:
    """Two numbers of so many digits, the larger first."""

    left: int
    right: int
    digits: int

    @property
    def content(self) -> str:
        return f"{self.left}-{self.right}"

    def written(self, wording: Wording, chance: random.Random) -> Written:
        question = phrase(PHRASES, wording, chance, left=self.left, right=self.right)
        return Written(question, str(self.left - self.right), _columns(self.left, self.right, self.digits))


def _columns(left: int, right: int, count: int) -> tuple[str, ...]:
    """Return the written columns, units first: "7918," is 7 - 9, for which 1 is borrowed and 8 is left."""
    columns, borrowed = [], 0
    for place in range(count):
        upper, lower = left // 10**place % 10, right // 10**place % 10
        rest = upper - lower - borrowed
        borrowed = int(rest < 0)
        columns.append(f"{upper}{lower}{borrowed}{rest % 10},")
    return tuple(columns)
