"""The interval covers the truth about as often as it says, for problems and for seeds."""

import numpy as np

from liaoyuan.evaluation import bootstrap


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        interval = bootstrap(random.random((1, 300)) < 0.3, resamples=300, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_seeds_that_disagree_widen_it() -> None:
    random = np.random.default_rng(2)
    alike = (random.random((3, 1000)) < 0.5).astype(float)
    apart = (random.random((3, 1000)) < np.array([[0.3], [0.5], [0.7]])).astype(float)
    narrow, wide = bootstrap(alike), bootstrap(apart)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_mean_order_and_repeatability() -> None:
    outcomes = np.eye(4)
    interval = bootstrap(outcomes)
    assert interval.mean == 0.25 and interval.low <= 0.25 <= interval.high
    assert interval == bootstrap(outcomes)
    constant = bootstrap(np.ones((2, 5)))
    assert (constant.low, constant.mean, constant.high) == (1.0, 1.0, 1.0)
