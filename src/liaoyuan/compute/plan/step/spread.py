"""How sure a result is that rests on uncertain figures, and which of them make its range as wide.

Each figure is moved alone to either end of its own range; what that does to the logarithm of the result is added in
quadrature.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from liaoyuan.compute.plan.machine.profile import DeviceProfile, Figure
from liaoyuan.compute.plan.span import Z90, Span


def range_of(figure: Figure) -> Span:
    """Return the span of a figure."""
    return Span(figure.at(-Z90).median, figure.median, figure.at(Z90).median)


@dataclass(frozen=True)
class Spread:
    """A result, and by how much each figure alone moves its logarithm, down (at most 0) and up."""

    median: float
    moves: Mapping[str, tuple[float, float]]

    @cached_property
    def span(self) -> Span:
        down, up = (math.hypot(*(move[side] for move in self.moves.values())) for side in (0, 1))
        return Span(self.median * math.exp(-down), self.median, self.median * math.exp(up))

    @property
    def shares(self) -> dict[str, float]:
        """Of the variance of the logarithm, by figure, largest first."""
        squares = {name: (up - down) ** 2 for name, (down, up) in self.moves.items()}
        total = sum(squares.values()) or 1.0
        return {name: one / total for name, one in sorted(squares.items(), key=lambda item: -item[1]) if one > 0}


def spread(median: float, ends: Mapping[str, tuple[float, float]]) -> Spread:
    """Return how sure a positive result is. ends: by figure, what it is with that figure at either end alone."""
    found = dict[str, tuple[float, float]]()
    for name, values in ends.items():
        logs = [math.log(value / median) for value in values]
        found[name] = min(0.0, *logs), max(0.0, *logs)
    return Spread(median, found)


def ends_of(profile: DeviceProfile) -> dict[str, tuple[DeviceProfile, DeviceProfile]]:
    """Return by uncertain figure the profile with it alone at either end of its range, all others at their medians."""

    def moved(which: str, z: float) -> DeviceProfile:
        return profile.with_figures(lambda name, figure: figure.at(z if name == which else 0.0))

    return {name: (moved(name, -Z90), moved(name, Z90)) for name, figure in profile.figures().items() if figure.sigma}


def spread_of(value: Callable[[DeviceProfile], float], profile: DeviceProfile) -> Spread:
    """Return how sure a positive value of a profile is. value: of a profile whose figures are certain."""
    ends = {name: (value(low), value(high)) for name, (low, high) in ends_of(profile).items()}
    return spread(value(profile.median()), ends)
