"""Written-out multiplication: a row for each digit of the second number, then the rows are added."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from liaoyuan.tasks.addition import NUMBER, sum_columns
from liaoyuan.tasks.generated import Wording, Written, phrase
from liaoyuan.tasks.problem import Problem, Score, matches

DIGITS = ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4))  # of both numbers, level by level
PHRASES = {
    "compact": ("{left}*{right}=?",),
    "en": (
        "What is {left} times {right}?",
        "Multiply {left} by {right}.",
        "Find the product of {left} and {right}.",
        "There are {right} boxes, and in each of them {left} nails. How many nails are there?",
    ),
    "zh": (
        "{left}乘以{right}等于多少？",
        "求{left}与{right}的积。",
        "计算{left}乘{right}。",
        "每箱有{left}个零件，共有{right}箱，一共有多少个零件？",
    ),
}


class Multiplication:
    """Questions such as "47*36=?".

    The thought of that is "7642,4628,282;7321,4314,1410;2002,8109,2406,0101,": the row of 6 (7*6=42, and 4*6+4=28)
    is 282, the row of 3 is 1410, and these are added as in `addition`.
    """

    name = "multiplication"
    levels = range(1, len(DIGITS) + 1)

    def make(self, chance: random.Random, level: int) -> "Product":
        first, second = (chance.randrange(10 ** (size - 1), 10**size) for size in DIGITS[level - 1])
        return Product(max(first, second), min(first, second))

    def check(self, problem: Problem, text: str) -> Score:
        return matches(problem, text, NUMBER)


@dataclass(frozen=True)
class Product:
    """Two numbers, the larger first."""

    left: int
    right: int

    @property
    def content(self) -> str:
        return f"{self.left}*{self.right}"

    def written(self, wording: Wording, chance: random.Random) -> Written:
        question = phrase(PHRASES, wording, chance, left=self.left, right=self.right)
        return Written(question, str(self.left * self.right), tuple(_steps(self.left, self.right)))


def _steps(left: int, right: int) -> Iterator[str]:
    """Yield the columns of each row and of each sum, with the row or sum itself where more is to come."""
    total, size = 0, len(str(right))
    for place in range(size):
        digit = right // 10**place % 10
        row, carry = left * digit * 10**place, 0
        for upper in map(int, reversed(str(left))):
            column = upper * digit + carry
            yield f"{upper}{digit}{column:02d},"
            carry = column // 10
        if size > 1:
            yield f"{row};"
        if place:
            yield from sum_columns(total, row, len(str(max(total, row))))
            if place < size - 1:
                yield f"{total + row};"
        total += row
