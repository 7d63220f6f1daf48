"""Written-out addition: two numbers of `level` digits each, column by column from the right."""

import random
import re
from dataclasses import dataclass

from liaoyuan.tasks.generated import Wording, Written, phrase
from liaoyuan.tasks.problem import Problem, Score, matches

NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")  # ASCII digits only, no sign, no leading zero, no unbounded length
IN_THE_HEAD = 0.75  # share of worked solutions that leave columns to the head, as people do
LEFT = 2  # so many columns, the leading ones; where there are no more, all are written
PHRASES = {
    "compact": ("{left}+{right}=?",),
    "en": (
        "What is {left} plus {right}?",
        "Add {right} to {left}.",
        "One number is {left}, the other {right}. What is their sum?",
        "A counter shows {left}. It goes up by {right}. What does it show then?",
    ),
    "zh": (
        "{left}加{right}等于多少？",
        "求{left}与{right}的和。",
        "两个数分别是{left}和{right}，它们加起来是多少？",
        "计数器显示{left}，又增加了{right}，现在显示多少？",
    ),
}


class Addition:
    """Questions such as "4827+1659=?"; the thought writes of each column both digits and their sum with the carry.

    As in solutions that people write, not all is on paper: `IN_THE_HEAD` of them go straight to the answer when two
    columns are left. Every worked solution is right; which way of thinking pays is for the reward to say.
    """

    name = "addition"
    levels = range(1, 9)

    def make(self, chance: random.Random, level: int) -> "Sum":
        low, high = (10 ** (level - 1) if level > 1 else 0), 10**level
        left, right = chance.randrange(low, high), chance.randrange(low, high)
        in_the_head = level > LEFT and chance.random() < IN_THE_HEAD
        return Sum(left, right, level - LEFT if in_the_head else level)

    def check(self, problem: Problem, text: str) -> Score:
        return matches(problem, text, NUMBER)


@dataclass(frozen=True)
class Sum:
    """Two numbers, and how many columns of them the worked solution writes."""

    left: int
    right: int
    columns: int

    @property
    def content(self) -> str:
        return f"{self.left}+{self.right}=?"

    def written(self, wording: Wording, chance: random.Random) -> Written:
        question = phrase(PHRASES, wording, chance, left=self.left, right=self.right)
        return Written(question, str(self.left + self.right), sum_columns(self.left, self.right, self.columns))


def sum_columns(left: int, right: int, count: int) -> tuple[str, ...]:
    """Return the written columns, units first: "7916," is 7 + 9 = 16, whose 1 is carried."""
    columns, carry = [], 0
    for place in range(count):
        upper, lower = left // 10**place % 10, right // 10**place % 10
        total = upper + lower + carry
        columns.append(f"{upper}{lower}{total:02d},")
        carry = total // 10
    return tuple(columns)
