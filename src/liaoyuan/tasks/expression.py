"""Expressions of +, -, *, / and brackets: answers of countdown, and right answers of word problems: "160/(1-20%)".

A parser of our own with hard limits; nothing is ever handed to `eval`.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 200
DEEPEST = 16  # nested brackets
LARGEST = 10**40
TOKEN = re.compile(r"\s*((?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)%?|\*\*|[-+*/()])")

Exact = int | Fraction  # whole numbers stay so until something is divided, as that is several times as fast


@dataclass(frozen=True)
class Expression:
    """What an expression is worth, and the numbers that stand in it."""

    value: Exact
    numbers: tuple[Exact, ...]


class MalformedError(ValueError):
    """The text is no expression."""


def read_expression(text: str, token: re.Pattern[str] = TOKEN, deepest: int = DEEPEST) -> Expression | None:
    """Return what `text` is; None if it is no expression, divides by nought or leaves the limits.

    "1(5/6)" is a mixed number, as textbooks write it. token: its only group is a number, an operator or a bracket.
    """
    if len(text) > LONGEST:
        return None
    tokens = token.findall(text)
    if not tokens or token.sub("", text).strip():
        return None
    reader = _Reader(tokens, deepest)
    try:
        value = reader.sum(0)
    except (MalformedError, ZeroDivisionError):
        return None
    return Expression(value, tuple(reader.numbers)) if reader.place == len(tokens) else None


class _Reader:
    """Recursive descent: sum := product (+|- product)*, product := power (*|/ power)*, power := atom (** atom)?."""

    def __init__(self, tokens: list[str], deepest: int) -> None:
        self.tokens, self.place, self.deepest = tokens, 0, deepest
        self.numbers = list[Exact]()

    def sum(self, depth: int) -> Exact:
        sign = -1 if self._next() == "-" else 1
        if self._next() in ("+", "-"):
            self._take()
        value = sign * self._product(depth)
        while self._next() in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            value = _bounded(value + sign * self._product(depth))
        return value

    def _product(self, depth: int) -> Exact:
        value = self._power(depth)
        while self._next() in ("*", "/"):
            operator, operand = self._take(), self._power(depth)
            value = _bounded(value * operand if operator == "*" else Fraction(value) / operand)
        return value

    def _power(self, depth: int) -> Exact:
        value = self._atom(depth)
        if self._next() != "**":
            return value
        self._take()
        exponent = self._atom(depth)
        if exponent not in (1, 2, 3):
            raise MalformedError
        return _bounded(value ** int(exponent))

    def _atom(self, depth: int) -> Exact:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            value = int(token) if token.isdigit() else Fraction(token.rstrip("%")) / (100 if token[-1] == "%" else 1)
            self.numbers.append(value)
            return value + self._bracket(depth) if self._is_mixed(token) else value
        if token != "(":
            raise MalformedError
        self.place -= 1
        return self._bracket(depth)

    def _is_mixed(self, token: str) -> bool:
        ahead = self.tokens[self.place : self.place + 5]
        return token.isdigit() and len(ahead) == 5 and [ahead[0], ahead[2], ahead[4]] == ["(", "/", ")"]

    def _bracket(self, depth: int) -> Exact:
        if self._take() != "(" or depth >= self.deepest:
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


def _bounded(value: Exact) -> Exact:
    if not -LARGEST <= value <= LARGEST or value.denominator > LARGEST:
        raise MalformedError
    return value
