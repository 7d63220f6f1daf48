"""The blocks of the cache: who holds them, and which are known by what they contain.

A full block is known by a key that stands for all tokens up to its end (`sequence.block_keys`), so a prompt that begins
as an earlier one did finds its keys and values here. A block that nobody holds keeps its content until the space is
needed; the one that was let go longest ago goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

Key = bytes


class BlockPool:
    """Numbers of blocks with reference counts. A blank block has no known content; an idle one has, and no holder."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._blank = np.arange(size - 1, -1, -1, dtype=np.int32)  # a stack: last in, first out, stays warm
        self._blanks = size
        self._holders = np.zeros(size, dtype=np.int32)
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def free(self) -> int:
        """How many blocks nobody holds."""
        return self._blanks + len(self._idle)

    @property
    def cached(self) -> int:
        """How many of the free ones have known content."""
        return len(self._idle)

    def take(self, count: int) -> np.ndarray:
        """Return `count` blocks for one holder, int32 [count]; the caller has seen that there are as many."""
        assert count <= self.free, "more blocks taken than are free"
        while self._blanks < count:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
            self._put_blank(np.array([block], dtype=np.int32))
        self._blanks -= count
        blocks = self._blank[self._blanks : self._blanks + count].copy()
        self._holders[blocks] = 1
        return blocks

    def share(self, blocks: np.ndarray) -> None:
        """Let one more hold these (different) blocks."""
        if self._idle:
            for block in blocks.tolist():
                self._idle.pop(block, None)
        self._holders[blocks] += 1

    def give(self, blocks: np.ndarray) -> None:
        """Let go of these (different) blocks."""
        self._holders[blocks] -= 1
        left = blocks[self._holders[blocks] == 0]
        blank = []
        for block in left[::-1].tolist():  # the first of a prompt serve most others: they go last
            if block in self._key_of:
                self._idle[block] = None
            else:
                blank.append(block)
        self._put_blank(np.array(blank, dtype=np.int32))

    def find(self, keys: Sequence[Key]) -> np.ndarray:
        """Return the blocks of the longest known beginning of `keys`, int32."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return np.array(found, dtype=np.int32)

    def idle_among(self, blocks: np.ndarray) -> int:
        """Return how many of these blocks nobody holds."""
        return int((self._holders[blocks] == 0).sum())

    def remember(self, key: Key, block: int) -> None:
        """Let a held block be found by its content; if another is known by it already, nothing changes."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def forget(self) -> None:
        """Forget all contents."""
        self._put_blank(np.array(list(self._idle), dtype=np.int32))
        self._idle.clear()
        self._block_of.clear()
        self._key_of.clear()

    def check(self, held: np.ndarray) -> None:
        """Raise AssertionError unless blank, idle and held blocks are all there are; held: with repetitions."""
        blank, idle = self._blank[: self._blanks], np.array(list(self._idle), dtype=np.int32)
        whole = np.sort(np.concatenate([blank, idle, np.unique(held)]))
        counts = np.bincount(held, minlength=self.size)
        keys = self._key_of.keys() == set(self._block_of.values()) and self._idle.keys() <= self._key_of.keys()
        if not (np.array_equal(whole, np.arange(self.size)) and np.array_equal(counts, self._holders) and keys):
            raise AssertionError(
                f"cache blocks leaked: of {self.size} blocks {len(blank)} are blank, {len(idle)} cached, and "
                f"{int((self._holders > 0).sum())} counted as held where {len(np.unique(held))} are."
            )

    def _put_blank(self, blocks: np.ndarray) -> None:
        self._blank[self._blanks : self._blanks + len(blocks)] = blocks
        self._blanks += len(blocks)
