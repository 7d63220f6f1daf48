"""Worked solutions are right in every step, as somebody would check them who knows the notation alone."""

import itertools
import re

import pytest

from liaoyuan.tasks import TASKS, Problem
from tests.tasks.checkers import OPERATORS, _fits, _true, zebra_solutions


def problems(name: str, count: int = 60) -> list[Problem]:
    task = TASKS[name]
    return [task.problem(6, index, task.levels[index % len(task.levels)]) for index in range(count)]


@pytest.mark.parametrize("name", ["units", "dates", "countdown"])
def test_every_equation_holds(name: str) -> None:
    for problem in problems(name):
        for left, sign, right, result in re.findall(r"(\d+)([-+*%])(\d+)=(\d+)", problem.thought):
            value = int(left) % int(right) if sign == "%" else OPERATORS[sign](int(left), int(right))
            assert value == int(result), problem
        if name == "units" and problem.level < 4:
            assert problem.thought.endswith(f"={problem.answer};")


def test_the_steps_make_up_the_thought() -> None:
    for name in TASKS:
        assert all("".join(problem.steps) == problem.thought for problem in problems(name, 12))


def test_subtraction_borrows_rightly() -> None:
    for problem in problems("subtraction"):
        left, right = re.findall(r"\d+", problem.question)
        borrowed, digits = 0, ""
        for place, column in enumerate(problem.thought.split(",")[:-1]):
            upper, lower, borrows, rest = map(int, column)
            assert f"{upper}{lower}" == left[-1 - place] + right.zfill(len(left))[-1 - place]
            assert 10 * borrows + upper - lower - borrowed == rest
            borrowed, digits = borrows, f"{rest}{digits}"
        assert int(digits) == int(problem.answer) and borrowed == 0


def test_multiplication_adds_its_rows() -> None:
    for problem in problems("multiplication"):
        left, right = map(int, re.findall(r"\d+", problem.question))
        numbers = [int(row) for row in re.findall(r"(?<=[,;])(\d+);", problem.thought)]
        rows = [left * int(digit) * 10**place for place, digit in enumerate(reversed(str(right)))]
        sums = list(itertools.accumulate(rows))
        wanted = [rows[0], *itertools.chain(*zip(rows[1:], sums[1:], strict=True))][:-1] if len(rows) > 1 else []
        assert numbers == wanted and sums[-1] == int(problem.answer), problem


def test_division_brings_down_digit_by_digit() -> None:
    for problem in problems("division"):
        steps = re.findall(r"(\d+):(\d+)\*(\d+)=(\d+),(\d+);", problem.thought)
        for part, times, by, product, rest in (map(int, step) for step in steps):
            assert times * by == product and part - product == rest < by and times < 10
        quotient = int("".join(step[1] for step in steps))
        assert problem.answer == f"{quotient}r{steps[-1][4]}"


def test_sorting_inserts_one_number_after_another() -> None:
    for problem in problems("sorting"):
        given = [int(number) for number in problem.question.split()[1:]]
        for place, step in enumerate(problem.steps, start=2):
            assert [int(number) for number in step[:-1].split()] == sorted(given[:place])
        assert len(problem.steps) == len(given) - 2


def test_letters_are_counted_along() -> None:
    for problem in problems("letters"):
        letter, word = problem.question.removesuffix("=?").split(" in ")
        assert problem.thought == "".join(f"{one}{word[: place + 1].count(letter)}" for place, one in enumerate(word))


def test_maze_thoughts_are_fields_a_move_further_each_time() -> None:
    for problem in problems("maze"):
        rows = problem.question.split("/")
        parts = [[(int(y), int(x)) for y, x in step.rstrip(";").split()] for step in problem.steps]
        assert rows[parts[0][0][0]][parts[0][0][1]] == "E" and rows[parts[-1][0][0]][parts[-1][0][1]] == "S"
        assert len(parts) == len(problem.answer) + 1
        for nearer, further in itertools.pairwise(parts):
            assert all(rows[y][x] != "#" and any(abs(y - v) + abs(x - u) == 1 for v, u in nearer) for y, x in further)


def test_liars_are_supposed_in_order_and_every_end_is_a_contradiction() -> None:
    for problem in problems("liars", 24):
        said = [part.split(":") for part in problem.question.split(",")]
        names = [name for name, _ in said]

        def agrees(kinds: tuple[str, ...], name: str, said: list[list[str]] = said, names: list[str] = names) -> bool:
            place = names.index(name)
            return (kinds[place] == "T") == _true(said[place][1], dict(zip(names, kinds, strict=True)))

        ends = [step.rstrip(",").split("!") for step in problem.steps if "!" in step]
        for supposed, name in ends:
            left = len(names) - len(supposed)
            assert not any(agrees((*supposed, *rest), name) for rest in itertools.product("TL", repeat=left)), problem
        before = [kinds for kinds in itertools.product("TL", repeat=len(names)) if "".join(kinds) > problem.answer]
        assert all(any("".join(kinds).startswith(end) for end, _ in ends) for kinds in before)


def test_rows_that_end_allow_nobody_to_follow() -> None:
    for problem in problems("ordering", 24):
        names, clues = problem.question.split(": ")[0], problem.question.split(": ")[1].split(",")
        fits = [row for row in itertools.permutations(names) if all(_fits(clue, row) for clue in clues)]
        for step in problem.steps:
            row, ends = step.rstrip(",!"), "!" in step
            assert not ends or not problem.answer.startswith(row)
        assert "".join(fits[0]) == problem.answer and problem.answer[:-1] == problem.steps[-1].rstrip(",")


def test_houses_are_filled_from_the_left_and_every_end_is_a_wrong_way() -> None:
    for problem in problems("zebra", 24):
        size = len(problem.question.split(": ")[0].split(" "))
        assert zebra_solutions(problem.question) == [problem.answer]
        answer = problem.answer.replace(" ", "")
        rows = {step.rstrip(",!"): step.endswith("!,") for step in problem.steps}
        assert not any(answer.startswith(row) for row, is_end in rows.items() if is_end)
        assert all(len(row) == size or row[:-size] in rows for row in rows)
        assert problem.steps[-1] == f"{answer[:-size]},"
