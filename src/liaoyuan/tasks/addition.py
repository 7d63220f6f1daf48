"""Written-out addition: two numbers of `level` digits each, column by column from the right."""

import random
import re

from liaoyuan.tasks.problem import Problem, Score, Split, draw, matches

NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")  # ASCII digits only, no sign, no leading zero, no unbounded length
IN_THE_HEAD = 0.75  # share of worked solutions that leave columns to the head, as people do
LEFT = 2  # so many columns, the leading ones; where there are no more, all are written


class Addition:
    """Questions such as "4827+1659=?"; the thought writes of each column both digits and their sum with the carry.

    As in solutions that people write, not all is on paper: `IN_THE_HEAD` of them go straight to the answer when two
    columns are left. Every worked solution is right; which way of thinking pays is for the reward to say.
    """

    name = "addition"
    levels = range(1, 9)

    def problem(self, seed: int, index: int, level: int, split: Split = "train") -> Problem:
        return draw(self.name, seed, index, level, split, lambda chance: _make(chance, level))

    def check(self, problem: Problem, text: str) -> Score:
        return matches(problem, text, NUMBER)


def _make(chance: random.Random, level: int) -> Problem:
    low, high = (10 ** (level - 1) if level > 1 else 0), 10**level
    left, right = chance.randrange(low, high), chance.randrange(low, high)
    columns = _columns(left, right, level)
    if level > LEFT and chance.random() < IN_THE_HEAD:
        columns = columns[:-LEFT]
    question = f"{left}+{right}=?"
    return Problem("addition", question, str(left + right), "".join(columns), level, f"addition:{question}")


def _columns(left: int, right: int, count: int) -> list[str]:
    """Return the written columns, units first: "79:16," is 7 + 9 = 16, whose 1 is carried."""
    columns, carry = [], 0
    for place in range(count):
        upper, lower = left // 10**place % 10, right // 10**place % 10
        total = upper + lower + carry
        columns.append(f"{upper}{lower}{total:02d},")
        carry = total // 10
    return columns
