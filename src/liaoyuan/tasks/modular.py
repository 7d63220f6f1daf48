"""Modular chains: `level` operations from left to right, each result taken modulo 10."""

import random
import re

from liaoyuan.tasks.problem import Problem, Score, Split, draw, matches

MODULUS = 10
DIGIT = re.compile(r"[0-9]")


class Modular:
    """ "7*3+8-5 mod 10=?", worked from left to right; the thought carries the result along: "7*3=1+8=9-5=4"."""

    name = "modular"
    levels = range(2, 9)

    def problem(self, seed: int, index: int, level: int, split: Split = "train") -> Problem:
        return draw(self.name, seed, index, level, split, lambda chance: _make(chance, level))

    def check(self, problem: Problem, text: str) -> Score:
        return matches(problem, text, DIGIT)


def _make(chance: random.Random, level: int) -> Problem:
    value = chance.randrange(MODULUS)
    chain = thought = str(value)
    for _ in range(level):
        operator, operand = chance.choice("+-*"), chance.randrange(1, MODULUS)
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % MODULUS
        chain += f"{operator}{operand}"
        thought += f"{operator}{operand}={value}"
    question = f"{chain} mod {MODULUS}=?"
    return Problem("modular", question, str(value), thought, level, f"modular:{question}")
