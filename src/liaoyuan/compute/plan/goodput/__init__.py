"""What failures leave of a job's time: many lives of it, the best interval between saves, and the spares it needs."""

from liaoyuan.compute.plan.goodput.choose import Choice, Choices, best_every, best_spares, formula_every, with_choice
from liaoyuan.compute.plan.goodput.closed_form import availability, daly, expected_ettr, expected_time, young
from liaoyuan.compute.plan.goodput.estimate import Goodput, Run, goodput

__all__ = [
    "Choice",
    "Choices",
    "Goodput",
    "Run",
    "availability",
    "best_every",
    "best_spares",
    "daly",
    "expected_ettr",
    "expected_time",
    "formula_every",
    "goodput",
    "with_choice",
    "young",
]
