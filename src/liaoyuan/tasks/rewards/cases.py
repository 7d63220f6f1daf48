"""Answers of which it is known whether they are right: right ones as people write them, wrong ones as models try them.

Rewards are measured on these: what is right and refused is a false negative, what is wrong and taken a false positive.
They are made without the readers that rewards use, lest a mistake of theirs be met by the same one here.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from liaoyuan.config import Config, parse
from liaoyuan.data.records import read_lines
from liaoyuan.errors import LiaoyuanError
from liaoyuan.tasks.problem import Problem
from liaoyuan.tasks.reward import Rollout

HOSTILE = (
    "",
    " ",
    "?",
    "None",
    "nan",
    "inf",
    "9**9**9",
    "\\boxed{}",
    "####",
    "the answer is",
    "{" * 200,
    "1e999",
    "\x00",
)
PLAIN = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
BARE_FRACTION = re.compile(r"\(?([0-9]+)/([0-9]+)\)?|\\[dt]?frac\s*(?:\{([0-9]+)\}\{([0-9]+)\}|([0-9])([0-9]))")
FULL_WIDTH = str.maketrans({chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)})
OTHERS = 3  # other problems whose answers are tried for one problem


@dataclass(frozen=True)
class Case:
    """A rollout, whether it is right, and in which way it was made."""

    rollout: Rollout
    right: bool
    way: str


class Labelled(Config):
    """A line of a user's own file of labelled answers."""

    question: str = ""
    gold: str = ""
    text: str
    thought: str = ""
    right: bool
    way: str = "labelled"


def read_labelled(path: Path) -> list[Case]:
    """Read labelled answers, a JSON object a line; raises LiaoyuanError that names the line."""
    cases = []
    for number, line in read_lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise LiaoyuanError(f"{where}: this is no JSON ({error}).") from error
            found = parse(Labelled, row, where)
            problem = Problem("labelled", found.question, found.gold, "", 0, f"labelled:{number}")
            cases.append(Case(Rollout(problem, found.thought, found.text), found.right, found.way))
    if not cases:
        raise LiaoyuanError(f"{path} has no labelled answers.")
    return cases


def cases_of(problems: Sequence[Problem], marked: Callable[[Problem], bool], seed: int = 0) -> Iterator[Case]:
    """Yield right and wrong answers to each problem; a function of the seed.

    marked: whether the final answer may be marked in a text; else the text must be the answer and nothing more.
    """
    for place, problem in enumerate(problems):
        chance = random.Random(f"cases/{seed}/{place}")
        others = [one.answer for one in chance.sample(problems, min(len(problems), OTHERS + 1)) if one is not problem]
        alone = (("alone", problem.answer), ("with spaces around", f" {problem.answer}\n"))
        for way, text in _right_texts(problem, chance) if marked(problem) else alone:
            yield Case(Rollout(problem, "", text), True, way)
        for way, text in _wrong_texts(problem, others, chance):
            yield Case(Rollout(problem, "", text), False, way)


Texts = Iterator[tuple[str, str]]


def _right_texts(problem: Problem, chance: random.Random) -> Texts:
    gold, chinese = problem.answer, _is_chinese(problem.question)
    formula = f"${gold}$" if "\\" in gold or "^" in gold else gold
    yield "alone", gold
    yield "#### at the end", f"We add up.\n#### {gold}"
    yield "boxed", f"So it is $\\boxed{{{gold}}}$."
    yield "sentence", f"答案是{formula}。" if chinese else f"Therefore, the answer is {formula}."
    yield "Markdown", f"**答案：{formula}**" if chinese else f"**Answer:** {formula}"
    if "\\boxed" in problem.thought:
        yield "the set's own solution", problem.thought
    if value := _value(gold):
        yield from _numbers(gold, value, chinese, chance)
    elif re.fullmatch(r"[A-H]", gold):
        yield from _letters(problem, gold, chinese)
    elif "\\" in gold or "^" in gold:
        yield from _formulas(gold)


def _numbers(gold: str, value: Fraction, chinese: bool, chance: random.Random) -> Texts:
    if chinese:
        unit = chance.choice(("个", "元", "千米", "平方米", "人", "千克", "小时"))
        yield "unit", f"答：{gold}{unit}。"
        yield "sentence with a unit", f"答：还剩下{gold}{unit}。"
        yield "full width", f"答案是{gold.translate(FULL_WIDTH)}"
    else:
        unit = chance.choice(("apples", "dollars", "miles per hour", "square feet", "kg", "more pages"))
        yield "unit", f"The answer is {gold} {unit}."
        yield "sentence with a unit", f"The answer is that she has {gold} {unit} left."
        yield "currency", f"#### ${gold}"
    if value.denominator == 1:
        yield "point nought", f"#### {value}.00"
        part = chance.randint(1, 99)
        yield "equation", f"#### {value - part} + {part} = {value}"
        if abs(value) >= 1000:
            yield "with separators", f"\\boxed{{{int(value):,}}}"
            yield "without separators", f"\\boxed{{{value}}}"
        if chinese and 0 <= value < 100:
            yield "Chinese numeral", f"答案是{_chinese_numeral(int(value))}。"
    else:
        yield "as a fraction", f"\\boxed{{\\frac{{{value.numerator}}}{{{value.denominator}}}}}"
        if 10**6 % value.denominator == 0:
            yield "as a decimal", f"#### {float(value):.6f}".rstrip("0")


