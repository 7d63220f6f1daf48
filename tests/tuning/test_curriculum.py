"""Levels follow what they teach: what is mastered or out of reach is drawn less, and tried again now and then."""

from collections import Counter

import pytest

from liaoyuan.tuning.curriculum import FLOOR, draw_levels, follow

LEVELS = (2, 3, 4)


def test_draws_are_functions_of_their_seed() -> None:
    assert draw_levels((1.0, 1.0, 1.0), LEVELS, 50, "a") == draw_levels((1.0, 1.0, 1.0), LEVELS, 50, "a")
    assert draw_levels((1.0, 1.0, 1.0), LEVELS, 50, "a") != draw_levels((1.0, 1.0, 1.0), LEVELS, 50, "b")


def test_levels_are_drawn_by_what_they_teach() -> None:
    counts = Counter(draw_levels((0.8, 0.4, 0.0), LEVELS, 13_000, "a"))
    shares = [counts[level] / 13_000 for level in LEVELS]
    assert shares == pytest.approx([0.8 / 1.3, 0.4 / 1.3, FLOOR / 1.3], abs=0.02)


def test_as_a_learner_climbs_the_draws_climb_with_it() -> None:
    """A learner that has mastered all levels below `reach`, learns on `reach`, and cannot do what is above."""
    signal: tuple[float, ...] = (1.0, 1.0, 1.0)
    for reach in LEVELS:
        for step in range(40):
            drawn = draw_levels(signal, LEVELS, 16, f"{reach}/{step}")
            signal = follow(signal, LEVELS, drawn, [level == reach for level in drawn])
        counts = Counter(draw_levels(signal, LEVELS, 600, "after"))
        assert counts.most_common(1)[0][0] == reach and min(counts[level] for level in LEVELS) > 20
