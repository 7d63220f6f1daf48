"""Levels follow what they teach, or keep what is solved between bounds; all are tried again now and then."""

import math
import random
from collections import Counter

import pytest

from liaoyuan.tuning.curriculum import FLOOR, Shares, Staging, draw_levels, follow, fresh_shares, level_weights

LEVELS = (2, 3, 4)
BOUNDS = (0.3, 0.7)


def test_draws_are_functions_of_their_seed() -> None:
    assert draw_levels((1.0, 1.0, 1.0), LEVELS, 50, "a") == draw_levels((1.0, 1.0, 1.0), LEVELS, 50, "a")
    assert draw_levels((1.0, 1.0, 1.0), LEVELS, 50, "a") != draw_levels((1.0, 1.0, 1.0), LEVELS, 50, "b")


def test_levels_are_drawn_by_what_they_teach() -> None:
    weights = level_weights("signal", Shares((0.8, 0.4, 0.0), (0.5, 0.5, 0.5)), BOUNDS)
    counts = Counter(draw_levels(weights, LEVELS, 13_000, "a"))
    shares = [counts[level] / 13_000 for level in LEVELS]
    assert shares == pytest.approx([0.8 / 1.3, 0.4 / 1.3, FLOOR / 1.3], abs=0.02)


def test_as_a_learner_climbs_the_draws_climb_with_it() -> None:
    """A learner that has mastered all levels below `reach`, learns on `reach`, and cannot do what is above."""
    shares = fresh_shares(LEVELS)
    for reach in LEVELS:
        for step in range(40):
            drawn = draw_levels(level_weights("signal", shares, BOUNDS), LEVELS, 16, f"{reach}/{step}")
            shares = follow(shares, LEVELS, drawn, [level == reach for level in drawn], [0.5] * len(drawn))
        counts = Counter(draw_levels(level_weights("signal", shares, BOUNDS), LEVELS, 600, "after"))
        assert counts.most_common(1)[0][0] == reach and min(counts[level] for level in LEVELS) > 20


@pytest.mark.parametrize(
    ("solved", "expected"),
    [
        ((0.9, 0.5, 0.1), (0.0, 1.0, 0.0)),
        ((0.7, 0.5, 0.3), (1 / 3, 1 / 3, 1 / 3)),
        ((0.9, 0.1, 0.0), (0.5, 0.5, 0.0)),
        ((1.0, 0.8, 0.2), (0.0, 0.5, 0.5)),
        ((0.2, 0.1, 0.0), (1.0, 0.0, 0.0)),
        ((1.0, 0.9, 0.8), (0.0, 0.0, 1.0)),
        ((0.8, 0.0, 0.0), (0.625, 0.1875, 0.1875)),
    ],
)
def test_levels_are_mixed_so_that_the_solved_share_is_within_the_bounds(
    solved: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    weights = level_weights("bounds", Shares((1.0,) * 3, solved), BOUNDS)
    tried_anyway = FLOOR / 3
    assert weights == pytest.approx([(1 - FLOOR) * share + tried_anyway for share in expected])


def learn(staging: Staging, seed: int, steps: int = 240) -> tuple[list[float], float]:
    """Return the solved shares of the steps of a learner whose skill grows by groups with signal, and that skill.

    It solves a problem of level l with probability 1 / (1 + exp(-2 (skill - l))).
    """
    levels, skill, shares, chance = tuple(range(1, 9)), 1.0, fresh_shares(range(1, 9)), random.Random(seed)
    solved = []
    for step in range(steps):
        drawn = draw_levels(level_weights(staging, shares, BOUNDS), levels, 16, f"{seed}/{step}")
        counts = [sum(chance.random() < 1 / (1 + math.exp(-2 * (skill - level))) for _ in range(8)) for level in drawn]
        taught = [0 < count < 8 for count in counts]
        shares = follow(shares, levels, drawn, taught, [count / 8 for count in counts])
        skill += 0.002 * sum(taught)
        solved.append(sum(counts) / 128)
    return solved, skill


def test_a_growing_learner_is_kept_between_the_bounds_and_learns_more() -> None:
    outside, skills = {}, {}
    for staging in ("bounds", "signal", "none"):
        runs = [learn(staging, seed) for seed in range(3)]
        means = [sum(solved[at : at + 10]) / 10 for solved, _ in runs for at in range(50, 240, 10)]
        outside[staging] = sum(not BOUNDS[0] - 0.05 <= mean <= BOUNDS[1] + 0.05 for mean in means) / len(means)
        skills[staging] = sum(skill for _, skill in runs) / 3
    assert outside["bounds"] < 0.05 < 0.3 < outside["none"]
    assert skills["bounds"] > skills["none"] + 2.0
    assert skills["signal"] > skills["none"] + 2.0


def test_what_could_not_be_judged_says_nothing() -> None:
    before = fresh_shares(LEVELS)
    assert follow(before, LEVELS, [2, 3], [False, False], [math.nan, math.nan]) == before
    after = follow(before, LEVELS, [2, 3], [False, True], [0.0, 1.0])
    assert after.signal[0] < 1.0 == after.signal[1] and after.solved[0] < 0.5 < after.solved[1]
