"""Problems are functions of their numbers, splits are disjoint, worked solutions right, hostile answers wrong."""

import ast
import hashlib
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liaoyuan.errors import LiaoyuanError
from liaoyuan.tasks import TASKS, Problem, Task, find_task, held_out_problems, split_of, spread, to_record
from liaoyuan.tasks.countdown import read_answer
from tests.tasks.checkers import CHECKERS, value_of

SPLITS = ("train", "validation", "test")
AS_EVER = {  # what the quickstart and its figures rest on: SHA-256 of many problems of each
    "addition": "b38d3d05370a4368b32db66f7347ecb914e3fe87945700f3d0507ef74040eba5",
    "modular": "76f1c6e12a6e20ffc9d4a58a0f61fd82eb6fc94f1e2ec03181f6b647c658cd14",
    "countdown": "bd9550a4a9249103cee653264f8f3a1b950df3456a599f85a460f99250dc6997",
}
HOSTILE = [
    "",
    " ",
    "?",
    "1 or 2",
    "9**9**9",
    "1e5",
    "١٢",
    "１２",
    "0x1f",
    "+5",
    "--5",
    "None",
    "__import__('os')",
    "1_000",
    "5.0",
    "5\n6",
    "(" * 5000,
    "9" * 5000,
    "1+" * 3000 + "1",
]


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
class TestEveryTask:
    def test_same_numbers_same_problem(self, task: Task) -> None:
        for level in task.levels[:3]:
            assert task.problem(3, 5, level) == task.problem(3, 5, level)
            assert len({task.problem(3, index, level).key for index in range(20)}) > 5

    def test_splits_are_disjoint(self, task: Task) -> None:
        level = task.levels[1]
        keys = {split: {task.problem(1, index, level, split).key for index in range(60)} for split in SPLITS}
        assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
        assert not keys["validation"] & keys["test"]
        assert all(split_of(key) == split for split in SPLITS for key in keys[split])

    def test_the_worked_answer_is_right_and_hostile_text_is_wrong(self, task: Task) -> None:
        for level in task.levels[:4]:
            problem = task.problem(0, level, level)
            assert task.check(problem, problem.answer).is_right
            assert task.check(problem, f" {problem.answer}\n").is_right
            for text in [*HOSTILE, f"{problem.answer} {problem.answer}", f"it is {problem.answer}", problem.question]:
                assert task.check(problem, text).value == 0.0, text

    def test_a_second_checker_agrees(self, task: Task) -> None:
        chance = random.Random(0)
        for index in range(60):
            problem = task.problem(2, index, task.levels[index % min(len(task.levels), 6)])
            assert CHECKERS[problem.task](problem, problem.answer)
            for text in (problem.answer, str(chance.randrange(200)), f"{problem.answer}0", _mutated(problem, chance)):
                assert task.check(problem, text).is_right == CHECKERS[problem.task](problem, text), (problem, text)


@pytest.mark.parametrize("name", AS_EVER)
def test_the_first_three_tasks_give_the_problems_that_they_always_gave(name: str) -> None:
    digest = hashlib.sha256()
    for split in SPLITS:
        for level in TASKS[name].levels:
            for seed in (0, 7, 1_000_000):
                for index in range(8):
                    one = TASKS[name].problem(seed, index, level, split)
                    fields = (one.task, one.question, one.answer, one.thought, str(one.level), one.key)
                    digest.update("\n".join(fields).encode() + b"\0")
    assert digest.hexdigest() == AS_EVER[name]


def test_the_held_out_problems_differ_and_cover_the_levels() -> None:
    problems = held_out_problems(TASKS["addition"], (3, 4), 400)
    assert len({problem.key for problem in problems}) == 400
    assert sum(problem.level == 3 for problem in problems) == 200
    assert all(split_of(problem.key) == "test" for problem in problems)


def test_a_level_with_few_problems_is_no_endless_loop() -> None:
    assert len(spread(TASKS["addition"], 0, (1,), 40, "validation")) == 40


def test_addition_writes_its_columns() -> None:
    """Each column has the digits above each other and their sum with the carry; two at most are left to the head."""
    left_out = Counter[tuple[int, int]]()
    for index in range(300):
        level = 2 + index % 3
        problem = TASKS["addition"].problem(0, index, level)
        left, right = re.findall(r"\d+", problem.question)
        assert int(problem.answer) == int(left) + int(right)
        columns, carry = problem.thought.split(",")[:-1], 0
        for place, column in enumerate(columns, start=1):
            total = int(left[-place]) + int(right[-place]) + carry
            assert column == f"{left[-place]}{right[-place]}{total:02d}"
            carry = total // 10
        left_out[level, level - len(columns)] += 1
    assert left_out[2, 0] == 100
    for level in (3, 4):
        assert left_out[level, 0] + left_out[level, 2] == 100 and 60 <= left_out[level, 2] <= 90


def test_records_teach_fast_and_slow() -> None:
    problem = TASKS["addition"].problem(0, 0, 3)
    slow, fast = to_record(problem), to_record(problem, thinking=False)
    assert slow.messages[1].think == problem.thought and fast.messages[1].think == ""
    assert slow.messages[1].content == fast.messages[1].content == problem.answer


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(LiaoyuanError, match="addition"):
        find_task("additon")


@given(st.text(alphabet="0123456789+-*() x", max_size=80))
def test_the_parser_of_countdown_equals_pythons_on_what_both_accept(text: str) -> None:
    found = read_answer(text)
    if found is not None:
        assert found.value == value_of(ast.parse(re.sub(r"\b0+(?=\d)", "", text.strip()), mode="eval").body)


def _mutated(problem: Problem, chance: random.Random) -> str:
    characters = list(problem.answer)
    characters[chance.randrange(len(characters))] = chance.choice("0123456789+-*()")
    return "".join(characters)
