"""The adapters of an engine: loaded and unloaded while it works, each row of a step with its own.

Adapters of one shape are stacked, so a step takes two grouped products a projection however many are loaded; it takes
more only for rows of adapters of different shapes. A row's bits depend on its own adapter alone.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from liaoyuan.checkpoint.adapters import AdapterWeights, read_adapter
from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.models import Decoder
from liaoyuan.models.lora import Pair, Stack, Stacked, projections

BASE = 0  # the number of no adapter
Shape = tuple[tuple[str, int], ...]  # see `AdapterWeights`


@dataclass(frozen=True)
class Loaded:
    """An adapter in an engine. number: never given twice, as names are; digest: see `AdapterWeights`.

    shape, place: its stack, and where in it.
    """

    name: str
    number: int
    digest: str
    folder: str
    rank: int
    shape: Shape
    place: int


NONE = Loaded("", BASE, "", "", 0, (), 0)


class Adapters:
    """What is loaded; every change either happens or raises."""

    def __init__(self, model: Decoder, is_whole: bool = True) -> None:
        """is_whole: whether all of the model is in this process; else nothing can be loaded."""
        self._model, self._is_whole = model, is_whole
        self._known: dict[str, Loaded] = {}
        self._leaving: dict[int, Loaded] = {}  # unloaded, but requests that came before still use them
        self._stacks: dict[Shape, Stack] = {}
        self._free: dict[Shape, list[int]] = {}  # places of a stack that nobody has
        self._stacked: dict[str, Stacked] = {}  # of each projection that any stack changes
        self._last = BASE

    def __bool__(self) -> bool:
        """Whether any request may have one."""
        return bool(self._known or self._leaving)

    def loaded(self) -> list[Loaded]:
        """Return those that new requests may name."""
        return list(self._known.values())

    @property
    def nbytes(self) -> int:
        return sum(stack.nbytes for stack in self._stacks.values())

    def find(self, name: str) -> Loaded:
        """Return the adapter of this name, `NONE` for "".

        Raises:
            LiaoyuanError: there is no such adapter.
        """
        if not name:
            return NONE
        if name not in self._known:
            hint = nearest(name, self._known) or "."
            raise LiaoyuanError(f"There is no adapter '{name}'{hint}")
        return self._known[name]

    def check_name(self, name: str) -> None:
        """Raise LiaoyuanError if an adapter of this name could not be loaded now."""
        if not self._is_whole:
            raise LiaoyuanError("Adapters need the whole model in one process: serve it without --tp and --ep.")
        if not name:
            raise LiaoyuanError("An adapter needs a name.")
        if name in self._known:
            raise LiaoyuanError(f"There is already an adapter '{name}': unload it first, or choose another name.")

    def load(self, name: str, folder: Path) -> Loaded:
        """Read the adapter in `folder` and call it `name`; see `read` and `check_name` for what is refused."""
        self.check_name(name)
        return self.add(name, folder, self.read(folder))

    def read(self, folder: Path) -> AdapterWeights:
        """Read an adapter for `add`; see `read_adapter`. Any thread may, while the engine works."""
        return read_adapter(folder, self._model)

    def add(self, name: str, folder: Path, adapter: AdapterWeights) -> Loaded:
        """Take in an adapter that has been read."""
        self.check_name(name)
        self._last += 1
        place = self._put(adapter)
        loaded = Loaded(name, self._last, adapter.digest, str(folder), adapter.rank, adapter.shape, place)
        self._known[name] = loaded
        return loaded

    def unload(self, name: str, in_use: Iterable[int] = ()) -> None:
        """Forget an adapter: new requests cannot name it; those whose numbers are `in_use` keep it to their end.

        Raises:
            LiaoyuanError: there is no such adapter.
        """
        number = self.find(name).number
        if number == BASE:
            raise LiaoyuanError("The base model is not an adapter; it cannot be unloaded.")
        self._leaving[number] = self._known.pop(name)
        self.release(in_use)

    def release(self, in_use: Iterable[int]) -> None:
        """Free what has been unloaded and whose last request has ended."""
        if self._leaving:
            used = set(in_use)
            for number in [number for number in self._leaving if number not in used]:
                self._remove(self._leaving.pop(number))

    @property
    def has_leaving(self) -> bool:
        """Whether `release` has something to wait for."""
        return bool(self._leaving)

    @contextlib.contextmanager
    def chosen(self, numbers: Sequence[int], counts: np.ndarray) -> Iterator[None]:
        """Within this, the model's rows have adapters: of each sequence its number, [S], and how many rows, int64 [S].

        Outside, the model is the base.
        """
        if not any(numbers):
            yield
            return
        self._choose(np.array(numbers, dtype=np.int64), counts)
        try:
            yield
        finally:
            self._clear()

    @contextlib.contextmanager
    def everywhere(self, name: str) -> Iterator[None]:
        """Within this, all rows of the model have the adapter `name` ("": none), to the bits that steps give them.

        Raises:
            LiaoyuanError: there is no such adapter.
        """
        one = self.find(name)
        if one is not NONE:
            self._stacks[one.shape].place = one.place
        try:
            yield
        finally:
            self._clear()

    def _clear(self) -> None:
        for stack in self._stacks.values():
            stack.choose([], [])

    def _choose(self, numbers: np.ndarray, counts: np.ndarray) -> None:
        by_number = {one.number: one for one in (*self._known.values(), *self._leaving.values())}
        wanted = [by_number[number] for number in np.unique(numbers).tolist() if number != BASE]
        owner = np.repeat(numbers, counts)
        for shape, stack in self._stacks.items():
            mine = sorted((one for one in wanted if one.shape == shape), key=lambda one: one.place)
            rows = [np.flatnonzero(owner == one.number) for one in mine]
            stack.choose(rows, [one.place for one in mine])

    def _put(self, adapter: AdapterWeights) -> int:
        """Give an adapter a place in the stack of its shape."""
        shape = adapter.shape
        if shape not in self._stacks:
            self._attach(shape, adapter.weights)
            return 0
        stack, free = self._stacks[shape], self._free[shape]
        if free:
            stack.replace(free[-1], adapter.weights)
            return free.pop()
        stack.grow(adapter.weights)
        return stack.count - 1

    def _attach(self, shape: Shape, weights: Mapping[str, Pair]) -> None:
        """Begin a stack, and let the projections that it changes know."""
        modules = projections(self._model)
        for name in weights:
            if modules[name].adapter is not self._stacked.get(name):
                raise LiaoyuanError(f"{name} has an adapter already, which is in training or of another engine.")
        stack = Stack({name: (a[None].clone(), b[None].clone()) for name, (a, b) in weights.items()})
        for name in weights:
            stacked = self._stacked.setdefault(name, Stacked(name))
            stacked.stacks.append(stack)
            modules[name].adapter = stacked
        self._stacks[shape], self._free[shape] = stack, []

    def _remove(self, gone: Loaded) -> None:
        """Free the place of an adapter, and the stack with its last one."""
        stack, free = self._stacks[gone.shape], self._free[gone.shape]
        free.append(gone.place)
        if len(free) < stack.count:
            return
        del self._stacks[gone.shape], self._free[gone.shape]
        modules = projections(self._model)
        for name in stack.weights:
            self._stacked[name].stacks.remove(stack)
            if not self._stacked[name].stacks:
                modules[name].adapter = None
                del self._stacked[name]
