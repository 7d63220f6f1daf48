"""The adapters of an engine: loaded and unloaded while it works, each row of a step with its own."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from liaoyuan.checkpoint.adapters import AdapterWeights
from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.inference.adapter_stacks import BASE, Stacks


@dataclass(frozen=True)
class Loaded:
    """An adapter in an engine. number: never given twice, as names are; digest: see `AdapterWeights`."""

    name: str
    number: int
    digest: str
    folder: str
    rank: int


NONE = Loaded("", BASE, "", "", 0)


class Adapters:
    """What is loaded; every change either happens or raises."""

    def __init__(self, stacks: Stacks) -> None:
        """stacks: where their weights are."""
        self._stacks = stacks
        self._known: dict[str, Loaded] = {}
        self._leaving: dict[int, Loaded] = {}  # unloaded, but requests that came before still use them

    def __bool__(self) -> bool:
        """Whether any request may have one."""
        return bool(self._known or self._leaving)

    def loaded(self) -> list[Loaded]:
        """Return those that new requests may name."""
        return list(self._known.values())

    @property
    def nbytes(self) -> int:
        return self._stacks.nbytes

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
        return self._stacks.read(folder)

    def add(self, name: str, folder: Path, adapter: AdapterWeights) -> Loaded:
        """Take in an adapter that has been read."""
        self.check_name(name)
        loaded = Loaded(name, self._stacks.put(adapter), adapter.digest, str(folder), adapter.rank)
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
                del self._leaving[number]
                self._stacks.remove(number)

    @property
    def has_leaving(self) -> bool:
        """Whether `release` has something to wait for."""
        return bool(self._leaving)

    @contextlib.contextmanager
    def chosen(self, numbers: Sequence[int], counts: np.ndarray) -> Iterator[None]:
        """Within this, the model's rows have adapters: of each sequence its number, [S], and how many rows, int64 [S].

        Outside, the model is the base.
        """
        self._stacks.choose(np.array(numbers, dtype=np.int64), counts)
        try:
            yield
        finally:
            self._stacks.clear()

    @contextlib.contextmanager
    def everywhere(self, name: str) -> Iterator[None]:
        """Within this, all rows of the model have the adapter `name` ("": none), to the bits that steps give them.

        Raises:
            LiaoyuanError: there is no such adapter.
        """
        one = self.find(name)
        if one is not NONE:
            self._stacks.choose_one(one.number)
        try:
            yield
        finally:
            self._stacks.clear()