def _letters(problem: Problem, letter: str, chinese: bool) -> Texts:
    option = re.search(rf"^{letter}\. (.*)$", problem.question, re.MULTILINE)
    yield "in brackets", f"({letter})"
    yield "with a full stop", f"{letter}."
    yield "as text", f"\\boxed{{\\text{{{letter}}}}}"
    yield "chosen", f"故选{letter}。" if chinese else f"The correct answer is option {letter}."
    if option and len(option[1]) < 40 and not re.search(r"[A-H]\b|\bor\b|\bboth\b|或", option[1]):
        yield "with its text", f"{letter}. {option[1]}"


def _formulas(gold: str) -> Texts:
    yield "wide fractions", _box(gold.replace("\\frac", "\\dfrac"))
    yield "spaces between", _box(re.sub(r"(?<![\\^_{])([+=,-])(?![}])", r" \1 ", gold))
    if gold.count("(") == gold.count(")") and "\\left" not in gold:
        yield "sized brackets", _box(gold.replace("(", "\\left(").replace(")", "\\right)"))
    yield "in display", f"The answer is $${gold}$$"


def _box(text: str) -> str:
    return f"\\boxed{{{text}}}"


def _wrong_texts(problem: Problem, others: Sequence[str], chance: random.Random) -> Texts:
    gold, chinese = problem.answer, _is_chinese(problem.question)
    say = "答案是{}。" if chinese else "The answer is {}."
    yield "the question again", problem.question
    for other in others:
        if _differ(other, gold):
            yield "another problem's answer", f"\\boxed{{{other}}}"
            yield "both answers, boxed", f"\\boxed{{{gold}}} \\boxed{{{other}}}"
            yield "one or the other", say.format(f"{gold}{'或' if chinese else ' or '}{other}")
            yield "two sentences", say.format(gold) + "\n" + say.format(other)
            yield "two #### lines", f"#### {other}\n#### {gold}"
            yield "right in passing", f"It may be {gold}.\n#### {other}"
    yield "denied", f"答案不是{gold}。" if chinese else f"The answer is not {gold}."
    if others := [other for other in others if _differ(other, gold)]:
        yield "list of guesses", "#### " + ", ".join([*others, gold])
    for number in _numbers_of(problem.question):
        if _differ(number, gold):
            yield "a number of the question", f"#### {number}"
    for wrong in _perturbed(problem, chance):
        yield "changed answer", f"\\boxed{{{wrong}}}"
    for text in HOSTILE:
        yield "hostile text", text


def _perturbed(problem: Problem, chance: random.Random) -> Iterator[str]:
    """Yield answers near the right one."""
    gold = problem.answer
    value = _value(gold)
    if value is not None:
        changed = {value + 1, value - 1, value * 10, value / 10, -value, value + Fraction(1, 100)} - {value}
        yield from (str(float(one)) if one.denominator in (10, 100) else str(one) for one in sorted(changed))
    elif re.fullmatch(r"[A-H]", gold):
        yield from (letter for letter in re.findall(r"^([A-H])\. ", problem.question, re.MULTILINE) if letter != gold)
    else:
        unit = re.search(r"\\(?:text|mbox)|\^\{?\\circ", gold)  # a change of the unit is not looked at
        places = [place for place, one in enumerate(gold[: unit.start() if unit else None]) if one.isdigit()]
        for place in chance.sample(places, min(2, len(places))):
            digit = chance.choice([one for one in "123456789" if one != gold[place]])
            yield gold[:place] + digit + gold[place + 1 :]


def _value(text: str) -> Fraction | None:
    """Return the value of a plain number or fraction."""
    match = BARE_FRACTION.fullmatch(text)
    if match:
        up, down = (int(one) for one in match.groups() if one)
        return Fraction(up, down) if down else None
    return Fraction(text.replace(",", "")) if PLAIN.fullmatch(text) else None


def _differ(one: str, other: str) -> bool:
    one, other = (re.sub(r"^\s*[A-Za-z]\s*=\s*", "", text) for text in (one, other))  # "k = 15" says 15
    values = _value(one), _value(other)
    return values[0] != values[1] if None not in values else re.sub(r"\s", "", one) != re.sub(r"\s", "", other)


def _numbers_of(question: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"(?<![0-9.,/])[0-9]+(?:\.[0-9]+)?(?![0-9.,/%])", question)))[:OTHERS]


def _is_chinese(text: str) -> bool:
    return bool(re.search(r"[\u4e00-\u9fff]", text))


def _chinese_numeral(value: int) -> str:
    ones = "零一二三四五六七八九"
    tens, one = divmod(value, 10)
    return ones[one] if not tens else ("" if tens == 1 else ones[tens]) + "十" + (ones[one] if one else "")
