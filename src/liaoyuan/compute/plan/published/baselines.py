"""What a planner has to beat: one FLOP rate for each source, and a fixed share of the card's peak."""

import math
import statistics
from collections.abc import Sequence

from liaoyuan.compute.plan.published.cases import Case, as_time, peak_of

SHARE = 0.75  # of the peak, as torch's own estimator of run time takes it


def constant_rate(case: Case, fitted: Sequence[Case]) -> float:
    """Return the logarithm of a time, at the rate (as a share of the peak) that calibration rows of the same source
    have in the middle; if there are none, at that of the same generation, or of all.
    """
    same = [other for other in fitted if other.row.source == case.row.source]
    near = [other for other in fitted if other.where.generation == case.where.generation]
    rows = same or near or list(fitted)
    slower = statistics.median(other.measured - at_peak(other) for other in rows) if rows else -math.log(0.4)
    return at_peak(case) + slower


def roofline(case: Case) -> float:
    """Return the logarithm of a time in which nothing is done but products, at `SHARE` of the peak."""
    return at_peak(case) - math.log(SHARE)


def at_peak(case: Case) -> float:
    """Return the logarithm of a time in which what the model asks for is computed at the peak of the card."""
    setup = case.programs[case.draws[0]].setup
    executed = setup.model_flops() * (4 / 3 if setup.recompute == "full" else 1)
    rate = peak_of(case.where, setup) * 1e12 * setup.cards
    return as_time(case.row, case.where, setup, executed * setup.tokens / rate)
