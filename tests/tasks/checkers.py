"""A second judge of every task: it reads the question in the compact notation alone, and tries out what it can."""

import ast
import datetime
import functools
import itertools
import operator
import re
from collections import Counter
from collections.abc import Callable

from liaoyuan.tasks import Problem

OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SMALLEST = {"km": 10**6, "m": 1000, "cm": 10, "mm": 1, "t": 10**6, "kg": 1000, "g": 1}
SMALLEST |= {"d": 86400, "h": 3600, "min": 60, "s": 1, "l": 1000, "ml": 1}


def addition(problem: Problem, text: str) -> bool:
    left, right = problem.question.removesuffix("=?").split("+")
    return text == str(int(left) + int(right))


def subtraction(problem: Problem, text: str) -> bool:
    left, right = map(int, problem.question.removesuffix("=?").split("-"))
    return left >= right and text == str(left - right)


def multiplication(problem: Problem, text: str) -> bool:
    left, right = map(int, problem.question.removesuffix("=?").split("*"))
    return text == str(sum(left for _ in range(right)))


def division(problem: Problem, text: str) -> bool:
    left, right = map(int, problem.question.removesuffix("=?").split("/"))
    found = re.fullmatch(r"(0|[1-9]\d*)r(0|[1-9]\d*)", text)
    return bool(found) and int(found[1]) * right + int(found[2]) == left and int(found[2]) < right


def modular(problem: Problem, text: str) -> bool:
    value, rest = int(problem.question[0]), re.findall(r"([+*-])(\d)", problem.question.split(" ")[0])
    for sign, digit in rest:
        value = OPERATORS[sign](value, int(digit)) % 10
    return text == str(value)


def countdown(problem: Problem, text: str) -> bool:
    if "**" in text or "//" in text:
        return False
    try:
        found = value_of(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, AttributeError, TypeError):
        return False
    numbers, target = problem.question.split(" > ")
    return found == int(target) and sorted(map(int, re.findall(r"\d+", text))) == sorted(map(int, numbers.split()))


def value_of(node: ast.expr) -> int:
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int)
        return node.value
    names: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
    assert isinstance(node, ast.BinOp | ast.UnaryOp | ast.Call)
    if not isinstance(node, ast.BinOp):
        raise TypeError("no sign before a number, no call")
    return OPERATORS[names[type(node.op)]](value_of(node.left), value_of(node.right))


def sorting(problem: Problem, text: str) -> bool:
    given, found = problem.question.split(" ")[1:], text.split(" ")
    return Counter(given) == Counter(found) and all(int(a) <= int(b) for a, b in itertools.pairwise(found))


def letters(problem: Problem, text: str) -> bool:
    letter, word = problem.question.removesuffix("=?").split(" in ")
    return text == str(sum(one == letter for one in word))


def units(problem: Problem, text: str) -> bool:
    given, asked = problem.question.split("=?")[0], problem.question.split("=?")[1].split("?")
    total = sum(int(number) * SMALLEST[unit] for number, unit in re.findall(r"(\d+)([a-z]+)", given))
    if len(asked) == 1:
        return text.removesuffix(asked[0]).isdigit() and (
            text.removesuffix(asked[0]) == str(total // SMALLEST[asked[0]]) and total % SMALLEST[asked[0]] == 0
        )
    found = re.fullmatch(rf"(\d+){asked[0]}(\d+){asked[1]}", text)
    if not found or any(str(int(number)) != number for number in found.groups()):
        return False
    large, small = int(found[1]) * SMALLEST[asked[0]], int(found[2]) * SMALLEST[asked[1]]
    return large + small == total and small < SMALLEST[asked[0]]


def dates(problem: Problem, text: str) -> bool:
    days = [datetime.date.fromisoformat(day) for day in re.findall(r"\d{4}-\d\d-\d\d", problem.question)]
    if problem.question.startswith("leap"):
        first, last = map(int, re.findall(r"\d{4}", problem.question))
        years = range(first, last + 1)
        return text == str(sum((datetime.date(y, 3, 1) - datetime.date(y, 2, 1)).days == 29 for y in years))
    if added := re.search(r"\+(\d+)d=", problem.question):
        return text == (days[0] + datetime.timedelta(int(added[1]))).isoformat()
    if problem.question.endswith("?d"):
        return text == str((days[0] - days[1]).days)
    if len(days) == 2:
        assert problem.question[11:14] == f"{days[0]:%a}"
    return text == f"{days[-1]:%a}"


def maze(problem: Problem, text: str) -> bool:
    """Relax all edges until nothing changes (Bellman 1958), and walk the path with a pair of coordinates."""
    rows = problem.question.split("/")
    cells = {(y, x): mark for y, row in enumerate(rows) for x, mark in enumerate(row) if mark != "#"}
    start, end = (next(cell for cell, mark in cells.items() if mark == wanted) for wanted in "SE")
    distance = dict.fromkeys(cells, 999) | {start: 0}
    for _ in cells:
        for y, x in cells:
            around = ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1))
            distance[y, x] = min(distance[y, x], *(1 + distance.get(cell, 999) for cell in around))
    y, x = start
    for move in text:
        y, x = y + (move == "D") - (move == "U"), x + (move == "R") - (move == "L")
        if (y, x) not in cells or move not in "UDLR":
            return False
    return (y, x) == end and len(text) == distance[end]


