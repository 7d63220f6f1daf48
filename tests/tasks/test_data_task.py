"""Tasks from files: each layout is read, splits do not share a question, the order is a shuffle, nothing is silent."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liaoyuan.data import Message, Record, read_examples, write_records
from liaoyuan.data.converting import convert_file
from liaoyuan.data.problem_layouts import PROBLEMS
from liaoyuan.errors import LiaoyuanError
from liaoyuan.safety import require
from liaoyuan.tasks import (
    Problem,
    Right,
    Split,
    Task,
    find_task,
    held_out_problems,
    measured_problems,
    open_task,
    split_of,
    to_record,
)
from liaoyuan.tasks.data_task import DataTask, open_data
from liaoyuan.tasks.parts import PartsTask
from liaoyuan.tasks.seen import Seen, marks_of, marks_of_record, normalised, refuse_seen

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SHARED = Path(os.environ.get("LIAOYUAN_DATA", Path(__file__).parents[3] / "shared" / "data"))
REAL = {  # task file: problems that can be used, levels
    "gsm8k": (7471, (0,)),
    "math": (4456, (1, 2, 3, 4, 5)),
    "ape210k": (4995, (0,)),
    "tal_scq": (2712 + 2611, (0, 1, 2, 3, 4)),
    "strategyqa": (2060, (0,)),
    "folio": (1003, (0,)),
    "mbpp": (347, (0,)),
    "exercism": (140, (0,)),
    "svamp": (1000, (0,)),
    "aqua": (508, (0,)),
}
GOOD = '{"question": "a", "answer": "1"}'
FILES = Path(__file__).parents[2] / "tasks"
ROWS = {
    "gsm8k": ({"question": "How many?", "answer": "6*7 = <<6*7=42>>42\n#### 42"}, "42"),
    "math": (
        {"problem": "$1+1$?", "solution": "\\boxed{1}, so \\boxed{\\frac{4}{2}}.", "level": "Level 3"},
        "\\frac{4}{2}",
    ),
    "ape210k": ({"original_text": "多少？", "ans": "(1/2)", "equation": "x=1/2", "id": "1"}, "(1/2)"),
    "tal_scq": (
        {
            "problem": "Which?",
            "answer_option_list": [[{"aoVal": "A", "content": "1"}], [{"aoVal": "B", "content": "2"}]],
            "answer_value": "B",
            "answer_analysis": ["so"],
            "difficulty": "1",
        },
        "B",
    ),
    "aqua": (
        {"question": "Which?", "options": ["A)1", "B)2"], "rationale": "It is 2.\nAnswer: B", "correct": "B"},
        "B",
    ),
    "strategyqa": ({"qid": "1", "question": "Is it?", "answer": False, "facts": ["It is not."]}, "no"),
    "folio": ({"premises": ["All is."], "conclusion": "It is.", "label": "Uncertain"}, "unknown"),
    "pubmedqa": ({"question": "Is it?", "contexts": ["It may be."], "answer": "maybe", "long_answer": "So."}, "maybe"),
    "svamp": ({"Body": "He has 2.", "Question": "How many?", "Answer": 2.0, "Equation": "2"}, "2"),
    "mbpp": (
        {"text": "Double it.", "code": "def f(x): return x * 2", "test_list": ["assert f(2) == 4"], "task_id": 1},
        '{"tests": ["assert f(2) == 4"]}',
    ),
    "exercism": (
        {
            "task": "double",
            "prompt": "Double it.",
            "solution": "",
            "test_file": "double_test.py",
            "test": "import double",
        },
        '{"source": "import double", "module": "double"}',
    ),
}


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def own(tmp_path: Path, rows: list[object], **keys: object) -> Task:
    write_lines(tmp_path / "own.jsonl", rows)
    lines = ["[[parts]]", 'data = "own.jsonl"', *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    (tmp_path / "own.toml").write_text("\n".join(lines), encoding="utf-8")
    return open_task(tmp_path / "own.toml").task


@pytest.mark.parametrize("name", [layout.name for layout in PROBLEMS])
def test_what_is_learned_from_a_public_set_is_what_its_task_asks(name: str, tmp_path: Path) -> None:
    """And `eval` knows it again, whether the file was learned as it is or converted first."""
    row, answer = ROWS[name]
    write_lines(tmp_path / "rows.jsonl", [row])
    convert_file(tmp_path / "rows.jsonl", tmp_path / "records.jsonl")
    problem, again = (problem_of(tmp_path, file, name) for file in ("rows.jsonl", "records.jsonl"))
    assert (problem.question, problem.answer, problem.thought) == (again.question, again.answer, again.thought)
    for file in ("rows.jsonl", "records.jsonl"):
        ((record,), _) = read_examples(tmp_path / file)
        assert (record.messages[0].content, record.answer) == (problem.question, answer or problem.answer)
        (tmp_path / file.partition(".")[0]).mkdir()
        Seen(tmp_path / file.partition(".")[0]).add_records([record])
        with pytest.raises(LiaoyuanError, match="was trained on 1 of these 1 problems"):
            refuse_seen(tmp_path / file.partition(".")[0], [problem])


def problem_of(folder: Path, file: str, kind: str, check: str = "") -> Problem:
    """Return the one problem of a file; what judges it is not opened, since that may need the jail."""
    made = open_data("own", folder / file, None, kind, False, check, "", lambda _: Right(find_task("addition")))
    (found,) = (problem for problems in made.problems.values() for problem in problems)
    return found


def shipped(name: str, tmp_path: Path) -> list[DataTask]:
    """Open a task file that comes with the project on the real data; return its parts."""
    text = (FILES / f"{name}.toml").read_text(encoding="utf-8")
    for file in re.findall(r'(?:data|test) = "(.+)"', text):
        path = next((path for path in SHARED.glob(f"*/{file}")), None)
        if path is None:
            pytest.skip(f"the real data are not at {SHARED}")
        text = text.replace(f'"{file}"', json.dumps(str(path)))
    if name in ("mbpp", "exercism"):
        try:
            require()
        except LiaoyuanError as error:
            pytest.skip(str(error))
    (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    task = open_task(tmp_path / f"{name}.toml").task
    assert isinstance(task, PartsTask)
    parts = [part.task for part in task.parts if isinstance(part.task, DataTask)]
    assert len(parts) == len(task.parts)
    return parts


def test_every_task_file_with_a_public_set_is_tried() -> None:
    with_data = {path.stem for path in FILES.glob("*.toml") if re.search("^(data|test) =", path.read_text(), re.M)}
    assert with_data - {"own"} == set(REAL)


@pytest.mark.parametrize("name", REAL)
def test_the_real_sets_are_read_whole_and_judge_their_answers(name: str, tmp_path: Path) -> None:
    count, levels = REAL[name]
    found = 0
    for task in shipped(name, tmp_path):
        assert task.levels == levels
        everything = [problem for level in levels for split in SPLITS for problem in task.all(level, split)]
        found += len(everything)
        assert len({problem.key for problem in everything}) == len(everything)
        shares = [sum(task.count(level, split) for level in levels) / len(everything) for split in SPLITS]
        is_test = name in ("svamp", "aqua")
        assert shares == pytest.approx([0, 0, 1] if is_test else [0.8, 0.1, 0.1], abs=0.05)
        for split in () if is_test else SPLITS:
            assert all(split_of(problem.key) == split for level in levels for problem in task.all(level, split))
        if "code" not in task.rewards:
            assert_judged(task, everything[::97])
    assert found == count


def assert_judged(task: DataTask, problems: list[Problem]) -> None:
    """What the set says is right, and what it says of a problem with another answer is wrong."""
    others = [next(one for one in problems if one.answer != problem.answer) for problem in problems]
    forms = ("{}", "The answer is {}.")
    right = task.check_all([(problem, form.format(problem.answer)) for problem in problems for form in forms])
    wrong = task.check_all([(one, f"The answer is {two.answer}.") for one, two in zip(problems, others, strict=True)])
    assert all(score.is_right for score in right), [score for score in right if not score.is_right]
    assert sum(score.value == 0.0 for score in wrong) >= len(wrong) - 1  # two numbers may be equal, written otherwise


@pytest.mark.parametrize("name", ["mbpp", "exercism"])
def test_the_sets_own_programs_are_right_and_an_empty_one_is_wrong(name: str, tmp_path: Path) -> None:
    (task,) = shipped(name, tmp_path)
    (path,) = SHARED.glob(f"*/code_{name.replace('exercism', 'exercism_py').replace('mbpp', 'mbpp_train')}.jsonl.zst")
    problems = {problem.answer: problem for split in SPLITS for problem in task.all(0, split)}
    for record in read_examples(path)[0][:40:20]:
        texts = (record.messages[1].content, "```python\npass\n```")
        right, wrong = task.check_all([(problems[record.answer], text) for text in texts])
        assert right.is_right and wrong.value == 0.0, (right, wrong)


def test_a_split_is_shuffled_whole_and_then_anew(tmp_path: Path) -> None:
    rows: list[object] = [{"question": f"What is {number}+1?", "answer": number + 1} for number in range(200)]
    task = own(tmp_path, rows)
    part = task.parts[0].task  # type: ignore[attr-defined]
    size = part.count(0, "train")
    first = [task.problem(5, index, 0).key for index in range(size)]
    second = [task.problem(5, index, 0).key for index in range(size, 2 * size)]
    assert len(set(first)) == size and set(first) == set(second) and first != second
    assert first == [task.problem(5, index, 0).key for index in range(size)]
    assert first != [task.problem(6, index, 0).key for index in range(size)]


def test_near_copies_fall_together_and_are_asked_once(tmp_path: Path) -> None:
    texts = ["How many is 3 + 4?", "how many  is 3+4 ?", "ＨＯＷ many is ３＋４？", "How many is\n3 + 4?"]
    assert len({normalised(text) for text in texts}) == 1
    task = own(tmp_path, [{"question": text, "answer": "7"} for text in texts])
    assert task.parts[0].task.left_out == {"copy": 3}  # type: ignore[attr-defined]


@given(st.text(max_size=40), st.sampled_from(["  ", "\n", "\u3000"]))
def test_more_spaces_and_capitals_never_change_the_key(text: str, space: str) -> None:
    assert normalised(text) == normalised(f"{space}{text.replace(' ', space)}") == normalised(normalised(text))


def test_a_model_that_learned_the_question_is_known_to_have_seen_the_problem(tmp_path: Path) -> None:
    """Also where the task adds an instruction, or the records were written by somebody else."""
    task = own(tmp_path, [{"question": "What  is 6*7?", "answer": "42"}], instruction="Use ####.")
    (problem,) = (found for split in SPLITS for found in task.parts[0].task.all(0, split))  # type: ignore[attr-defined]
    record = Record(id="1", messages=(Message(role="user", content="what is 6 * 7?"),))
    assert set(marks_of_record(record)) & set(marks_of(problem))
    assert set(marks_of_record(to_record(problem))) & set(marks_of(problem))


def test_copies_that_contradict_each_other_are_both_left_out(tmp_path: Path) -> None:
    rows = [
        {"question": "Which?", "answer": "7"},
        {"question": "which?", "answer": "8"},
        {"question": "b", "answer": "1"},
    ]
    task = own(tmp_path, list(rows))
    part = task.parts[0].task  # type: ignore[attr-defined]
    assert part.left_out == {"a copy has another answer": 2} and sum(part.count(0, split) for split in SPLITS) == 1


def test_a_test_file_is_for_the_test_alone_and_its_copies_are_not_trained_on(tmp_path: Path) -> None:
    rows: list[object] = [{"question": f"What is {number}+1?", "answer": number + 1} for number in range(60)]
    write_lines(
        tmp_path / "test.jsonl", [{"question": "What  is 7+1?", "answer": 8}, {"question": "New?", "answer": 1}]
    )
    task = own(tmp_path, rows, test="test.jsonl")
    part = task.parts[0].task  # type: ignore[attr-defined]
    test = {problem.question for problem in part.all(0, "test")}
    assert {"What  is 7+1?", "New?"} <= test
    trained = {problem.key for split in ("train", "validation") for problem in part.all(0, split)}
    assert normalised("What is 7+1?") not in trained


def test_an_instruction_is_asked_but_is_no_part_of_the_content(tmp_path: Path) -> None:
    rows: list[object] = [{"question": f"What is {number}+1?", "answer": number + 1} for number in range(30)]
    plain = {problem.key for problem in measured_problems(own(tmp_path, rows), [0], 100)}
    asked = measured_problems(own(tmp_path, rows, instruction="Use ####."), [0], 100)
    assert {problem.key for problem in asked} == plain
    assert all(problem.question.endswith("?\nUse ####.") for problem in asked)


def test_test_problems_are_all_there_are_and_no_more_than_asked_for(tmp_path: Path) -> None:
    rows: list[object] = [
        {"question": f"What is {number}+1?", "answer": number + 1, "level": number % 2 + 1} for number in range(300)
    ]
    task = own(tmp_path, rows)
    part = task.parts[0].task  # type: ignore[attr-defined]
    whole = part.count(1, "test") + part.count(2, "test")
    found = measured_problems(task, [1, 2], 10_000)
    assert len({problem.key for problem in found}) == len(found) == whole
    few = measured_problems(task, [1, 2], 10)
    assert len({problem.key for problem in few}) == len(few) == 10
    assert held_out_problems(task, [1], 3) == held_out_problems(task, [1], 3)


def test_records_of_a_task_are_read_back_and_checked_by_it(tmp_path: Path) -> None:
    addition = open_task("addition").task
    problems = [addition.problem(0, index, 3) for index in range(40)]
    write_records(tmp_path / "r.jsonl.zst", [to_record(problem) for problem in problems])
    (tmp_path / "r.toml").write_text('[[parts]]\ndata = "r.jsonl.zst"\n', encoding="utf-8")
    task = open_task(tmp_path / "r.toml").task
    found = task.problem(0, 0, 3)
    assert found.thought and task.check(found, found.answer).is_right
    assert task.check(found, f"#### {found.answer}").value == 0.0  # as the task has it: the answer and nothing else


def test_conversations_are_no_problems_and_are_counted(tmp_path: Path) -> None:
    user, system = Message(role="user", content="6*7?"), Message(role="system", content="Be brief.")
    records = [
        Record(id="1", kind="prompt", messages=(user,), answer="42"),
        Record(id="2", kind="prompt", messages=(system, user), answer="42"),
        Record(id="3", kind="prompt", messages=(user,)),
    ]
    write_records(tmp_path / "own.jsonl", records)
    (tmp_path / "own.toml").write_text('[[parts]]\ndata = "own.jsonl"\n', encoding="utf-8")
    part = open_task(tmp_path / "own.toml").task.parts[0].task  # type: ignore[attr-defined]
    assert part.left_out == {"no single question of the user's with an answer": 2}


def test_bad_rows_are_left_out_where_the_task_file_says_so_and_are_counted(tmp_path: Path) -> None:
    one_option = {**ROWS["tal_scq"][0], "answer_option_list": [[{"aoVal": "A", "content": "Write it below."}]]}
    rows = [ROWS["tal_scq"][0], one_option, {"question": "What is 6*7?", "answer": 42, "thought": "6*7=42", "level": 2}]
    part = own(tmp_path, list(rows), skip_bad=True).parts[0].task  # type: ignore[attr-defined]
    assert part.levels == (1, 2) and sum(part.left_out.values()) == 1
    (problem,) = (found for split in SPLITS for found in part.all(2, split))
    assert (problem.question, problem.answer, problem.thought) == ("What is 6*7?", "42", "6*7=42")


def test_whose_a_problem_is_goes_with_it_into_what_is_learned(tmp_path: Path) -> None:
    whose: dict[str, object] = {"source": "ours", "licence": "CC-BY-4.0"}
    asked = [{"role": "user", "content": f"{number} + 1?"} for number in range(40)]
    rows: list[object] = [
        whose | {"id": str(number), "kind": "prompt", "messages": [one], "answer": str(number + 1)}
        for number, one in enumerate(asked)
    ]
    task = own(tmp_path, rows)
    learned = to_record(task.problem(0, 0, task.levels[0]))
    assert (learned.source, learned.licence) == ("ours", "CC-BY-4.0")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ROWS["mbpp"][0], "```python\ndef f(x): return x * 2\n```"),
        (ROWS["exercism"][0], None),
        ({"question": "Double it.", "answer": '{"tests": ["assert f(2) == 4"]}'}, None),
        (ROWS["gsm8k"][0], "42"),
        (ROWS["folio"][0], "unknown"),
        ({"id": "1", "kind": "prompt", "messages": [{"role": "user", "content": "6*7?"}], "answer": "42"}, "42"),
    ],
)
def test_what_is_learned_of_a_problem_is_what_is_said_and_never_the_tests(
    row: dict[str, object], said: str | None, tmp_path: Path
) -> None:
    write_lines(tmp_path / "rows.jsonl", [row])
    check = "code" if "tests" in str(row.get("answer")) else ""
    problem = problem_of(tmp_path, "rows.jsonl", "", check)
    learned = to_record(problem)
    assert [message.content for message in learned.messages[1:]] == ([said] if said else [])
    assert learned.kind == ("chat" if said else "prompt") and learned.answer == problem.answer


def test_an_answer_of_no_known_problem_is_not_judged(tmp_path: Path) -> None:
    task = own(tmp_path, [{"question": "a", "answer": "1"}])
    stranger = Problem("own", "b", "1", "", 0, "elsewhere")
    assert task.check(stranger, "1").value is None


@pytest.mark.parametrize(
    ("lines", "keys", "message"),
    [
        (["{}"], {}, "line 1: expected the fields of a known layout"),
        (["[1]"], {}, "line 1: expected a JSON object, found"),
        (["{"], {}, "line 1: expected JSON"),
        ([GOOD, '{"question": [3], "answer": "1"}'], {}, r"line 2: expected text in 'question'.*skip_bad = true"),
        ([], {}, "has no records"),
        (['{"question": "", "answer": "1"}'], {}, "line 1: expected a question and an answer"),
        (['{"messages": [{"role": "user", "content": "a"}]}'], {}, "line 1: expected a message of the assistant"),
        ([GOOD], {"kind": "gsm"}, "did you mean 'gsm8k'"),
        ([GOOD], {"kind": "math"}, "has rows of the layout 'gsm8k', not 'math'"),
        ([GOOD], {"check": "numbr"}, "did you mean 'number'"),
        ([GOOD], {"levels": [3]}, r"has the levels 0, not 3"),
        ([GOOD], {"check": "number", "options": {"red": 1}}, "did you mean 'read'"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(
    tmp_path: Path, lines: list[str], keys: dict[str, object], message: str
) -> None:
    (tmp_path / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    text = ["[[parts]]", 'data = "own.jsonl"']
    for key, value in keys.items():
        shown = "{ red = 1 }" if isinstance(value, dict) else json.dumps(value)
        text.append(f"{key} = {shown}")
    (tmp_path / "own.toml").write_text("\n".join(text), encoding="utf-8")
    with pytest.raises(LiaoyuanError, match=message):
        open_task(tmp_path / "own.toml")
