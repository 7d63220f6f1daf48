"""The weights of adapters in a process, stacked by shape, and which rows of a pass have which.

Adapters of one shape are stacked, so a step takes two grouped products a projection however many are loaded; it takes
more only for rows of adapters of different shapes. A row's bits depend on its own adapter alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from liaoyuan.checkpoint.adapters import AdapterWeights, read_adapter
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder
from liaoyuan.models.lora import Pair, Stack, Stacked, projections

BASE = 0  # the number of no adapter
Shape = tuple[tuple[str, int], ...]  # see `AdapterWeights`


@dataclass(frozen=True)
class _Place:
    """Where an adapter is: its stack, and which one of it."""

    shape: Shape
    index: int


class Stacks:
    """The adapters of one model by number; no number is given twice."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._places: dict[int, _Place] = {}
        self._stacks: dict[Shape, Stack] = {}
        self._free: dict[Shape, list[int]] = {}  # places of a stack that nobody has
        self._stacked: dict[str, Stacked] = {}  # of each projection that any stack changes
        self._last = BASE

    @property
    def nbytes(self) -> int:
        return sum(stack.nbytes for stack in self._stacks.values())

    def read(self, folder: Path) -> AdapterWeights:
        """Read an adapter for `put`; see `read_adapter`."""
        return read_adapter(folder, self._model)

    def put(self, adapter: AdapterWeights) -> int:
        """Take in an adapter; return its number.

        Raises:
            LiaoyuanError: one of its projections has another adapter, which is not of these.
        """
        self.check(adapter)
        return self.take(adapter.shape, adapter.weights)

    def take(self, shape: Shape, weights: Mapping[str, Pair]) -> int:
        """Take in the pairs of an adapter that has been checked, or this process's part of them; as `put`."""
        self._last += 1
        self._places[self._last] = _Place(shape, self._index(shape, weights))
        return self._last

    def check(self, adapter: AdapterWeights) -> None:
        """Raise LiaoyuanError if `put` would."""
        modules = projections(self._model)
        for name in adapter.weights:
            if modules[name].adapter is not self._stacked.get(name):
                raise LiaoyuanError(f"{name} has an adapter already, which is in training or of another engine.")

    def remove(self, number: int) -> None:
        """Free the place of an adapter, and the stack with its last one."""
        place = self._places.pop(number)
        stack, free = self._stacks[place.shape], self._free[place.shape]
        free.append(place.index)
        if len(free) < stack.count:
            return
        del self._stacks[place.shape], self._free[place.shape]
        modules = projections(self._model)
        for name in stack.weights:
            self._stacked[name].stacks.remove(stack)
            if not self._stacked[name].stacks:
                modules[name].adapter = None
                del self._stacked[name]

    def choose(self, numbers: np.ndarray, counts: np.ndarray) -> None:
        """Say what the rows of the next passes have: of each sequence its adapter's number, int64 [S], and how many
        rows are its own, int64 [S].
        """
        owner = np.repeat(numbers, counts)
        wanted = [number for number in np.unique(numbers).tolist() if number != BASE]
        for shape, stack in self._stacks.items():
            mine = [number for number in wanted if self._places[number].shape == shape]
            mine.sort(key=lambda number: self._places[number].index)
            rows = [np.flatnonzero(owner == number) for number in mine]
            stack.choose(rows, [self._places[number].index for number in mine])

    def choose_one(self, number: int) -> None:
        """Say that all rows of the next passes have this adapter, to the bits that `choose` gives them."""
        place = self._places[number]
        self._stacks[place.shape].place = place.index

    def clear(self) -> None:
        """Say that the next passes have none."""
        for stack in self._stacks.values():
            stack.choose([], [])

    def _index(self, shape: Shape, weights: Mapping[str, Pair]) -> int:
        """Give an adapter a place in the stack of its shape."""
        if shape not in self._stacks:
            self._begin(shape, weights)
            return 0
        stack, free = self._stacks[shape], self._free[shape]
        if free:
            stack.replace(free[-1], weights)
            return free.pop()
        stack.grow(weights)
        return stack.count - 1

    def _begin(self, shape: Shape, weights: Mapping[str, Pair]) -> None:
        """Begin a stack, and let the projections that it changes know."""
        modules = projections(self._model)
        stack = Stack({name: (a[None].clone(), b[None].clone()) for name, (a, b) in weights.items()})
        for name in weights:
            stacked = self._stacked.setdefault(name, Stacked(name))
            stacked.stacks.append(stack)
            modules[name].adapter = stacked
        self._stacks[shape], self._free[shape] = stack, []
