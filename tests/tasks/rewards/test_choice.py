"""A choice is one letter or one word, and no other beside it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liaoyuan.tasks import Problem, Rollout
from liaoyuan.tasks.rewards import ChoiceReward, ExactReward
from liaoyuan.tasks.rewards.choice import read_choice

RIGHT = [
    ("B", "B"),
    ("B", "(B)"),
    ("B", "b)"),
    ("B", "B."),
    ("B", "\\boxed{\\text{B}}"),
    ("B", "\\boxed{\\textbf{(B)}}"),
    ("B", "$$\\text{B}$$"),
    ("B", "The answer is B."),
    ("B", "The correct answer is option B."),
    ("B", "ANSWER:B"),
    ("B", "Ans: B"),
    ("B", "Correct Option: B"),
    ("B", "Answer B"),
    ("B", "#### B"),
    ("B", "B. $6a+b$"),
    ("B", "B) the others are even"),
    ("B", "So the sum is 79. So the answer is 79. The answer is B."),
    ("B", "因此周长是5．故选$$\\text{B}$$．"),
    ("B", "故答案为：B"),
    ("B", "所以选择B选项。"),
    ("yes", "Yes."),
    ("yes", "true"),
    ("no", "The answer is no."),
    ("no", "答案：不是"),
    ("unknown", "Uncertain"),
    ("True", "yes"),
]
WRONG = [
    ("B", ""),
    ("B", "A"),
    ("B", "A or B"),
    ("B", "B or A"),
    ("B", "A, B"),
    ("B", "A B C D"),
    ("B", "ABCD"),
    ("B", "(A) (B)"),
    ("B", "The answer is A. The answer is B."),
    ("B", "The answer is A or B or C."),
    ("B", "The answer is not B."),
    ("B", "#### A\n#### B"),
    ("B", "\\boxed{A} \\boxed{B}"),
    ("B", "Both B and C"),
    ("B", "B. or C"),
    ("B", "Because B is even"),
    ("B", "Which is it?\nA. 1\nB. 2\nC. 3"),
    ("B", "答案是A或B。"),
    ("yes", "yes and no"),
    ("yes", "Yes or no?"),
    ("yes", "not yes"),
    ("yes", "no"),
    ("unknown", "yes"),
]


@pytest.mark.parametrize(("gold", "text"), RIGHT)
def test_what_is_right(gold: str, text: str) -> None:
    assert ChoiceReward()(Rollout(Problem("c", "", gold, "", 0, "k"), "", text)).value == 1.0


@pytest.mark.parametrize(("gold", "text"), WRONG)
def test_what_is_wrong(gold: str, text: str) -> None:
    assert ChoiceReward()(Rollout(Problem("c", "", gold, "", 0, "k"), "", text)).value == 0.0


def test_a_right_answer_that_is_no_choice_judges_nobody() -> None:
    assert ChoiceReward()(Rollout(Problem("c", "", "42", "", 0, "k"), "", "B")).value is None


@given(st.text(alphabet="ABCD ,./()or", max_size=30))
def test_a_text_with_two_letters_chooses_none(text: str) -> None:
    """Against a count of the letters that stand alone."""
    alone = set(re.findall(r"(?<![A-Za-z])[ABCD](?![A-Za-z])", text))
    found = read_choice(text)
    assert found is None or {found} == alone


@pytest.mark.parametrize(
    ("gold", "text", "value"),
    [
        ("New York", "new  york.", 1.0),
        ("New York", "The answer is New York.", 1.0),
        ("New York", "Ｎew York", 1.0),
        ("New York", "York", 0.0),
        ("New York", "The answer is New York. The answer is Boston.", 0.0),
        ("the answer is 5", "the answer is 5", 1.0),
        ("", "x", None),
    ],
)
def test_exact_words(gold: str, text: str, value: float | None) -> None:
    assert ExactReward()(Rollout(Problem("e", "", gold, "", 0, "k"), "", text)).value == value
