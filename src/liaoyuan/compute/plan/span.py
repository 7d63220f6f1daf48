"""A quantity that is not known exactly: the range that holds 90% of what it may be."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Z90 = 1.6448536269514722  # standard deviations, between which and their negative lies 90% of a normal distribution


@dataclass(frozen=True)
class Span:
    """A quantity that is not known exactly: 90% of what it may be lies between low and high, log-normal to either
    side of the median.
    """

    low: float
    median: float
    high: float

    def times(self, factor: float) -> "Span":
        """Return the span of the quantity times `factor`."""
        return Span(self.low * factor, self.median * factor, self.high * factor)

    def under(self, amount: float) -> "Span":
        """Return the span of `amount` over the quantity."""
        return Span(amount / self.high, amount / self.median, amount / self.low)

    def at(self, normal: Floats) -> Floats:
        """Return the values at so many standard deviations from the median."""
        if self.high == 0:
            return np.zeros_like(normal)
        side = np.where(normal < 0, math.log(self.median / self.low), math.log(self.high / self.median))
        return np.asarray(self.median * np.exp(side * normal / Z90))


def exactly(value: float) -> Span:
    """Return the span of what is known."""
    return Span(value, value, value)
