"""The learning rate: where it begins, peaks and ends."""

import pytest

from liaoyuan.training.schedule import Shape, learning_rate_at

STEPS, WARMUP, PEAK = 100, 10, 0.5


def rates(shape: Shape) -> list[float]:
    return [learning_rate_at(step, STEPS, PEAK, WARMUP, shape) for step in range(STEPS)]


@pytest.mark.parametrize("shape", ["cosine", "linear", "trapezoid", "constant"])
def test_it_rises_to_the_peak_and_never_rises_again(shape: Shape) -> None:
    values = rates(shape)
    assert 0 < values[0] < values[WARMUP - 1] < PEAK
    assert values[WARMUP] == max(values) == pytest.approx(PEAK)
    assert all(now >= after for now, after in zip(values[WARMUP:], values[WARMUP + 1 :], strict=False))


def test_it_ends_where_the_shape_says() -> None:
    assert rates("linear")[-1] == pytest.approx(PEAK / 90)
    assert rates("cosine")[-1] == pytest.approx(PEAK * 0.1, rel=0.01)
    assert rates("constant")[-1] == PEAK
    assert rates("trapezoid")[63] == PEAK and rates("trapezoid")[-1] == pytest.approx(PEAK / 36)


def test_no_warm_up_is_allowed() -> None:
    assert learning_rate_at(0, 1, PEAK, 0, "linear") == PEAK
