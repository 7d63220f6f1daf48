"""Two computations side by side, operator by operator, of which only one runs at a time.

Each has a thread that stops at every operator until both are there, so no more is kept than the two hold themselves.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from liaoyuan.ops.watch import Around, Call, tensors_in

LOOK_AHEAD = 64  # calls of each side among which the next common one is looked for after the two have parted
PASSED_OVER = (  # operators that move or make tensors and compute nothing: another device or dtype calls others of them
    *("aten._to_copy", "aten.copy_", "aten.clone", "aten._unsafe_view", "aten._reshape_copy", "aten.detach"),
    *("aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided"),
    *("aten.zeros", "aten.zeros_like", "aten.new_zeros", "aten.ones", "aten.ones_like", "aten.full", "aten.full_like"),
    *("aten.arange", "aten.lift_fresh", "aten._local_scalar_dense", "aten.fill_", "aten.zero_"),
)


@dataclass(frozen=True, eq=False)
class Seen:
    """A call and what it gave."""

    call: Call
    outputs: tuple[Tensor, ...]


Pair = tuple[Seen | None, Seen | None]


@contextmanager
def side_by_side(first: Callable[[Around], None], second: Callable[[Around], None]) -> Iterator[Iterator[Pair]]:
    """Yield the pairs of calls of two computations, each of which hands its calls to the `Around` that it is given.

    A call that only one of them makes is paired with None. Raises what a computation raises. Leaving the block early
    ends both.
    """
    sides = [_Side(first), _Side(second)]
    try:
        yield _aligned(*sides)
    finally:
        for side in sides:
            side.close()


class _Ended(BaseException):
    """Unwinds the thread of a computation that is no longer wanted."""


class _Side:
    """A computation in a thread of its own that waits after each of its calls."""

    def __init__(self, job: Callable[[Around], None]) -> None:
        self._job = job
        self._go, self._there = threading.Semaphore(0), threading.Semaphore(0)
        self._seen: Seen | None = None
        self._failure: BaseException | None = None
        self._is_closing = self._is_over = False
        self._cores = torch.get_num_threads()
        self._thread = threading.Thread(target=self._live, name="liaoyuan-side", daemon=True)
        self._thread.start()

    def next(self) -> Seen | None:
        """Let it run to its next call and return that, or None if it has ended."""
        if self._is_over:
            return None
        self._go.release()
        self._there.acquire()
        if self._failure is not None:
            raise self._failure
        return self._seen

    def close(self) -> None:
        """End it, wherever it is."""
        self._is_closing = True
        self._go.release()
        self._thread.join()

    def _live(self) -> None:
        self._go.acquire()
        try:
            if not self._is_closing:
                torch.set_num_threads(self._cores)  # a setting of each thread
                with torch.autograd.set_multithreading_enabled(False):  # backward passes share threads otherwise
                    self._job(self._around)
        except _Ended:
            pass
        except BaseException as error:
            self._failure = error
        self._seen, self._is_over = None, True
        self._there.release()

    def _around(self, call: Call, compute: Callable[[], Any]) -> Any:
        output = compute()
        if self._is_closing:
            raise _Ended
        if call.function.is_view or call.operator in PASSED_OVER:
            return output
        outputs = tuple(tensors_in(output))
        if outputs:
            self._seen = Seen(call, outputs)
            self._there.release()
            self._go.acquire()
        return output


def _aligned(first: _Side, second: _Side) -> Iterator[Pair]:
    left, right = _Coming(first), _Coming(second)
    while left.has(1) | right.has(1):
        if left.key(0) == right.key(0):
            yield left.take(), right.take()
            continue
        skipped_left, skipped_right = _next_meeting(left, right)
        for _ in range(skipped_left):
            yield left.take(), None
        for _ in range(skipped_right):
            yield None, right.take()


def _next_meeting(left: "_Coming", right: "_Coming") -> tuple[int, int]:
    """Return how many calls of each side precede the next one that both make."""
    left.has(LOOK_AHEAD)
    right.has(LOOK_AHEAD)
    places = [(i, j) for i in range(len(left)) for j in range(len(right)) if left.key(i) == right.key(j)]
    return min(places, key=sum, default=(len(left), len(right)))


class _Coming:
    """The next calls of a side. Those that it has gone past are copies: it may change its tensors in place."""

    def __init__(self, side: _Side) -> None:
        self._side, self._calls = side, deque[Seen]()

    def __len__(self) -> int:
        return len(self._calls)

    def has(self, count: int) -> bool:
        """Let the side run until so many calls are known; return whether there are so many."""
        while len(self._calls) < count:
            if self._calls:
                last = self._calls[-1]
                self._calls[-1] = replace(last, outputs=tuple(x.clone() for x in last.outputs))
            seen = self._side.next()
            if seen is None:
                return False
            self._calls.append(seen)
        return True

    def key(self, place: int) -> tuple[str, str, str] | None:
        return self._calls[place].call.key if place < len(self._calls) else None

    def take(self) -> Seen:
        return self._calls.popleft()
