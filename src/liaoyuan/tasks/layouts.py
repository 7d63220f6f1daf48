"""The layouts in which public sets of problems come, each read into questions with answers that can be checked.

A row becomes an `Example`; a layout is recognised by the fields that its rows have. The files stay where their owner
put them: nothing is copied but what a problem needs.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liaoyuan.data import Record
from liaoyuan.data.records import read_lines
from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.tasks.rewards.code import exercism_answer, mbpp_answer, read_tests
from liaoyuan.tasks.rewards.marks import boxed

Row = Mapping[str, Any]
CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Example:
    """A question, its right answer, a worked thought if the set has one, its level (0: none), and what checks answers.

    check: the name of a reward, or of a task that makes its problems itself.
    """

    question: str
    answer: str
    thought: str = ""
    level: int = 0
    check: str = "number"


class UnfitError(ValueError):
    """A row that is of the layout but makes no problem, and why."""


@dataclass(frozen=True)
class Layout:
    """A layout's name, the fields by which it is known, and how a row is read."""

    name: str
    fields: frozenset[str]
    read: Callable[[Row], Example]


def read_examples(path: Path, kind: str = "") -> Iterator[tuple[int, Example | str]]:
    """Yield (line, example, or why there is none) of a `.jsonl` or `.jsonl.zst` file.

    kind: name of the layout; empty: that of the first row, by its fields.

    Raises:
        LiaoyuanError: the file is missing or torn, a line is no JSON object, or the layout is unknown.
    """
    layout = _layout(kind, path) if kind else None
    for number, line in read_lines(path):
        if line.strip():
            row = _row(path, number, line)
            layout = layout or _recognise(path, number, row)
            try:
                yield number, layout.read(row)
            except UnfitError as error:
                yield number, str(error)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise LiaoyuanError(
                    f"{path}, line {number}: this is no row of the layout '{layout.name}' ({type(error).__name__}: "
                    f"{error}); its fields are {', '.join(sorted(layout.fields))}."
                ) from error


def _row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise LiaoyuanError(f"{path}, line {number}: this is no JSON ({error}).") from error
    if not isinstance(row, dict):
        raise LiaoyuanError(f"{path}, line {number}: a JSON object is expected, not {type(row).__name__}.")
    return row


def _layout(kind: str, path: Path) -> Layout:
    if kind not in LAYOUTS:
        raise LiaoyuanError(f"{path}: there is no layout '{kind}' ({', '.join(LAYOUTS)}){nearest(kind, LAYOUTS)}")
    return LAYOUTS[kind]


def _recognise(path: Path, number: int, row: Row) -> Layout:
    for layout in _BY_FIELDS:
        if layout.fields <= row.keys():
            return layout
    raise LiaoyuanError(
        f"{path}, line {number}: no known layout has the fields {', '.join(list(row)[:8]) or '(none)'}. "
        f"Give `kind`, or write records (messages that end with the user, and an answer)."
    )


def _gsm8k(row: Row) -> Example:
    thought, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise UnfitError("its answer has no line ####")
    return Example(row["question"].strip(), answer.strip(), CALCULATOR.sub("", thought).strip(), 0, "number")


def _answers(row: Row) -> Example:
    if "####" in str(row["answer"]):
        return _gsm8k(row)
    answer, thought = str(row["answer"]).strip(), str(row.get("thought", "")).strip()
    return Example(row["question"].strip(), answer, thought, int(row.get("level", 0)), "")


def _math(row: Row) -> Example:
    answers = list(boxed(row["solution"]))
    if not answers:
        raise UnfitError("its solution has no \\boxed{} answer")
    level = re.search(r"[0-9]", str(row.get("level", "")))
    return Example(row["problem"].strip(), answers[-1], row["solution"].strip(), int(level[0]) if level else 0, "maths")


def _ape210k(row: Row) -> Example:
    return Example(row["original_text"].strip(), row["ans"].strip(), row["equation"].strip(), 0, "number")


