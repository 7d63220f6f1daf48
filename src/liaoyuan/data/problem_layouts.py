"""Public sets of problems with checkable answers: the one place where their rows are read, for tuning and for tasks.

A row becomes a record: the question in the set's own words, the worked solution as the thought, the final answer as
what is learned and checked, and `task`, the reward that checks it. A problem without a solution becomes a prompt.
`tasks` makes its problems of these records, so that what `tune sft` learns from a file is what a task of it asks.
"""

import json
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from liaoyuan.data.boxed import boxed
from liaoyuan.data.fields import Fields, RowError, shown, split_thought, user
from liaoyuan.data.layouts import Layout
from liaoyuan.data.records import Message, Record

MARK = "####"  # before the final answer in GSM8K
CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator
LABELS = {"true": "true", "false": "false", "unknown": "unknown", "uncertain": "unknown"}  # FOLIO's parts differ


def _gsm8k(fields: Fields, place: str) -> list[Record]:
    """A question and a solution; the final answer stands after the mark, if there is one (GSM8K), else it is all."""
    solution, mark, final = fields.text("answer").rpartition(MARK)
    thought = CALCULATOR.sub("", solution)
    if not mark:
        thought, final = split_thought(final)
        thought = thought or fields.text("thought")
    return _problem(fields, place, "number" if mark else "", fields.text("question"), final, thought)


def _math(fields: Fields, place: str) -> list[Record]:
    """A competition problem whose solution boxes the final answer."""
    solution = fields.text("solution")
    answers = list(boxed(solution))
    if not answers:
        raise RowError("a solution with a \\boxed{} answer", shown(solution[-40:]))
    return _problem(fields, place, "maths", fields.text("problem"), answers[-1], solution)


def _ape210k(fields: Fields, place: str) -> list[Record]:
    """A word problem, its equation and its number."""
    fields.take("segmented_text")  # the same question, cut into words
    return _problem(fields, place, "number", fields.text("original_text"), fields.text("ans"), fields.text("equation"))


def _svamp(fields: Fields, place: str) -> list[Record]:
    """A word problem in two parts, its equation and its number, a float even where it is whole."""
    body, number = fields.text("Body").strip(), fields.take("Answer")
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise RowError("a number in 'Answer'", shown(number))
    question = f"{body}{'' if body.endswith(('.', '?')) else '.'} {fields.text('Question').strip()}"
    return _problem(fields, place, "number", question, f"{number:.10g}", fields.text("Equation"))


def _tal_scq(fields: Fields, place: str) -> list[Record]:
    """A question with options in groups, each with its letter."""
    groups, thought = fields.take("answer_option_list"), _lines(fields, "answer_analysis")
    try:
        options = [(option["aoVal"], f"{option['aoVal']}. {option['content'].strip()}") for [option] in groups]
    except (TypeError, ValueError, KeyError, AttributeError):
        raise RowError("options with a letter and content in 'answer_option_list'", shown(groups)) from None
    return _choice(fields, place, fields.text("problem"), options, fields.text("answer_value"), thought)


def _aqua(fields: Fields, place: str) -> list[Record]:
    """A question with options that begin with their letter."""
    options = [(option[:1], option.strip()) for option in _texts(fields, "options")]
    return _choice(fields, place, fields.text("question"), options, fields.text("correct"), fields.text("rationale"))


def _strategyqa(fields: Fields, place: str) -> list[Record]:
    """A question answered by yes or no, and the facts that decide it."""
    return _problem(fields, place, "choice", fields.text("question"), fields.text("answer"), _lines(fields, "facts"))


def _folio(fields: Fields, place: str) -> list[Record]:
    """Premises and a conclusion that is true, false or neither; no solution."""
    given = fields.row["premises"]
    premises = fields.text("premises").split("\n") if isinstance(given, str) else _texts(fields, "premises")
    label = fields.text("label")
    if label.casefold() not in LABELS:
        raise RowError("True, False, Unknown or Uncertain in 'label'", shown(label))
    asked = f"Is this true, false or unknown? {fields.text('conclusion').strip()}"
    question = "\n".join([*(premise.strip() for premise in premises), asked])
    return _problem(fields, place, "choice", question, LABELS[label.casefold()], said="")