def liars(problem: Problem, text: str) -> bool:
    said = [part.split(":") for part in problem.question.split(",")]
    names = [name for name, _ in said]
    found = [
        kinds
        for kinds in itertools.product("TL", repeat=len(names))
        if all(
            (kinds[place] == "T") == _true(words, dict(zip(names, kinds, strict=True)))
            for place, (_, words) in enumerate(said)
        )
    ]
    assert len(found) == 1, "exactly one solution"
    return text == "".join(found[0])


def _true(words: str, kinds: dict[str, str]) -> bool:
    if words[0] == "#":
        return list(kinds.values()).count("L") == int(words[1])
    if words[1] in "+-":
        return kinds[words[0]] == {"+": "T", "-": "L"}[words[1]]
    return (kinds[words[0]] == kinds[words[2]]) == (words[1] == "=")


def ordering(problem: Problem, text: str) -> bool:
    names, clues = problem.question.split(": ")[0], problem.question.split(": ")[1].split(",")
    found = ["".join(row) for row in itertools.permutations(names) if all(_fits(clue, row) for clue in clues)]
    assert len(found) == 1, "exactly one order"
    return text == found[0]


def _fits(clue: str, row: tuple[str, ...]) -> bool:
    one, kind, other = clue
    first, second = row.index(one) + 1, int(other) if other.isdigit() else row.index(other) + 1
    away = second - first
    return {
        "<": away > 0,
        "|": away == 1,
        "&": away in (1, -1),
        "!": away not in (1, -1),
        "=": away == 0,
        "^": away != 0,
    }[kind]


def zebra(problem: Problem, text: str) -> bool:
    found = zebra_solutions(problem.question)
    assert len(found) == 1, "exactly one grid"
    return text == found[0]


def zebra_solutions(question: str) -> list[str]:
    """Return every way to fill the houses of which no clue is broken, each as the letters house by house."""
    sorts, clues = question.split(": ")[0], question.split(": ")[1].split(",")
    found = (places for places in _streets(sorts) if all(_lives(clue, places) for clue in clues))
    return [_street(sorts.split(" "), places) for places in found]


@functools.cache
def _streets(sorts: str) -> list[dict[str, int]]:
    """Return in which house each letter is, and each house's number, for all ways to fill the houses."""
    every = itertools.product(*(itertools.permutations(sort) for sort in sorts.split(" ")))
    return [{thing: place for row in (*rows, "1234") for place, thing in enumerate(row, 1)} for rows in every]


def _street(sorts: list[str], places: dict[str, int]) -> str:
    return " ".join("".join(min(sort, key=lambda one: abs(places[one] - house)) for sort in sorts)
                    for house in range(1, len(sorts[0]) + 1))  # fmt: skip


def _lives(clue: str, places: dict[str, int]) -> bool:
    one, kind, other = clue
    away = places[other] - places[one]
    if kind == "<":
        return away > 0
    if kind == "|":
        return away == 1
    return away in (1, -1) if kind == "&" else (away == 0) == (kind == "=")


CHECKERS: dict[str, Callable[[Problem, str], bool]] = {
    one.__name__: one
    for one in (
        *(addition, subtraction, multiplication, division, modular, countdown, sorting, letters, units, dates),
        *(maze, liars, ordering, zebra),
    )
}
