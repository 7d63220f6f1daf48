"""Layouts of public sets of problems with checkable answers, each known by its fields.

A worked solution becomes the thought, the final answer the content: the row can be learned slowly and fast, and its
`answer` checked. A problem without a solution becomes a prompt. Questions are those of the set, in its own words.
"""

import json
import re

from liaoyuan.data.fields import Fields, RowError, shown, user, worked
from liaoyuan.data.layouts import Layout
from liaoyuan.data.records import Message, Record

MARK = "####"  # before the final answer in GSM8K
CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator
BOXED = "\\boxed{"


def _gsm8k(fields: Fields, place: str) -> list[Record]:
    """A question and a solution; the final answer stands after the mark, if there is one."""
    question, text = fields.text("question"), fields.text("answer")
    solution, mark, final = text.rpartition(MARK)
    if not mark:
        return [fields.record(place, messages=worked(question, "", text), answer=text.strip())]
    thought = CALCULATOR.sub("", solution)
    return [fields.record(place, messages=worked(question, thought, final), answer=final.strip())]


def _math(fields: Fields, place: str) -> list[Record]:
    """A competition problem whose solution boxes the final answer."""
    solution = fields.text("solution")
    final = boxed(solution)
    if not final:
        raise RowError("a solution with a \\boxed{} answer", shown(solution[-40:]))
    return [fields.record(place, messages=worked(fields.text("problem"), solution, final), answer=final)]


def boxed(text: str) -> str:
    """Return what stands in the last \\boxed{} of a text, braces within braces included; empty if there is none."""
    begin = text.rfind(BOXED)
    depth, start = 1, begin + len(BOXED)
    for place in range(start, len(text) if begin >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place].strip()
    return ""


def _ape(fields: Fields, place: str) -> list[Record]:
    """A word problem, its equation and its number."""
    final = fields.text("ans")
    messages = worked(fields.text("original_text"), fields.text("equation"), final)
    fields.take("segmented_text")  # the same question, cut into words
    return [fields.record(place, messages=messages, answer=final)]


def _choices(fields: Fields, place: str) -> list[Record]:
    """A question with lettered options (TAL-SCQ)."""
    options, final = fields.take("answer_option_list"), fields.text("answer_value").strip()
    try:
        rows = [(option[0]["aoVal"], option[0]["content"].strip()) for option in options]
    except (TypeError, KeyError, IndexError, AttributeError):
        raise RowError("options with a letter and content in 'answer_option_list'", shown(options)) from None
    if final not in [letter for letter, _ in rows]:
        raise RowError("the letter of an option in 'answer_value'", shown(final))
    analysis = fields.take("answer_analysis") or []
    question = "\n".join([fields.text("problem").strip(), *(f"{letter}. {text}" for letter, text in rows)])
    thought = "\n".join(part for part in analysis if isinstance(part, str))
    return [fields.record(place, messages=worked(question, thought, final), answer=final)]


def _folio(fields: Fields, place: str) -> list[Record]:
    """Premises and a conclusion that is True, False or Uncertain."""
    premises, conclusion = fields.take("premises"), fields.text("conclusion")
    given = premises if isinstance(premises, list) else str(premises).split("\n")
    final = fields.text("label")
    question = "\n".join([*map(str, given), "", f"Is this True, False or Uncertain? {conclusion}"])
    return [fields.record(place, kind="prompt", messages=(user(question),), answer=final)]


def _strategy(fields: Fields, place: str) -> list[Record]:
    """A question answered by yes or no, and the facts that decide it (StrategyQA)."""
    facts, final = fields.take("facts") or [], fields.text("answer")
    thought = "\n".join(fact for fact in facts if isinstance(fact, str))
    return [fields.record(place, messages=worked(fields.text("question"), thought, final), answer=final)]


def _abstracts(fields: Fields, place: str) -> list[Record]:
    """A question about the abstract of a paper, answered by yes, no or maybe (PubMedQA)."""
    contexts, final = fields.take("contexts") or [], fields.text("answer")
    question = "\n\n".join([*map(str, contexts), fields.text("question")])
    return [fields.record(place, messages=worked(question, fields.text("long_answer"), final), answer=final)]


def _mbpp(fields: Fields, place: str) -> list[Record]:
    """A function to write, with assertions; the answer is the program that checks it."""
    tests, setup = fields.take("test_list") or [], fields.text("test_setup_code")
    task = "\n".join([fields.text("text"), "It must pass these tests:", *map(str, tests)])
    checks = "\n".join([*([setup] if setup else []), *map(str, tests)])
    code = fields.text("code").replace("\r\n", "\n")
    name = fields.text("task_id")
    return [fields.record(place, **({"id": name} if name else {}), messages=_coded(task, code), answer=checks)]


def _exercism(fields: Fields, place: str) -> list[Record]:
    """Instructions, a solution and a file of unit tests, which is the answer, with the name that it imports."""
    name, tests = fields.text("task"), fields.text("test")
    checks = json.dumps({"file": fields.text("test_file"), "tests": tests}, ensure_ascii=False)
    messages = _coded(fields.text("prompt"), fields.text("solution"))
    return [fields.record(place, **({"id": name} if name else {}), messages=messages, answer=checks)]


def _coded(task: str, code: str) -> tuple[Message, ...]:
    return worked(task, "", f"```python\n{code.strip()}\n```")


PROBLEMS = (
    Layout("MBPP", ("text", "code", "test_list"), _mbpp),
    Layout("Exercism", ("prompt", "solution", "test"), _exercism),
    Layout("TAL-SCQ", ("problem", "answer_option_list", "answer_value"), _choices),
    Layout("MATH", ("problem", "solution"), _math),
    Layout("Ape210K", ("original_text", "ans"), _ape),
    Layout("FOLIO", ("premises", "conclusion", "label"), _folio),
    Layout("PubMedQA", ("question", "contexts", "answer"), _abstracts),
    Layout("StrategyQA", ("question", "facts", "answer"), _strategy),
    Layout("GSM8K", ("question", "answer"), _gsm8k),
)
