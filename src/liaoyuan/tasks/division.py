"""Long division with a remainder: digit by digit of the first number, from the left."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from liaoyuan.tasks.generated import Wording, Written, phrase
from liaoyuan.tasks.problem import Problem, Score

DIGITS = ((2, 1), (3, 1), (4, 1), (3, 2), (4, 2), (5, 2), (5, 3), (6, 3))  # of both numbers, level by level
ANSWER = re.compile(r"(0|[1-9][0-9]{0,17}) ?(?:r|R|remainder|余) ?(0|[1-9][0-9]{0,17})")
BETWEEN = {"compact": "r", "en": " remainder ", "zh": "余"}
PHRASES = {
    "compact": ("{left}/{right}=?",),
    "en": (
        "Divide {left} by {right} with a remainder. Answer like 12 remainder 3.",
        "How many times does {right} go into {left}, and what remains? Answer like 12 remainder 3.",
        "{left} cards are dealt evenly to {right} players. How many does each get, and how many are left over? "
        "Answer like 12 remainder 3.",
    ),
    "zh": (
        "{left}除以{right}，商和余数是多少？请写成“12余3”的形式。",
        "{left}里面有多少个{right}，还剩多少？请写成“12余3”的形式。",
        "把{left}张卡片平均分给{right}个人，每人几张，还剩几张？请写成“12余3”的形式。",
    ),
}


class Division:
    """Questions such as "7434/6=?", whose answer is "1239r0".

    The thought takes a digit at a time: "7:1*6=6,1;14:2*6=12,2;..." is 7 divided by 6, which leaves 1; with the next
    digit 14, which leaves 2.
    """

    name = "division"
    levels = range(1, len(DIGITS) + 1)

    def make(self, chance: random.Random, level: int) -> "Quotient":
        left, right = (chance.randrange(10 ** (size - 1), 10**size) for size in DIGITS[level - 1])
        return Quotient(left, max(2, right))

    def check(self, problem: Problem, text: str) -> Score:
        read, right = ANSWER.fullmatch(text.strip()), ANSWER.fullmatch(problem.answer)
        if not read or not right:
            return Score(0.0, None, "no quotient and remainder")
        is_right = read.groups() == right.groups()
        return Score(float(is_right), "r".join(read.groups()), "" if is_right else f"not {problem.answer}")


@dataclass(frozen=True)
class Quotient:
    """The number that is divided, and by which."""

    left: int
    right: int

    @property
    def content(self) -> str:
        return f"{self.left}/{self.right}"

    def written(self, wording: Wording, chance: random.Random) -> Written:
        question = phrase(PHRASES, wording, chance, left=self.left, right=self.right)
        answer = BETWEEN[wording].join(map(str, divmod(self.left, self.right)))
        return Written(question, answer, tuple(_steps(self.left, self.right)))


def _steps(left: int, right: int) -> Iterator[str]:
    """Yield a step for each digit of the quotient; leading zeros of it are passed over."""
    rest, begun = 0, False
    digits = str(left)
    for place, digit in enumerate(digits):
        part = 10 * rest + int(digit)
        times, rest = divmod(part, right)
        begun = begun or times > 0 or place == len(digits) - 1
        if begun:
            yield f"{part}:{times}*{right}={times * right},{rest};"
