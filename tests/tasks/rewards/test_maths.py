"""Mathematics is judged by what it says, in a process that can be ended; hedges, copies and monsters get nothing."""

import time

import pytest

from liaoyuan.tasks import Problem, Rollout
from liaoyuan.tasks.rewards import MathsReward
from liaoyuan.tasks.rewards.maths import MathsConfig

QUESTION = "Factor $x^2-1$. Simplify $\\frac{16}{20}$."
RIGHT = [
    ("42", "42"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac12", "\\boxed{\\dfrac{1}{2}}"),
    ("\\frac{1}{2}", "The answer is $\\frac{2}{4}$."),
    ("2\\sqrt{3}", "So the answer is $2\\sqrt{3}$."),
    ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}"),
    ("1,2,3", "3,2,1"),
    ("1,2,3", "\\boxed{3, 2 \\text{ and } 1}"),
    ("x=5", "5"),
    ("5", "The answer is $x = 5$."),
    ("5", "\\boxed{2+3=5}"),
    ("x+1", "1+x"),
    ("(x-1)(x+1)", "(x+1)(x-1)"),
    ("x^2+2x", "x(x+2)"),
    ("\\text{Evelyn}", "evelyn"),
    ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}"),
    ("52_8", "52_{8}"),
    ("52_8", "52"),
    ("10\\text{ cm}", "10"),
    ("445", "The answer is that she has 445 kg left."),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"),
    ("y = 2x + 3", "y = 3 + 2x"),
    ("2x + 3y = 6", "4x + 6y = 12"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("\\frac{4}{5}", "\\frac{4}{5}"),
    ("(-\\infty, 2]", "(-\\infty,2]"),
    ("2+3i", "3i+2"),
]
WRONG = [
    ("42", ""),
    ("42", "43"),
    ("1", "1,2,3"),
    ("(1,2)", "(2,1)"),
    ("[1,2]", "(1,2)"),
    ("\\text{Evelyn}", "veelyn"),  # the same letters: as a product they are equal
    ("52_8", "52_7"),
    ("52", "52_8"),
    ("x^2", "y^2"),
    ("3", "3 \\text{ or } 4"),
    ("10\\;\\text{edges}", "10\\;\\text{edges} or \\frac{17}{8}"),
    ("3", "\\boxed{3} or \\boxed{4}"),
    ("3", "\\{3, 4\\}"),
    ("3", "\\pm 3"),
    ("0", "The answer is not 0."),
    ("0", "not 0"),
    ("(x-1)(x+1)", "x^2-1"),  # what the question says
    ("(x-1)(x+1)", "-1+x^2"),
    ("\\frac{4}{5}", "\\frac{16}{20}"),
    ("\\frac{4}{5}", QUESTION),
    ("0.5", "\\int_0^1 x dx"),
    ("\\frac{1}{3}", "0.333333"),
    ("\\pi", "3.14159265"),
    ("\\sqrt{2}", "1.41421356"),
    ("9", "9^{9^{9^9}}"),
    ("120", "(10^{10})!"),
    ("445", "9**9**9"),
    ("445", "{" * 200),
    ("445", "\\frac{" * 60),
    ("x=3", "0=0"),
    ("3s^2", "3"),
    ("x - 3z = 0", "#### 0\n#### x - 3z = 0"),
    ("x=3", "y=3"),
    ("20x + 23y - 69 = 0", "0"),
    ("20x + 23y - 69 = 0", "27x + 23y - 69 = 0"),
    ("20x + 23y - 69 = 0", "0 = 0"),
    ("12", "3 4"),  # no sign between them, so no product
    ("5", "factor(5)"),
    ("5", "__import__('os').system('true')"),
    ("(2,1)", "7, 3, (2,1) \\text{ or } (1,2)"),
]


@pytest.fixture(scope="module")
def maths() -> MathsReward:
    return MathsReward()


def rollout(gold: str, text: str) -> Rollout:
    return Rollout(Problem("m", QUESTION, gold, "", 0, "k"), "", text)


@pytest.mark.parametrize(("gold", "text"), RIGHT)
def test_what_is_right(maths: MathsReward, gold: str, text: str) -> None:
    assert maths(rollout(gold, text)).value == 1.0


@pytest.mark.parametrize(("gold", "text"), WRONG)
def test_what_is_wrong(maths: MathsReward, gold: str, text: str) -> None:
    assert maths(rollout(gold, text)).value == 0.0


def test_a_gold_that_cannot_be_read_is_never_right(maths: MathsReward) -> None:
    """The mistake of open-r1#293: an unreadable right answer gave every answer a 1."""
    for gold in ("}{", "", "\\frac{1}{", "\\begin{cases} 1"):
        score = maths(rollout(gold, "5"))
        assert score.value is None and score.reason


def test_what_takes_too_long_is_not_judged_and_the_next_answer_is() -> None:
    short = MathsReward(MathsConfig(seconds=0.3, workers=1))
    begun = time.monotonic()
    score = short(rollout("\\int_0^1 \\sin(\\sin(x))^9 dx", "\\int_0^1 \\sin(\\sin(x))^8 dx"))
    assert score.value is None and "0.3 s" in score.reason
    assert time.monotonic() - begun < 60  # of minutes that it would take
    assert short(rollout("x+1", "1+x")).value == 1.0


def test_many_at_once_are_judged_as_one_by_one(maths: MathsReward) -> None:
    both = [rollout(gold, text) for gold, text in (*RIGHT, *WRONG)]
    assert [score.value for score in maths.score_all(both)] == [1.0] * len(RIGHT) + [0.0] * len(WRONG)


def test_the_last_formula_counts_only_if_that_is_asked_for(maths: MathsReward) -> None:
    text = "We find $x = 4$, and in the end $2\\sqrt{3}$"
    assert maths(rollout("2\\sqrt{3}", text)).value == 0.0
    assert MathsReward(MathsConfig(read="last"))(rollout("2\\sqrt{3}", text)).value == 1.0
