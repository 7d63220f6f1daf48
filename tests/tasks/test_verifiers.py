"""What is right and what is not, where more than one answer could be, and at the edges of the calendar."""

import datetime
import itertools
import time

import pytest

from liaoyuan.tasks import TASKS, Problem, find_task
from liaoyuan.tasks.dates import day_of_year, days_of, is_leap, weekday
from tests.tasks.checkers import CHECKERS


def test_any_shortest_path_is_right_and_no_other() -> None:
    maze = Problem("maze", "S../.../..E", "DDRR", "", 1, "maze:S../.../..E")
    paths = ["".join(path) for length in range(1, 7) for path in itertools.product("UDLR", repeat=length)]
    right = [path for path in paths if TASKS["maze"].check(maze, path).is_right]
    assert sorted(right) == sorted({"".join(path) for path in itertools.permutations("DDRR")})
    reasons = {path: TASKS["maze"].check(maze, path).reason for path in ("DDRU", "RRR", "DRDLRR", "drdr")}
    assert reasons == {
        "DDRU": "it does not end at E",
        "RRR": "it leaves the grid or enters a wall",
        "DRDLRR": "it is not a shortest path",
        "drdr": "no path of the letters U, D, L and R",
    }


def test_walls_and_edges_are_not_crossed() -> None:
    for content, wrong in (("S#E/...", ["RR"]), ("S.#/#E.", ["RRDL", "DR"]), (".S./.E./###", ["LLD", "RRRLDL"])):
        maze = Problem("maze", content, "", "", 1, f"maze:{content}")
        for path in wrong:
            assert not TASKS["maze"].check(maze, path).is_right and not CHECKERS["maze"](maze, path)


def test_countdown_takes_any_expression_of_the_numbers() -> None:
    problem = Problem("countdown-en", "?", "8*(5-2)", "", 3, "countdown:2 5 8 > 24")
    for text in ("8*(5-2)", "(5-2)*8", " ( 5 - 2 ) * 8 "):
        assert find_task("countdown-en").check(problem, text).is_right
    for text in ("24", "8*5-2", "8*3", "8*(5-2)+0", "8×(5-2)"):
        assert not find_task("countdown-en").check(problem, text).is_right


@pytest.mark.parametrize("year", [1901, 1999, 2000, 2001, 2004, 2099, 2100])
def test_every_day_of_a_year_has_its_weekday_and_its_number(year: int) -> None:
    for number in range(366 if is_leap(year) else 365):
        day = datetime.date(year, 1, 1) + datetime.timedelta(number)
        assert weekday((year, day.month, day.day)) == day.weekday()
        assert day_of_year((year, day.month, day.day)) == number + 1
    assert sum(days_of(year, month) for month in range(1, 13)) == number + 1


def test_centuries_are_leap_years_only_every_fourth_time() -> None:
    assert [year for year in (1896, 1900, 1904, 2000, 2004, 2096, 2100) if is_leap(year)] == [
        1896,
        1904,
        2000,
        2004,
        2096,
    ]
    task = TASKS["dates"]
    asked = [task.problem(0, index, 2) for index in range(400)]
    across = [problem for problem in asked if "1900" in problem.thought or "2100" in problem.thought]
    assert across and all("1900!," in problem.thought or "2100!," in problem.thought for problem in across)
    assert all(CHECKERS["dates"](problem, problem.answer) for problem in across)


def test_hostile_length_costs_no_time() -> None:
    start = time.process_time()
    for name in TASKS:
        for wording in ("", "-en", "-zh"):
            task = find_task(name + wording)
            problem = task.problem(0, 0, task.levels[-1])
            for text in ("1 " * 10**6, "1" * 10**6, "(" * 10**6, "U" * 10**6, "1," * 120, "((1" * 60, "1 d " * 60):
                assert task.check(problem, text).value == 0.0
    assert time.process_time() - start < 2.0
