"""Rewards for form, length and language, and sums of rewards."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liaoyuan.errors import LiaoyuanError
from liaoyuan.tasks import Problem, Right, Rollout, Score, find_task, score_all
from liaoyuan.tasks.rewards import FormatReward, Mixture, make_reward
from liaoyuan.tasks.rewards.form import FormatConfig, words_by_script

PROBLEM = Problem("addition", "3+4=?", "7", "3407,", 1, "addition:3+4=?")


@pytest.mark.parametrize(
    ("thought", "text", "flaw", "value"),
    [
        ("3407,", "7", "", 1.0),
        ("", "7", "", 0.0),
        (" \n", "7", "", 0.0),
        ("3407,", "", "", 0.0),
        ("3407,", "  ", "", 0.0),
        ("3407,", "7", "cut off", 0.0),
        ("3407,", "7 </think> 8", "", 0.0),
        ("<think>3407,", "7", "", 0.0),
        ("a < b and b > c", "7", "", 1.0),
        ("3407,", "<think>", "", 0.0),
        ("3407,", "7<|im_end|>", "", 0.0),
    ],
)
def test_one_thought_then_one_answer(thought: str, text: str, flaw: str, value: float) -> None:
    assert FormatReward()(Rollout(PROBLEM, thought, text, flaw)).value == value


@pytest.mark.parametrize(
    ("text", "value"), [("\\boxed{7}", 1.0), ("7", 0.0), ("\\boxed{7} \\boxed{7}", 0.0), ("#### 7", 0.0)]
)
def test_an_answer_is_to_be_marked_once(text: str, value: float) -> None:
    assert FormatReward(FormatConfig(mark="boxed"))(Rollout(PROBLEM, "so", text)).value == value


@given(st.integers(0, 400))
def test_length_follows_the_equation_of_dapo(length: int) -> None:
    """Eq. 13 of arXiv 2503.14476 with L_max 200 and L_cache 50, written as it stands there."""
    most, cache = 200, 50
    if length <= most - cache:
        wanted = 0.0
    elif length <= most:
        wanted = ((most - cache) - length) / cache
    else:
        wanted = -1.0
    reward = make_reward("length", {"limit": most, "soft": cache}, "here")
    found = reward(Rollout(PROBLEM, "", "7", "cut off", length=length)).value
    assert found == pytest.approx(wanted) and math.copysign(1, found or 1.0) == (-1 if wanted < 0 else 1)


def test_a_thinking_budget_counts_the_thought_alone() -> None:
    reward = make_reward("length", {"limit": 20, "soft": 10, "of": "thought"}, "here")
    assert reward(Rollout(PROBLEM, "long", "7", length=100, thought_length=10)).value == 0.0
    assert reward(Rollout(PROBLEM, "long", "7", length=100, thought_length=15)).value == -0.5
    assert reward(Rollout(PROBLEM, "long", "7", length=100, thought_length=90)).value == -1.0


@pytest.mark.parametrize(
    ("text", "language", "value"),
    [
        ("The sum is seven", "en", 1.0),
        ("The sum is seven", "zh", 0.0),
        ("它们的和是七", "zh", 1.0),
        ("它们的和是七", "en", 0.0),
        ("设$x=3$，则$\\frac{x}{y}=1$。", "zh", 1.0),  # formulas have no language
        ("设x为苹果的个数", "zh", 1.0),  # nor have names of quantities
        ("7", "zh", 1.0),
        ("", "en", 1.0),
        ("和是 seven", "zh", 2 / 3),
        ("Привет мир", "en", 0.0),
        ("La réponse est sept", "en", 1.0),  # the script is looked at, not the words
        ("これは答えです", "zh", 0.25),
    ],
)
def test_language_is_a_share_of_words(text: str, language: str, value: float) -> None:
    reward = make_reward("language", {"language": language}, "here")
    found = reward(Rollout(PROBLEM, "", text)).value
    assert found == pytest.approx(value, abs=0.09)


def test_a_share_that_is_too_small_is_nothing() -> None:
    reward = make_reward("language", {"language": "zh", "share": 0.9, "of": "text"}, "here")
    assert reward(Rollout(PROBLEM, "English thoughts", "和是 seven")).value == 0.0
    assert reward(Rollout(PROBLEM, "English thoughts", "和是七")).value == 1.0


@given(st.text(max_size=80))
def test_words_are_never_negative(text: str) -> None:
    assert all(count >= 0 for count in words_by_script(text))


class Fixed:
    def __init__(self, value: float | None, name: str = "fixed") -> None:
        self.value, self.name = value, name

    def __call__(self, rollout: Rollout) -> Score:
        return Score(self.value, rollout.text, "because")


def test_a_mixture_is_the_weighted_sum_and_a_part_without_value_leaves_none() -> None:
    rollout = Rollout(PROBLEM, "", "7")
    right = Right(find_task("addition"))
    both = Mixture(((right, 1.0), (Fixed(0.5), 0.2)))(rollout)
    assert both.value == pytest.approx(1.1) and both.parsed == "7"
    assert "right 1" in both.reason and "because" in both.reason
    assert Mixture(((right, 1.0), (Fixed(None), 0.2)))(rollout).value is None
    assert Mixture(((Fixed(-1.0), 2.0),))(rollout).value == -2.0


def test_what_a_reward_gives_does_not_depend_on_the_batch() -> None:
    rollouts = [Rollout(PROBLEM, "3407,", text) for text in ("7", "8", "", "7 or 8", "7\n")]
    mixture = Mixture(((Right(find_task("addition")), 1.0), (FormatReward(), 0.1)))
    together = score_all([mixture, FormatReward()], rollouts)
    assert together == [[mixture(one) for one in rollouts], [FormatReward()(one) for one in rollouts]]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenght", {}, "did you mean 'length'"),
        ("length", {"limit": 10, "sofd": 1}, "did you mean 'soft'"),
        ("length", {"limit": 10, "soft": 20}, "at most limit"),
        ("length", {}, "'limit' is missing"),
        ("choice", {"any": 1}, "Unknown key 'any'"),
        ("number", {"read": "first"}, "read"),
    ],
)
def test_unknown_names_and_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(LiaoyuanError, match=message):
        make_reward(name, options, "tasks/x.toml, reward 1")
