"""Expressions of +, -, *, / and brackets, as right answers of word problems are at times: "160/(1-20%)".

A parser of our own with hard limits; nothing is ever handed to `eval`.
"""

import re
from fractions import Fraction

from liaoyuan.tasks.rewards.numbers import plain

LONGEST = 200
DEEPEST = 16  # nested brackets
LARGEST = Fraction(10) ** 40
TOKEN = re.compile(r"\s*((?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)%?|\*\*|[-+*/()])")


class MalformedError(ValueError):
    """The text is no expression."""


def value_of(text: str) -> Fraction | None:
    """Return an expression's exact value; None if it is no expression, divides by nought or leaves the limits.

    "1(5/6)" is a mixed number, as textbooks write it.
    """
    text = plain(text)
    if len(text) > LONGEST:
        return None
    tokens = TOKEN.findall(text)
    if not tokens or TOKEN.sub("", text).strip():
        return None
    reader = _Reader(tokens)
    try:
        value = reader.sum(0)
    except (MalformedError, ZeroDivisionError):
        return None
    return value if reader.place == len(tokens) else None


class _Reader:
    """Recursive descent: sum := product (+|- product)*, product := power (*|/ power)*, power := atom (** atom)?."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.place = tokens, 0

    def sum(self, depth: int) -> Fraction:
        sign = -1 if self._next() == "-" else 1
        if self._next() in ("+", "-"):
            self._take()
        value = sign * self._product(depth)
        while self._next() in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            value = _bounded(value + sign * self._product(depth))
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._power(depth)
        while self._next() in ("*", "/"):
            operator, operand = self._take(), self._power(depth)
            value = _bounded(value * operand if operator == "*" else value / operand)
        return value

    def _power(self, depth: int) -> Fraction:
        value = self._atom(depth)
        if self._next() != "**":
            return value
        self._take()
        exponent = self._atom(depth)
        if exponent not in (1, 2, 3):
            raise MalformedError
        return _bounded(value ** int(exponent))

    def _atom(self, depth: int) -> Fraction:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            value = Fraction(token.rstrip("%")) / (100 if token.endswith("%") else 1)
            return value + self._bracket(depth) if self._is_mixed(token) else value
        if token != "(":
            raise MalformedError
        self.place -= 1
        return self._bracket(depth)

    def _is_mixed(self, token: str) -> bool:
        ahead = self.tokens[self.place : self.place + 5]
        return token.isdigit() and len(ahead) == 5 and [ahead[0], ahead[2], ahead[4]] == ["(", "/", ")"]

    def _bracket(self, depth: int) -> Fraction:
        if self._take() != "(" or depth >= DEEPEST:
            raise MalformedError
        value = self.sum(depth + 1)
        if self._take() != ")":
            raise MalformedError
        return value

    def _next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def _take(self) -> str:
        token = self._next()
        if not token:
            raise MalformedError
        self.place += 1
        return token


def _bounded(value: Fraction) -> Fraction:
    if abs(value) > LARGEST or value.denominator > LARGEST:
        raise MalformedError
    return value
