"""A number is read as people write it, exactly, and whoever writes several gets nothing."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liaoyuan.tasks import Problem, Rollout
from liaoyuan.tasks.expression import read_expression
from liaoyuan.tasks.rewards import NumberReward
from liaoyuan.tasks.rewards.number import NumberConfig
from liaoyuan.tasks.rewards.numbers import plain, read_number

RIGHT = [
    ("42", "42"),
    ("42", " 42\n"),
    ("42", "42.0"),
    ("42", "We add.\n#### 42"),
    ("42", "####42"),
    ("42", "So it is \\boxed{42}."),
    ("42", "\\boxed{42\\text{ cm}^2}"),
    ("42", "The answer is 42."),
    ("42", "the final answer is: 42 apples"),
    ("42", "Therefore, the answer is that Tom has 42 apples left."),
    ("42", "**Answer:** **42**"),
    ("42", "Answer: $42"),
    ("42", "#### 6*7 = 42"),
    ("42", "x = 42"),
    ("42", "４２"),
    ("42", "答：42个。"),
    ("42", "答案是四十二。"),
    ("42", "The answer is 42. It was easy: 6 times 7.\nThe answer is 42."),
    ("1234", "1,234"),
    ("1,234", "\\boxed{1234}"),
    ("1000", "\\$1{,}000"),
    ("0.5", "1/2"),
    ("(1/2)", "0.5"),
    ("1.75", "1 3/4"),
    ("1(3/4)", "\\boxed{\\frac{7}{4}}"),
    ("3.5", "3½"),
    ("0.5", "50%"),
    ("50%", "0.5"),
    ("50%", "百分之五十"),
    ("0.75", "四分之三"),
    ("30000", "3万"),
    ("2500000", "2.5 million dollars"),
    ("105", "一百零五"),
    ("120000000", "一亿两千万"),
    ("-5", "−5"),
    ("160/(1-20%)", "200"),
    ("160/(1-20%)", "#### 160/(1-20%)"),
]
WRONG = [
    ("42", ""),
    ("42", "43"),
    ("42", "-42"),
    ("42", "4.2"),
    ("42", "42 or 43"),
    ("42", "The answer is 42 or 43."),
    ("42", "The answer is 43. No, the answer is 42."),
    ("42", "\\boxed{42} \\boxed{43}"),
    ("42", "#### 43\n#### 42"),
    ("42", "#### 41, 42, 43"),
    ("42", "#### between 41 and 43"),
    ("42", "The answer is not 42."),
    ("42", "I think it may be 42"),
    ("42", "It is 42.\n#### 43"),
    ("42", "The answer is less than 42"),
    ("42", "What is 6 times 7?"),
    ("42", "6*7"),
    ("42", "42²"),
    ("42", "4 2"),
    ("42", "42!"),
    ("42", "0x2a"),
    ("42", "4_2"),
    ("42", "4**2"),
    ("42", "4$2"),
    ("99", "9**9"),
    ("42", "4.2e1"),
    ("42", "٤٢x"),
    ("42", "\\boxed{}"),
    ("42", "\\boxed{42"),
    ("42", "答案不是42。"),
    ("42", "答案是42或43。"),
    ("42", "__import__('os')"),
    ("42", "9" * 5000),
    ("42", "((((" * 2000),
    ("1234", "1,23,4"),
    ("1234", "12,34"),
    ("3500", "三千五"),  # 3500 in speech, 3005 by its digits: nobody can tell
    ("50%", "50"),
    ("50", "50%"),  # nobody asked for percent
    ("0.5", "5%"),
    ("2", "2.75-1(5/6)+3(1/4)-2(1/6)"),  # the question's own expression
    ("1/3", "0.333333"),
    ("0", "1/0"),
    ("5", "x = 5 or x = 6"),
    ("6", "x = 5 or x = 6"),
    ("5", "the answer is 6 because 2+3=5"),
]


def scored(gold: str, text: str, **options: object) -> float | None:
    reward = NumberReward(NumberConfig(**options))  # type: ignore[arg-type]
    return reward(Rollout(Problem("n", "How many?", gold, "", 0, "k"), "", text)).value


@pytest.mark.parametrize(("gold", "text"), RIGHT)
def test_what_is_right(gold: str, text: str) -> None:
    assert scored(gold, text) == 1.0


@pytest.mark.parametrize(("gold", "text"), WRONG)
def test_what_is_wrong(gold: str, text: str) -> None:
    assert scored(gold, text) == 0.0


def test_a_right_answer_that_cannot_be_read_judges_nobody() -> None:
    for gold in ("", "many", "5 or 6", "3:4"):
        score = NumberReward()(Rollout(Problem("n", "", gold, "", 0, "k"), "", "5"))
        assert score.value is None and score.reason


def test_percents_are_whole_numbers_where_the_question_asks_for_percent() -> None:
    for question, value in (("What percent is it?", 1.0), ("占百分之几？", 1.0), ("How many apples?", 0.0)):
        assert NumberReward()(Rollout(Problem("n", question, "50", "", 0, "k"), "", "50%")).value == value


def test_an_answer_that_is_not_whole_is_wrong() -> None:
    problem = Problem("n", "", "42", "", 0, "k")
    assert NumberReward()(Rollout(problem, "", "42", "cut off")).value == 0.0


def test_the_last_number_counts_only_if_that_is_asked_for() -> None:
    assert scored("42", "Six times seven makes 42 in all") == 0.0
    assert scored("42", "Six times 7 makes 42 in all", read="last") == 1.0
    assert scored("42", "42, and #### 43", read="last") == 0.0


def test_a_tolerance_is_relative() -> None:
    assert scored("1/3", "0.3333", tolerance=1e-3) == 1.0
    assert scored("1/3", "0.33", tolerance=1e-3) == 0.0
    assert scored("300", "300.2", tolerance=1e-3) == 1.0


def value_of(text: str) -> Fraction | None:
    found = read_expression(plain(text))
    return Fraction(found.value) if found else None


@given(
    st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "{}.0", "#### {}", "\\boxed{{{:,}}}", "答：{}元"])
)
def test_every_whole_number_is_read_in_every_form(number: int, form: str) -> None:
    text = form.format(number)
    assert scored(str(number), text) == 1.0
    assert scored(str(number + 1), text) == 0.0


@given(st.decimals(-(10**6), 10**6, places=4), st.decimals(-(10**6), 10**6, places=4))
def test_decimals_are_compared_exactly(one: Decimal, other: Decimal) -> None:
    """Against Python's own decimals; a float would call 0.1 + 0.2 wrong."""
    assert scored(f"{one:f}", f"{other:f}") == float(one == other)


