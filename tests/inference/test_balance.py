"""What keeps ranks even between two steps: it looks when there is enough to see, thinks in small pieces, moves few at
a time, and forgets a plan that is refused.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.expert_placement import Step, count_moves, imbalance
from liaoyuan.inference.spread import balance
from liaoyuan.inference.spread.balance import Balance
from liaoyuan.parallel.expert_table import first_placement

EXPERTS, RANKS, SLOTS, LAYERS = 16, 4, 6, 3


class Placed:
    """A stand-in for `PlacedExperts`: the same arrays, and nothing behind them."""

    def __init__(self) -> None:
        self.experts, self.ranks = EXPERTS, RANKS
        self.placement = np.stack([first_placement(EXPERTS, RANKS, SLOTS)] * LAYERS)
        self.rows = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
        self.busiest, self.total = np.zeros((2, LAYERS), dtype=np.int64)
        self.expert_bytes, self.copies_bytes = balance.MOVE_BYTES // 3, 7
        self.moved: list[int] = []
        self.refuses = False

    def loads(self) -> np.ndarray:
        return self.rows.copy()

    def forget_loads(self) -> None:
        self.rows[:] = 0

    def step(self, loads: np.ndarray) -> None:
        """Let rows come to experts as `loads` [layers, experts] says."""
        self.rows += loads
        self.total += loads.sum(1)
        self.busiest += (imbalance(self.placement, loads.astype(float)) * loads.sum(1) / RANKS).astype(np.int64)

    def move(self, placement: np.ndarray) -> int:
        if self.refuses:
            raise LiaoyuanError("no memory")
        self.moved.append(count_moves(self.placement, placement))
        self.placement = placement
        return self.moved[-1]


class Clock:
    now, tick = 0.0, 0.0005  # that anything takes

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def opened(seconds: float | None) -> tuple[Placed, Any, Clock]:
    placed, clock = Placed(), Clock()
    return placed, Balance(placed, placed.move, seconds, clock), clock  # type: ignore[arg-type]


def uneven() -> np.ndarray:
    return np.tile(np.repeat([400, 40, 20, 10], EXPERTS // 4), (LAYERS, 1))


def run(keep: Any, placed: Placed, loads: np.ndarray, steps: int) -> None:
    for _ in range(steps):
        placed.step(loads)
        keep.before_step()


def test_work_becomes_even_by_few_moves_at_a_time() -> None:
    placed, keep, _ = opened(0.0)
    assert imbalance(placed.placement, uneven()).min() > 3
    run(keep, placed, uneven(), 500)
    assert imbalance(placed.placement, uneven()).max() < 1.05
    assert len(placed.moved) > 3 and max(placed.moved) <= 3
    said = keep.statistics()
    assert said["expert_moves"] == sum(placed.moved) and said["expert_copies_bytes"] == 7
    assert said["expert_looks"] > 1 and said["expert_refusals"] == 0


def test_the_imbalance_is_that_of_late() -> None:
    placed, keep, _ = opened(None)
    assert keep.statistics()["expert_imbalance"] == 1.0
    run(keep, placed, uneven(), 3)
    assert keep.statistics()["expert_imbalance"] == pytest.approx(imbalance(placed.placement, uneven())[0], rel=0.01)
    run(keep, placed, np.full((LAYERS, EXPERTS), 50), 4 * balance.HALF_LIFE)
    assert keep.statistics()["expert_imbalance"] < 1.5
    assert not placed.moved and keep.looks == 0


def test_a_look_waits_for_its_time_and_for_enough_rows() -> None:
    placed, keep, clock = opened(10.0)
    run(keep, placed, uneven(), 20)
    assert keep.looks == 0
    clock.now += 10
    placed.rows[:] = 0
    run(keep, placed, np.ones((LAYERS, EXPERTS), dtype=np.int64), balance.FEWEST_ROWS - 1)
    assert keep.looks == 0
    run(keep, placed, uneven(), 1)
    assert keep.looks == 1


def test_thinking_takes_a_small_part_of_the_time() -> None:
    _, keep, clock = opened(0.0)
    clock.tick = 0.0

    def slow() -> Iterator[list[Step]]:
        for _ in range(100):
            clock.now += 0.001
            yield []

    keep._thinking = slow()
    steps = 0
    while keep._thinking is not None:
        before = clock.now
        keep.before_step()
        assert clock.now - before < balance.THINK_SECONDS + 0.0015
        clock.now += 0.001
        steps += 1
    assert 0.001 * steps > 8 * 0.1


def test_a_refused_plan_is_forgotten_and_made_again() -> None:
    placed, keep, _ = opened(0.0)
    placed.refuses = True
    before = placed.placement.copy()
    with pytest.raises(LiaoyuanError, match="no memory"):
        run(keep, placed, uneven(), 500)
    assert (placed.placement == before).all() and not keep._lots
    assert keep.statistics()["expert_refusals"] == 1
    placed.refuses = False
    run(keep, placed, uneven(), 500)
    assert imbalance(placed.placement, uneven()).max() < 1.05


def test_slow_moves_must_gain_more() -> None:
    counts = []
    for seconds in (0.0, 3.0):  # that a move takes
        placed, keep, clock = opened(10.0)
        move = keep._move

        def slow(placement: np.ndarray, move: Any = move, clock: Clock = clock, seconds: float = seconds) -> int:
            sent: int = move(placement)
            clock.now += seconds * sent
            return sent

        keep._move = slow
        loads = uneven()
        for _ in range(4):  # what is asked for changes, and changes again
            clock.now += 10
            run(keep, placed, loads, 300)
            loads = loads[:, ::-1]
        counts.append(sum(placed.moved))
    assert counts[1] < counts[0]
