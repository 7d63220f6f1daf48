"""`liaoyuan tasks` lists tasks, shows examples and writes worked solutions that SFT reads."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from liaoyuan.cli.tasks import app
from liaoyuan.data import read_records
from liaoyuan.errors import LiaoyuanError
from liaoyuan.tasks import TASKS, find_task, solution_records


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_the_list_has_every_task_with_its_levels() -> None:
    shown, rows = invoke(), json.loads(invoke("--json"))
    for task, row in zip(TASKS.values(), rows, strict=True):
        assert f"{task.name} " in shown and row["task"] == task.name
        assert row["levels"] == [task.levels[0], task.levels[-1]] and row["wordings"] == ["compact", "en", "zh"]


def test_examples_have_question_thought_and_answer() -> None:
    problem = find_task("maze-zh").problem(2, 0, 3)
    shown = invoke("show", "maze-zh", "--level", "3", "--seed", "2")
    assert problem.thought in shown and problem.answer in shown and problem.question.split("\n")[0] in shown
    (row,) = json.loads(invoke("show", "maze-zh", "--level", "3", "--seed", "2", "--json"))
    assert row["question"] == problem.question and row["key"] == problem.key
    assert len(json.loads(invoke("show", "liars", "--count", "2", "--json"))) == 2 * len(TASKS["liars"].levels)


def test_worked_solutions_are_records(tmp_path: Path) -> None:
    out = tmp_path / "solutions.jsonl"
    given = ["--levels", "2-3", "--count", "40", "--fast-every", "4", "--out", str(out)]
    assert "50 records of 40 different problems" in invoke("write", "addition", *given, "--seed", "5")
    assert read_records(out) == solution_records(TASKS["addition"], (2, 3), 40, 5, 4)


def test_hurried_solutions_leave_the_last_steps_out_and_are_right_all_the_same(tmp_path: Path) -> None:
    task, out = TASKS["subtraction"], tmp_path / "solutions.jsonl.zst"
    invoke("write", "subtraction", "--levels", "4", "--count", "200", "--hurried", "0.75", "--out", str(out))
    written = [record.messages[1] for record in read_records(out) if record.messages[1].think]
    short = [message for message in written if message.think.count(",") == 2]
    assert len(written) == 200 and 130 <= len(short) <= 170
    whole = [record.messages[1] for record in solution_records(task, (4,), 200, 0, 0)]
    assert [message.content for message in written] == [message.content for message in whole]
    assert all(long.think.startswith(message.think) for long, message in zip(whole, written, strict=True))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["show", "maz"], "did you mean 'maze'"),
        (["show", "maze-cn"], "did you mean 'maze-zh'|did you mean 'maze-en'"),
        (["show", "maze", "--level", "9"], "maze has the levels 1 to 6, not 9"),
        (["write", "liars", "--levels", "2-9", "--out", "x.jsonl"], "liars has the levels 1 to 4, not 5"),
        (["write", "liars", "--levels", "hard", "--out", "x.jsonl"], "must look like 2-4 or 3"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], reason: str) -> None:
    with pytest.raises(LiaoyuanError, match=reason):
        invoke(*arguments)