def _tal_scq(row: Row) -> Example:
    options = [option for group in row["answer_option_list"] for option in group]
    letters = [option["aoVal"] for option in options]
    if row["answer_value"] not in letters or len(set(letters)) != len(letters) or len(letters) < 2:
        raise UnfitError("its right answer is none of its options")
    lines = [row["problem"].strip(), *(f"{option['aoVal']}. {option['content'].strip()}" for option in options)]
    thought = "\n".join(row["answer_analysis"]).strip()
    return Example("\n".join(lines), row["answer_value"], thought, int(row["difficulty"]), "choice")


def _aqua(row: Row) -> Example:
    letters = [option[:1] for option in row["options"]]
    if row["correct"] not in letters or len(set(letters)) != len(letters):
        raise UnfitError("its right answer is none of its options")
    question = "\n".join([row["question"].strip(), *(option.strip() for option in row["options"])])
    return Example(question, row["correct"], row["rationale"].strip(), 0, "choice")


def _strategyqa(row: Row) -> Example:
    return Example(
        row["question"].strip(), "yes" if row["answer"] is True else "no", "\n".join(row["facts"]), 0, "choice"
    )


def _folio(row: Row) -> Example:
    answers = {"True": "yes", "False": "no", "Unknown": "unknown", "Uncertain": "unknown"}
    premises = row["premises"] if isinstance(row["premises"], list) else row["premises"].split("\n")
    lines = [*(premise.strip() for premise in premises), f"Is this true, false or unknown? {row['conclusion'].strip()}"]
    return Example("\n".join(lines), answers[row["label"]], "", 0, "choice")


def _svamp(row: Row) -> Example:
    body = row["Body"].strip()
    question = f"{body}{'' if body.endswith(('.', '?')) else '.'} {row['Question'].strip()}"
    return Example(question, f"{float(row['Answer']):.10g}", row["Equation"].strip(), 0, "number")


def _record(row: Row) -> Example:
    record = Record.model_validate(row)
    asked = [message for message in record.messages if message.role != "assistant"]
    if len(asked) != 1 or asked[0].role != "user" or not record.answer:
        raise UnfitError("no single question of the user's with an answer")
    thought = next((message.think for message in record.messages if message.role == "assistant"), "")
    return Example(asked[0].content, record.answer, thought, record.level, record.task)


def _mbpp(row: Row) -> Example:
    tests = "\n".join(row["test_list"])
    return Example(
        f"{row['text'].strip()}\nYour code should pass these tests:\n{tests}", mbpp_answer(row), check="code"
    )


def _exercism(row: Row) -> Example:
    answer = exercism_answer(row)
    tests = read_tests(answer)
    if tests is None:
        raise UnfitError("it has no tests")
    question = f"{row['prompt'].strip()}\n\nWrite the Python module {tests.module}. Its tests:\n{row['test'].strip()}"
    return Example(question, answer, check="code")


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("answers", frozenset({"question", "answer"}), _answers),
        Layout("gsm8k", frozenset({"question", "answer"}), _gsm8k),
        Layout("math", frozenset({"problem", "solution", "level"}), _math),
        Layout("ape210k", frozenset({"original_text", "ans", "equation"}), _ape210k),
        Layout("tal_scq", frozenset({"problem", "answer_option_list", "answer_value"}), _tal_scq),
        Layout("aqua", frozenset({"question", "options", "correct", "rationale"}), _aqua),
        Layout("strategyqa", frozenset({"qid", "question", "answer", "facts"}), _strategyqa),
        Layout("folio", frozenset({"premises", "conclusion", "label"}), _folio),
        Layout("svamp", frozenset({"Body", "Question", "Answer", "Equation"}), _svamp),
        Layout("mbpp", frozenset({"text", "code", "test_list"}), _mbpp),
        Layout("exercism", frozenset({"prompt", "solution", "test", "test_file"}), _exercism),
        Layout("records", frozenset({"id", "messages"}), _record),
    )
}
_BY_FIELDS = sorted(LAYOUTS.values(), key=lambda layout: -len(layout.fields))  # the most particular one first
