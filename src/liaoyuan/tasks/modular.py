"""Modular chains: `level` operations from left to right, each result taken modulo 10."""

import random
import re
from dataclasses import dataclass

from liaoyuan.tasks.generated import Wording, Written, phrase
from liaoyuan.tasks.problem import Problem, Score, matches

MODULUS = 10
DIGIT = re.compile(r"[0-9]")
IN_THE_HEAD = 0.75  # share of worked solutions that leave steps to the head, as people do
LEFT = 2  # so many, the last ones; where there are no more, all are written
PHRASES = {
    "compact": ("{content}",),
    "en": (
        "Start with {first}. {operations}. Take every result modulo 10, so that 2 - 5 is 7. What is the last result?",
        "Work modulo 10 from left to right, starting with {first}. {operations}. What comes out?",
        "There are only the digits 0 to 9, and after 9 comes 0 again. Begin at {first}. {operations}. What do you get?",
    ),
    "zh": (
        "从{first}开始，{operations}。每一步的结果都对10取余（例如2-5得7），最后得到几？",
        "按模10从左到右计算：从{first}开始，{operations}。最后是几？",
        "只有0到9这十个数，9的后面又回到0。从{first}开始，{operations}，最后得到几？",
    ),
}
SAID = {
    "en": {"+": "add {0}", "-": "subtract {0}", "*": "multiply by {0}"},
    "zh": {"+": "加{0}", "-": "减{0}", "*": "乘{0}"},
}


class Modular:
    """ "7*3+8-5 mod 10=?", worked from left to right; the thought carries the result along: "7*3=1+8=9-5=4".

    As in `addition`, many worked solutions go straight to the answer when two steps are left.
    """

    name = "modular"
    levels = range(2, 9)

    def make(self, chance: random.Random, level: int) -> "Chain":
        value = first = chance.randrange(MODULUS)
        operations = []
        for _ in range(level):
            operator, operand = chance.choice("+-*"), chance.randrange(1, MODULUS)
            value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % MODULUS
            operations.append((operator, operand, value))
        return Chain(first, tuple(operations))

    def check(self, problem: Problem, text: str) -> Score:
        return matches(problem, text, DIGIT)


@dataclass(frozen=True)
class Chain:
    """The first digit, and (operator, operand, result) of each step."""

    first: int
    operations: tuple[tuple[str, int, int], ...]

    @property
    def content(self) -> str:
        chain = "".join(f"{operator}{operand}" for operator, operand, _ in self.operations)
        return f"{self.first}{chain} mod {MODULUS}=?"

    def written(self, wording: Wording, chance: random.Random) -> Written:
        said = ""
        if wording != "compact":
            each = [SAID[wording][operator].format(operand) for operator, operand, _ in self.operations]
            said = "，".join(each) if wording == "zh" else ", then ".join(each).capitalize()
        question = phrase(PHRASES, wording, chance, content=self.content, first=self.first, operations=said)
        steps = [f"{operator}{operand}={value}" for operator, operand, value in self.operations]
        if len(steps) > LEFT and chance.random() < IN_THE_HEAD:
            steps = steps[:-LEFT]
        return Written(question, str(self.operations[-1][2]), (str(self.first), *steps))