@given(st.integers(0, 10**8 - 1))
def test_chinese_numerals_are_read_back(number: int) -> None:
    found = read_number(chinese(number))
    assert found is not None and found.value == number


@given(st.text(max_size=60))
def test_any_text_has_a_verdict(text: str) -> None:
    assert scored("42", text) in (0.0, 1.0)
    read_number(text)
    value_of(text)


def joined(parts: st.SearchStrategy[tuple[str, Fraction]]) -> st.SearchStrategy[tuple[str, Fraction]]:
    def join(left: tuple[str, Fraction], sign: str, right: tuple[str, Fraction]) -> tuple[str, Fraction]:
        value = {"+": left[1] + right[1], "-": left[1] - right[1], "*": left[1] * right[1]}[sign]
        return f"({left[0]}){sign}({right[0]})", value

    return st.builds(join, parts, st.sampled_from("+-*"), parts)


LEAVES = st.integers(0, 999).map(lambda number: (str(number), Fraction(number)))


@given(st.recursive(LEAVES, joined, max_leaves=6))
def test_expressions_are_reckoned_exactly(pair: tuple[str, Fraction]) -> None:
    assert value_of(pair[0]) == pair[1]


def test_expressions_have_limits() -> None:
    assert value_of("2+3*4") == 14 and value_of("(2+3)*4") == 20 and value_of("100-10%") == Fraction(999, 10)
    for text in ("9**9", "2**99", "1/0", "(" * 17 + "1" + ")" * 17, "9" * 300, "2+", "", "2 3", "10**3**3", "a+1"):
        assert value_of(text) is None, text


def chinese(number: int) -> str:
    """Write a number as it is read aloud, by another way than the reader's: group by group."""
    if number >= 10_000:
        rest = number % 10_000
        gap = "零" if 0 < rest < 1000 else ""
        return chinese(number // 10_000) + "万" + (gap + chinese(rest) if rest else "")
    digits, text = "零一二三四五六七八九", ""
    for place, unit in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = number // place % 10
        text += digits[digit] + unit if digit else "零"
    while "零零" in text:
        text = text.replace("零零", "零")
    text = text.strip("零")
    return text or "零"
