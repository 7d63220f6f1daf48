"""Programs are worth what their unit tests say; what cannot be judged has no value."""

import json
import time
from pathlib import Path

import pytest

from liaoyuan import safety
from liaoyuan.data.formats import convert
from liaoyuan.errors import LiaoyuanError
from liaoyuan.tasks import Split, Task, open_task
from liaoyuan.tasks.problem import Problem
from liaoyuan.tasks.reward import Rollout
from liaoyuan.tasks.rewards.code import (
    CodeConfig,
    UnitTests,
    code_of,
    open_unit_tests,
    read_tests,
)

TESTS = ["assert double(2) == 4", "assert double('a') == 'aa'"]
ROW = {"text": "Double it.", "test_list": TESTS, "test_setup_code": ""}
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
RIGHT = "def double(x):\n    return x * 2\n"
HALF = "def double(x):\n    return x + 2\n"
FILE = {
    "prompt": "Double it.",
    "test_file": "double_test.py",
    "test": "import unittest\nfrom double import double\nclass D(unittest.TestCase):\n"
    "    def test_two(self):\n        self.assertEqual(double(2), 4)\n",
}


def answer_of(row: dict[str, object]) -> str:
    """Return the right answer of a row of a public set."""
    _, (record,), _ = convert(row, "1")
    return record.answer


@pytest.fixture
def jail() -> None:
    if safety.lacking():
        pytest.skip(f"NOT RUN, code was not judged: {safety.lacking()}")


def rollout(text: str, answer: str = "", flaw: str = "") -> Rollout:
    problem = Problem("mbpp", "Write a function that doubles.", answer or answer_of(ROW), RIGHT, 0, "double")
    return Rollout(problem, "", text, flaw)


@pytest.mark.usefixtures("jail")
class TestUnitTests:
    def test_right_is_one_and_wrong_is_nought_with_the_reason(self) -> None:
        reward = open_unit_tests(CodeConfig())
        right = reward(rollout(f"Here it is:\n```python\n{RIGHT}```\nDone."))
        assert (right.value, right.parsed, right.reason) == (1.0, RIGHT, "")
        wrong = reward(rollout(HALF))
        assert (wrong.value, wrong.parsed) == (0.0, HALF)
        assert wrong.reason.startswith("test 2 of 2, assert double('a') == 'aa': TypeError")

    def test_the_share_of_tests_that_pass(self) -> None:
        assert UnitTests(CodeConfig(share=True))(rollout(HALF)).value == 0.5
        assert UnitTests(CodeConfig(share=True))(rollout("import os; os._exit(0)")).value == 0.0

    def test_a_file_of_unittest(self) -> None:
        assert UnitTests()(rollout(RIGHT, answer_of(FILE))).value == 1.0
        assert UnitTests()(rollout("def double(x): return 5", answer_of(FILE))).reason == "test_two: 5 != 4"

    def test_broken_tests_have_no_value(self) -> None:
        for test in ("assert double(2) ==", "import no_such_module"):
            score = UnitTests()(rollout(RIGHT, answer_of({**ROW, "test_list": [test]})))
            assert score.value is None and score.reason.startswith("the tests are broken")

    def test_limits_are_the_users(self) -> None:
        reward = UnitTests(CodeConfig(cpu_seconds=1, memory_mib=128))
        assert (
            reward(rollout("def double(x):\n  while True: pass")).reason
            == "the code used more than 1 s of processor time"
        )
        assert "MemoryError" in reward(rollout("def double(x): return bytes(200 << 20)")).reason

    def test_many_together_are_judged_as_one_by_one(self) -> None:
        rollouts = [rollout(text) for text in (RIGHT, HALF, "", "1/0", RIGHT, "def double(x): return x * 2")]
        reward = UnitTests()
        assert reward.score_all(rollouts) == [reward(one) for one in rollouts]

    def test_unicode_and_hostile_texts_are_judged(self) -> None:
        for text in (
            "\ud800",
            "\0",
            "```python\n\x1b[2J```",
            "（" * 5000,
            "(" * 5000,
            "```" * 3000,
            "x = '值'\n" + RIGHT,
        ):
            score = UnitTests()(rollout(text))
            assert score.value == float(text.endswith(RIGHT)) and score.reason.isprintable()


@pytest.mark.usefixtures("jail")
def test_a_task_of_programs_is_judged_by_their_tests(tmp_path: Path) -> None:
    row = {**ROW, "code": RIGHT, "task_id": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "own.toml").write_text("[[parts]]\ndata = 'rows.jsonl'\noptions.cpu_seconds = 2\n")
    task = open_task(tmp_path / "own.toml").task
    (problem,) = [found for split in SPLITS for found in problems_of(task, split)]
    assert problem.question.endswith("assert double('a') == 'aa'")
    assert task.check(problem, RIGHT).value == 1.0 and task.check(problem, HALF).value == 0.0


def problems_of(task: Task, split: Split) -> list[Problem]:
    try:
        return [task.problem(0, 0, 0, split)]
    except LiaoyuanError:  # the only problem is in one split
        return []


class TestWithoutJail:
    def test_the_reward_refuses_at_the_door_and_never_says_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("platform.machine", lambda: "riscv64")
        safety.mechanisms.cache_clear()
        try:
            with pytest.raises(LiaoyuanError, match="Untrusted code is not run: the jail lacks its part 'processor'"):
                open_unit_tests(CodeConfig())
            score = UnitTests()(rollout(RIGHT))
            assert score.value is None and "lacks its part 'processor'" in score.reason
        finally:
            safety.mechanisms.cache_clear()

    def test_answers_that_need_no_run(self) -> None:
        assert UnitTests()(rollout(RIGHT, flaw="cut off")).reason == "cut off"
        assert UnitTests()(rollout("```c\nint main() {}\n```")).value == 0.0
        assert UnitTests()(rollout(RIGHT, answer="42")).value is None


class TestReadingCode:
    @pytest.mark.parametrize(
        ("text", "code"),
        [
            ("x = 1", "x = 1"),
            ("```\nx = 1\n```", "x = 1\n"),
            ("a\n```python\nx = 1\n```\nb\n```py\ny = 2\n```\n", "x = 1\n\ny = 2\n"),
            ("```bash\npip install\n```\n~~~python3\nx = 1\n~~~", "x = 1\n"),
            ("```python\nx = 1\n```\n```python\n>>> x\n1\n```", "x = 1\n"),
            ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
            ("```Python title=a.py\nx = 1\n", "x = 1\n"),
            ("```json\n{}\n```", ""),
        ],
    )
    def test_fenced_blocks_or_the_whole_text(self, text: str, code: str) -> None:
        assert code_of(text) == code

    @pytest.mark.parametrize("line", ["```" + "a" * 10**6, "`" * 10**6, "```" + " " * 10**6, "```" + " a" * 500_000])
    def test_a_line_of_a_million_characters_is_read_once(self, line: str) -> None:
        before = time.process_time()
        assert code_of(line) == line
        assert time.process_time() - before < 2  # measured: 0.01; tried in every way it takes minutes

    @pytest.mark.parametrize(
        "answer",
        ["", "42", "[]", "{}", '{"tests": []}', '{"tests": [1]}', '{"tests": ["x"], "more": 1}', '{"source": "x"}'],
    )
    def test_what_is_no_tests(self, answer: str) -> None:
        assert read_tests(answer) is None

    def test_rows_of_public_sets(self) -> None:
        assert read_tests(answer_of(ROW)) == safety.Tests(tests=tuple(TESTS))
        assert json.loads(answer_of(FILE)) == {"source": FILE["test"], "module": "double"}
