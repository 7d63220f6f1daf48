"""What a model was trained on is known again, in other words and after a stop, and nothing else is taken for it."""

import json
from pathlib import Path

import pytest

from liaoyuan.data import Message, Record
from liaoyuan.errors import LiaoyuanError
from liaoyuan.tasks import TASKS, find_task, measured_problems, open_task, to_record
from liaoyuan.tasks.seen import (
    NAME,
    Seen,
    mark,
    marks_of,
    marks_of_record,
    normalised,
    read_seen,
    refuse_seen,
    seen_among,
)

ADDITION = TASKS["addition"]


def learned(folder: Path) -> set[int]:
    return set(read_seen(folder).tolist())


@pytest.mark.parametrize(
    "same",
    [
        ["3+4=?", " 3 + 4 = ?\n", "３＋４＝？", "3\t+\u30004=?"],
        ["How many is 3 plus 4?", "how many  is 3 plus 4 ?", "HOW MANY IS 3\nPLUS 4?", "How many is ３ plus ４?"],
        ["3加4等于多少？", "3 加 4 等于多少 ?", "３加４等于多少？", " 3加4\n等于多少?"],
        ["sort 3 5 8", "Sort  3 5\n8", "sort ３ ５ ８"],
    ],
)
def test_near_duplicates_are_one(same: list[str]) -> None:
    assert len({mark(text) for text in same}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3 5", "35"),
        ("1 12 > 13", "11 2 > 13"),
        ("to get her", "together"),
        ("3-4", "3+4"),
        ("是3", "是4"),
        ("A!B", "AB"),
    ],
)
def test_what_differs_stays_apart(one: str, other: str) -> None:
    assert mark(one) != mark(other)


def test_normalised_text_stays_as_it_is() -> None:
    for text in ("3 + 4 = ?", "Wie viel? ３ ＋ ４", "3 加 4", "a  b", "ẞ ss"):
        assert normalised(normalised(text)) == normalised(text)


@pytest.mark.parametrize("name", TASKS)
def test_different_problems_have_different_marks(name: str) -> None:
    for wording in ("", "-en", "-zh"):
        task, keys = find_task(name + wording), dict[int, str]()
        for index in range(200):
            problem = task.problem(8, index, task.levels[index % len(task.levels)])
            for one in marks_of(problem):
                assert keys.setdefault(one, problem.key) == problem.key


def test_a_problem_learned_in_chinese_is_known_in_english_and_in_notation(tmp_path: Path) -> None:
    learned = [to_record(find_task("addition-zh").problem(0, index, 3)) for index in range(20)]
    Seen(tmp_path).add_records(learned)
    for name in ("addition", "addition-en", "addition-zh"):
        asked = [find_task(name).problem(0, index, 3) for index in range(15, 30)]
        assert seen_among(asked, read_seen(tmp_path)) == asked[:5]


def test_records_of_a_user_are_known_by_what_is_asked(tmp_path: Path) -> None:
    question = ADDITION.problem(0, 0, 3).question
    record = Record(
        id="mine/7",
        messages=(Message(role="user", content=f" {question} "), Message(role="assistant", content="?")),
    )
    assert mark(question) in marks_of_record(record)
    Seen(tmp_path).add_records([record])
    assert len(seen_among([ADDITION.problem(0, 0, 3)], read_seen(tmp_path))) == 1


def test_questions_of_a_file_are_known_without_the_instruction_that_a_task_adds(tmp_path: Path) -> None:
    rows = [{"question": f"What is {number} times 7?", "answer": 7 * number} for number in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["[[parts]]", 'data = "data.jsonl"', 'instruction = "Write the number alone."']
    (tmp_path / "task.toml").write_text("\n".join(lines))
    asked = measured_problems(open_task(tmp_path / "task.toml").task, (0,), 100)
    assert all(problem.question.endswith("alone.") for problem in asked) and len(asked) > 1
    said = asked[0].question.split("\n")[0]
    Seen(tmp_path).add_records([Record(id="7", messages=(Message(role="user", content=f"{said.upper()} "),))])
    assert seen_among(asked, read_seen(tmp_path)) == asked[:1]


def test_fast_and_slow_records_are_one_problem() -> None:
    problem = find_task("maze-zh").problem(0, 0, 2)
    slow, fast = to_record(problem), to_record(problem, thinking=False)
    assert slow.id == f"{problem.key}/slow-zh" and fast.id == f"{problem.key}/fast-zh"
    assert marks_of_record(slow) == marks_of_record(fast) and set(marks_of(problem)) <= set(marks_of_record(slow))


def test_it_is_only_ever_added_to_and_a_torn_end_is_cut_off(tmp_path: Path) -> None:
    steps = [[ADDITION.problem(step, index, 3) for index in range(4)] for step in range(6)]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    seen = Seen(whole)
    for problems in steps:
        before = (whole / NAME).read_bytes()
        seen.add(problems)
        seen.add(problems)
        assert (whole / NAME).read_bytes().startswith(before)
        assert len((whole / NAME).read_bytes()) == 8 + 8 * len(seen.marks)
    for problems in steps[:4]:
        Seen(stopped).add(problems)
    with (stopped / NAME).open("ab") as file:
        file.write(b"torn")  # killed while it wrote
    again = Seen(stopped)
    for problems in steps[3:]:  # the fourth step is repeated
        again.add(problems)
    assert learned(stopped) == learned(whole) == set(seen.marks.tolist())
    assert len((stopped / NAME).read_bytes()) % 8 == 0


def test_a_model_has_learned_what_the_one_before_it_had(tmp_path: Path) -> None:
    first, second = ADDITION.problem(0, 0, 3), ADDITION.problem(0, 1, 3)
    Seen(tmp_path / "sft").add([first])
    Seen(tmp_path / "rl", tmp_path / "sft").add([second])
    assert learned(tmp_path / "rl") == {*marks_of(first), *marks_of(second)}


def test_a_prompt_that_was_trained_on_is_refused_and_counted(tmp_path: Path) -> None:
    asked = [ADDITION.problem(0, index, 3, "test") for index in range(10)]
    assert refuse_seen(tmp_path, asked) == 0  # a model of which nothing is known
    Seen(tmp_path).add(asked[:3])
    with pytest.raises(LiaoyuanError, match=r"3 of these 10 problems.*--seen"):
        refuse_seen(tmp_path, asked)
    assert refuse_seen(tmp_path, asked, allow=True) == 3
    assert refuse_seen(tmp_path, asked[3:]) == 0


def test_another_file_is_not_taken_for_the_list(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("not what it says")
    with pytest.raises(LiaoyuanError, match="no list of what a model was trained on"):
        read_seen(tmp_path)
