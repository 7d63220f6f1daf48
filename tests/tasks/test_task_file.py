"""Task files: parts by weight, rewards in a sum, and whatever is wrong is said with its place."""

from collections import Counter
from pathlib import Path

import pytest

from liaoyuan.errors import LiaoyuanError
from liaoyuan.tasks import TASKS, Right, Rollout, open_task, split_of
from liaoyuan.tasks.rewards import Mixture

ROOT = Path(__file__).parents[2]
BOTH = """
name = "sums"
[[parts]]
task = "addition"
levels = [2, 3]
weight = 3.0
[[parts]]
task = "modular"
levels = [3, 4]
"""


def opened(tmp_path: Path, text: str):  # type: ignore[no-untyped-def]
    (tmp_path / "task.toml").write_text(text, encoding="utf-8")
    return open_task(tmp_path / "task.toml")


def test_a_name_opens_a_task_whose_reward_is_whether_it_is_right() -> None:
    for name in TASKS:
        assignment = open_task(name)
        assert assignment.task.name == name and assignment.reward == assignment.right


def test_parts_are_drawn_by_weight_where_they_have_the_level(tmp_path: Path) -> None:
    task = opened(tmp_path, BOTH).task
    assert task.name == "sums" and list(task.levels) == [2, 3, 4]
    drawn = {level: Counter(task.problem(0, index, level).task for index in range(400)) for level in task.levels}
    assert drawn[2] == {"addition": 400} and drawn[4] == {"modular": 400}
    assert 270 <= drawn[3]["addition"] <= 330
    assert task.problem(7, 3, 3) == task.problem(7, 3, 3)
    with pytest.raises(LiaoyuanError, match="sums has no level 9"):
        task.problem(0, 0, 9)


def test_each_part_judges_its_own_problems_and_splits_stay_disjoint(tmp_path: Path) -> None:
    assignment = opened(tmp_path, BOTH)
    for index in range(40):
        problem = assignment.task.problem(0, index, 3, "test")
        assert split_of(problem.key) == "test"
        assert assignment.task.check(problem, problem.answer).is_right
        assert assignment.task.check(problem, f"{problem.answer}1").value == 0.0


def test_rewards_make_a_sum_and_evaluation_counts_what_is_right_alone(tmp_path: Path) -> None:
    text = BOTH + '[[rewards]]\nname = "right"\n[[rewards]]\nname = "length"\nlimit = 10\nsoft = 4\nweight = 0.5\n'
    assignment = opened(tmp_path, text)
    problem = assignment.task.problem(0, 0, 3)
    rollout = Rollout(problem, "", problem.answer, length=8)
    assert isinstance(assignment.reward, Mixture)
    assert assignment.reward(rollout).value == 0.75 and assignment.right(rollout).value == 1.0


def test_a_function_is_found_beside_the_task_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def short(text):\n    return -len(text)\n", encoding="utf-8")
    assignment = opened(tmp_path, BOTH + '[[rewards]]\nname = "function"\npath = "mine.py:short"\n')
    problem = assignment.task.problem(0, 0, 3)
    assert assignment.reward(Rollout(problem, "", "four")).value == -4.0


def test_one_reward_of_weight_one_is_itself(tmp_path: Path) -> None:
    assert isinstance(opened(tmp_path, BOTH + '[[rewards]]\nname = "right"\n').reward, Right)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'parts' is missing"),
        ("parts = []", "parts"),
        ("[[part]]\ntask = 'addition'", "did you mean 'parts'"),
        ("[[parts]]\ntsk = 'addition'", "Unknown key 'tsk' in .*task.toml, part 1, did you mean 'task'"),
        ("[[parts]]\ntask = 'additon'", "did you mean 'addition'"),
        (
            "[[parts]]\ntask = 'addition'\n[[parts]]\ntask = 'addition'\nlevels = [99]",
            "part 2: addition has the levels 1 to",
        ),
        ("[[parts]]\nweight = 1.0", "part 1: give either `task`"),
        ("[[parts]]\ntask = 'addition'\ndata = 'x.jsonl'", "give either `task`"),
        ("[[parts]]\ntask = 'addition'\nkind = 'gsm8k'", "`kind` does not go with `task`"),
        ("[[parts]]\ndata = 'x.jsonl'\nlanguage = 'zh'", "`language` does not go with `data`"),
        ("[[parts]]\ntask = 'addition'\nweight = 0", "weight"),
        ("[[parts]]\ndata = 'x.jsonl'", "x.jsonl does not exist"),
        ("[[parts]]\ntask = 'addition'\n[[rewards]]\nname = 'rihgt'", "reward 1: there is no reward 'rihgt'"),
        ("[[parts]]\ntask = 'addition'\n[[rewards]]\nweight = 1", "'name' is missing in .*reward 1"),
        ("[[parts]]\ntask = 'addition'\n[[rewards]]\nname = 'right'\nx = 1", "'right' has no option 'x'"),
        ("[[parts]]\ntask = 'addition'\n[[rewards]]\nname = 'length'\nlimit = 1\nsoft = 1\nwieght = 2", "wieght"),
        ("[[parts", "cannot be read as TOML"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LiaoyuanError, match=message):
        opened(tmp_path, text)


def test_what_is_no_task_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text("{}", encoding="utf-8")
    for name, message in ((tmp_path / "task.json", "must end with .toml"), (tmp_path / "no.toml", "does not exist")):
        with pytest.raises(LiaoyuanError, match=message):
            open_task(name)
    with pytest.raises(LiaoyuanError, match="did you mean 'addition'"):
        open_task("adition")
    with pytest.raises(LiaoyuanError, match="no use for"):
        open_task("addition", tmp_path / "x.jsonl")


def test_data_of_the_command_line_stands_for_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text('[[parts]]\ndata = "missing.jsonl"\n', encoding="utf-8")
    (tmp_path / "mine.jsonl").write_text('{"question": "6*7?", "answer": "42"}\n', encoding="utf-8")
    assert list(open_task(tmp_path / "t.toml", tmp_path / "mine.jsonl").task.levels) == [0]
    (tmp_path / "two.toml").write_text(BOTH, encoding="utf-8")
    with pytest.raises(LiaoyuanError, match="has 0 parts with `data`"):
        open_task(tmp_path / "two.toml", tmp_path / "mine.jsonl")


def test_the_shipped_files_open_or_lack_only_their_data() -> None:
    for path in sorted((ROOT / "tasks").glob("*.toml")):
        if path.name == "arithmetic.toml":
            assert len(open_task(path).task.levels) == 3
        else:
            with pytest.raises(LiaoyuanError, match="does not exist"):
                open_task(path)
