"""Keeps the ranks of a running model evenly at work: looks at what its experts were asked for, and moves some of them.

Between two steps it thinks for a moment, or moves a few experts; `expert_placement` says which ones are worth it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.expert_placement import LoadAverage, Step, apply, lots, rebalance_slowly
from liaoyuan.parallel import Layout, PlacedExperts

HALF_LIVES = (1, 4, 16)  # in looks: what is new, and what lasts
PRICE = 0.003  # of a move, at least: it must take so much off what the busiest rank does, as a part of the mean
FEWEST_ROWS = 16  # for an expert, on the mean, that a look must see: fewer say little
THINK_SECONDS = 0.002  # between two steps, about: one part of `rebalance_slowly` takes 0.1 to 5 ms
REST = 9  # times as long it does not think afterwards
MOVE_BYTES = 2**27  # that a rank sends or gets between two steps, about
HALF_LIFE = 256  # steps, of the imbalance that is told


@dataclass(frozen=True)
class Balancing:
    """How the experts of a model are spread: further slots of each process and layer for copies of busy ones, and
    seconds between two looks at whether some should be moved (None: never).
    """

    copies: int = 0
    seconds: float | None = None


def check_balancing(balancing: Balancing, layout: Layout) -> None:
    """Raise LiaoyuanError where experts of a layout cannot have copies, or move, but should."""
    if balancing == Balancing():
        return
    if layout.ep == 1:
        raise LiaoyuanError(
            "--expert-copies and --rebalance-every are for experts that are spread over processes: give --ep, or leave "
            "them out."
        )
    if layout.exact:
        raise LiaoyuanError(
            "Experts of an exact layout lie where training has them, and have no copies: leave out --expert-copies and "
            "--rebalance-every, or --exact."
        )


class Balance:
    """Moves the experts of a model; `before_step` is to be called between any two steps."""

    def __init__(
        self,
        placed: PlacedExperts,
        move: Callable[[np.ndarray], int],
        seconds: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """move: brings experts to a placement and returns how many were sent. seconds: between two looks; None: never.

        A look waits until enough rows have come.
        """
        self._placed, self._move, self._seconds, self._clock = placed, move, seconds, clock
        self._due = 0.0 if seconds is None else clock() + seconds
        self._average = LoadAverage(*HALF_LIVES)
        self._thinking: Iterator[list[Step]] | None = None
        self._rested = 0.0  # when it may think again
        self._steps: list[Step] = []
        self._lots: list[list[Step]] = []
        self.looks = self.moves = self.refusals = 0
        self._seconds_moving = 0.0
        self._copies_bytes = placed.copies_bytes
        self._seen = self._counted()
        self._recent = np.zeros(self._seen.shape)

    def before_step(self) -> None:
        """Take up what the last step did; look, think, or move some experts if it is time.

        Raises:
            LiaoyuanError: a move was refused; experts are where they were, and the rest of this plan is forgotten.
        """
        counted = self._counted()
        self._recent = self._recent * 0.5 ** (1 / HALF_LIFE) + (counted - self._seen)
        self._seen = counted
        if self._seconds is None:
            return
        if self._lots:
            self._move_lot()
        elif self._thinking is not None:
            self._think(self._thinking)
        elif self._clock() >= self._due:
            self._look(self._seconds)

    def statistics(self) -> dict[str, Any]:
        """Return what `Engine.statistics` says of experts.

        expert_imbalance: rows of the busiest rank over those of the mean one, of late, on the mean of the layers.
        expert_looks, expert_moves, expert_refusals: since the start; a move is an expert sent to another rank.
        expert_copies_bytes: what the further slots take in each process.
        """
        busiest, total = self._recent
        ratios = busiest[total > 0] * self._placed.ranks / total[total > 0]
        return {
            "expert_imbalance": round(float(ratios.mean()), 4) if len(ratios) else 1.0,
            "expert_looks": self.looks,
            "expert_moves": self.moves,
            "expert_refusals": self.refusals,
            "expert_copies_bytes": self._copies_bytes,
        }

    def _look(self, seconds: float) -> None:
        placed = self._placed
        loads = placed.loads()
        if loads.sum(1).min() < FEWEST_ROWS * placed.experts:
            return
        placed.forget_loads()
        self._due = self._clock() + seconds
        self.looks += 1
        self._average.add(loads)
        self._thinking, self._steps = rebalance_slowly(placed.placement, self._average.load(), self._price()), []

    def _think(self, thinking: Iterator[list[Step]]) -> None:
        begin = self._clock()
        if begin < self._rested:
            return
        for steps in thinking:
            self._steps += steps
            if self._clock() - begin >= THINK_SECONDS:
                break
        else:
            self._thinking = None
            self._lots = list(lots(self._steps, MOVE_BYTES // self._placed.expert_bytes))
        now = self._clock()
        self._rested = now + REST * (now - begin)

    def _move_lot(self) -> None:
        lot, *rest = self._lots
        self._lots, begin = [], self._clock()
        try:
            sent = self._move(apply(self._placed.placement, lot))
        except Exception:
            self.refusals += 1
            raise
        self._lots = rest
        self.moves += sent
        self._seconds_moving += self._clock() - begin

    def _price(self) -> float:
        """Return what a move must gain to pay for its time until the next look: see `expert_placement.move_price`.

        Experts are taken to be all that a layer does in its share of that time; between looks without a pause a move
        costs the least that there is.
        """
        if not (self.moves and self._seconds):
            return PRICE
        return max(PRICE, self._seconds_moving / self.moves / (self._seconds / len(self._placed.placement)))

    def _counted(self) -> np.ndarray:
        return np.stack([self._placed.busiest, self._placed.total])