def _pubmedqa(fields: Fields, place: str) -> list[Record]:
    """A question about the abstract of a paper, answered by yes, no or maybe."""
    question = "\n\n".join([*_texts(fields, "contexts"), fields.text("question")])
    return _problem(fields, place, "exact", question, fields.text("answer"), fields.text("long_answer"))


def _mbpp(fields: Fields, place: str) -> list[Record]:
    """A function to write, and assertions, all of which are shown."""
    tests, setup, code = _texts(fields, "test_list"), fields.text("test_setup_code"), fields.text("code")
    question = "\n".join([fields.text("text").strip(), "Your code should pass these tests:", *tests])
    checks = {"tests": tests} | ({"setup": setup} if setup else {})
    return _program(fields, place, fields.text("task_id"), question, checks, code)


def _exercism(fields: Fields, place: str) -> list[Record]:
    """Instructions, a solution and a file of unittest, which imports the module that is to be written."""
    tests, module = fields.text("test"), PurePath(fields.text("test_file")).stem.removesuffix("_test")
    asked = f"Write the Python module {module}. Its tests:\n{tests.strip()}"
    question = f"{fields.text('prompt').strip()}\n\n{asked}"
    checks = {"source": tests, "module": module}
    return _program(fields, place, fields.text("task"), question, checks, fields.text("solution"))


def _choice(
    fields: Fields, place: str, question: str, options: Sequence[tuple[str, str]], final: str, thought: str
) -> list[Record]:
    """Return a question with its options, (letter, line) each, below it."""
    letters, final = [letter for letter, _ in options], final.strip()
    if final not in letters or len(set(letters)) != len(letters) or len(letters) < 2:
        raise RowError("several options, each with its own letter, the right one's among them", shown([letters, final]))
    question = "\n".join([question.strip(), *(line for _, line in options)])
    return _problem(fields, place, "choice", question, final, thought)


def _program(fields: Fields, place: str, name: str, question: str, checks: dict[str, Any], code: str) -> list[Record]:
    """Return a program to write; the answer is its tests in JSON (`tasks.rewards.code.CodeTests`)."""
    if not all(checks.values()):
        raise RowError("tests of the program", "none")
    code = code.replace("\r\n", "\n").strip()
    said = f"```python\n{code}\n```" if code else ""
    return _problem(fields, name or place, "code", question, json.dumps(checks, ensure_ascii=False), said=said)


def _problem(
    fields: Fields, place: str, check: str, question: str, final: str, thought: str = "", said: str | None = None
) -> list[Record]:
    """Return a problem that the reward `check` judges.

    said: what the assistant says, if not the final answer; empty: the set shows no answer, only what is right.
    """
    question, final = question.strip(), final.strip()
    if not question or not final:
        raise RowError("a question and an answer", "one of them is empty")
    content = final if said is None else said
    solution = (Message(role="assistant", content=content, think=thought.strip()),) if content else ()
    kind = "chat" if solution else "prompt"
    return [fields.record(place, kind=kind, messages=(user(question), *solution), task=check, answer=final)]


def _texts(fields: Fields, name: str) -> list[str]:
    found = fields.take(name) or []
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise RowError(f"a list of texts in '{name}'", shown(found))
    return found


def _lines(fields: Fields, name: str) -> str:
    return "\n".join(_texts(fields, name))


PROBLEMS = (
    Layout("mbpp", ("text", "test_list"), _mbpp),
    Layout("exercism", ("prompt", "test", "test_file"), _exercism),
    Layout("tal_scq", ("problem", "answer_option_list", "answer_value"), _tal_scq),
    Layout("math", ("problem", "solution"), _math),
    Layout("ape210k", ("original_text", "ans"), _ape210k),
    Layout("svamp", ("Body", "Question", "Answer"), _svamp),
    Layout("aqua", ("question", "options", "correct"), _aqua),
    Layout("folio", ("premises", "conclusion", "label"), _folio),
    Layout("pubmedqa", ("question", "contexts", "answer"), _pubmedqa),
    Layout("strategyqa", ("question", "facts", "answer"), _strategyqa),
    Layout("gsm8k", ("question", "answer"), _gsm8k),
)
