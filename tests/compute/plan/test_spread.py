"""The interval of a prediction is that of its figures, and names those that make it wide."""

import math

import pytest

from liaoyuan.compute.plan import read_cluster
from liaoyuan.compute.plan.machine.profile import assumed
from liaoyuan.compute.plan.span import Z90
from liaoyuan.compute.plan.step.spread import spread_of


def test_powers_of_figures_have_the_width_of_their_logarithms() -> None:
    profile = assumed(read_cluster("h100"))
    memory, launch = profile.memory.sigma, profile.launch.sigma
    found = spread_of(lambda one: one.launch.median**2 / one.memory.median, profile)
    span, width = found.span, found.shares
    wide = Z90 * math.hypot(2 * launch, memory)
    assert span.median == pytest.approx(profile.launch.median**2 / profile.memory.median)
    assert (math.log(span.high / span.median), math.log(span.median / span.low)) == pytest.approx((wide, wide))
    shares = {"launch": (2 * launch) ** 2, "memory": memory**2}
    assert width == pytest.approx({name: share / sum(shares.values()) for name, share in shares.items()})
    assert next(iter(width)) == "launch"


def test_what_bounds_one_side_alone_widens_that_side_alone() -> None:
    profile = assumed(read_cluster("h100"))
    floor = profile.call.median
    span = spread_of(lambda one: max(one.call.median, floor), profile).span
    assert span.low == pytest.approx(span.median) and span.high > span.median


def test_figures_that_are_certain_make_a_point() -> None:
    found = spread_of(lambda one: one.memory.median, assumed(read_cluster("h100")).median())
    assert found.span.low == found.span.median == found.span.high and found.shares == {}
