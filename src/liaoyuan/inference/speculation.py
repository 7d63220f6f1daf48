"""Guessing the next tokens, so that one step may give several.

A step computes guessed tokens as if they were known and draws after each of them. A draw depends on (seed, position)
and the tokens before it alone, so the draws are those that would have come anyway, and they count as long as the guess
before them was right: speculation changes no answer, only when it comes. (Leviathan et al. 2023, arXiv 2211.17192,
reject samples instead and so keep the distribution alone; a draft model draws with the same random numbers here, so the
two tend to agree.)
"""

from typing import Protocol

import numpy as np

from liaoyuan.inference.sequence import Sequence

LONGEST_MATCH = 4  # tokens
SHORTEST_MATCH = 2
FIRST_GUESSES = 2
MOST_ROWS = 32  # up to so many rows a product takes about as long as one row: reading the weights is what takes time


class Drafter(Protocol):
    """What guesses."""

    def start(self, sequence: Sequence) -> None:
        """A sequence has got a slot."""
        ...

    def guess(self, slots: np.ndarray, lengths: np.ndarray, most: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Write guesses behind the known tokens and return how many, int64 [S].

        slots, lengths, most: int64 [S], sequences that decode, their known tokens, how many guesses each may get.
        tokens: int64 [slots, n], all sequences' tokens.
        """
        ...

    def drop(self) -> None:
        """Give back what memory can be spared."""
        ...


class NGramDrafter:
    """Guesses that what followed the last few tokens before will follow them again (prompt lookup: Saxena 2023; also
    the suffix trees of Oliaro et al. 2024, arXiv 2411.04975, for one sequence): good for quoting, code and lists.
    """

    def __init__(self, max_sequences: int) -> None:
        self._after: list[dict[bytes, int]] = [{} for _ in range(max_sequences)]  # n-gram -> the place behind it
        self._seen = np.zeros(max_sequences, dtype=np.int64)

    def start(self, sequence: Sequence) -> None:
        self._after[sequence.slot], self._seen[sequence.slot] = {}, 0

    def drop(self) -> None:
        """There is little to spare."""

    def guess(self, slots: np.ndarray, lengths: np.ndarray, most: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        found = np.zeros(len(slots), dtype=np.int64)
        for index, (slot, length, count) in enumerate(
            zip(slots.tolist(), lengths.tolist(), most.tolist(), strict=True)
        ):
            place = self._look_up(slot, length, tokens[slot])
            if place and count > 0:
                found[index] = count = min(count, length - place)
                tokens[slot, length : length + count] = tokens[slot, place : place + count]
        return found

    def _look_up(self, slot: int, length: int, tokens: np.ndarray) -> int:
        """Return the place behind the last n-gram's previous occurrence (0: it never came), and note all new ones."""
        after, place = self._after[slot], 0
        for end in range(max(int(self._seen[slot]) + 1, SHORTEST_MATCH), length + 1):
            for size in range(min(LONGEST_MATCH, end), SHORTEST_MATCH - 1, -1):
                key = tokens[end - size : end].tobytes()
                if end == length and not place:
                    place = after.get(key, 0)
                after[key] = end
        self._seen[slot] = length
        return place


class Speculation:
    """A drafter, and how many guesses each sequence is worth: more while they come true, fewer while they do not."""

    def __init__(self, drafter: Drafter, max_sequences: int, most: int, most_rows: int = MOST_ROWS) -> None:
        """most: guesses of one sequence in a step. most_rows: rows of a step of which more would cost too much."""
        self._drafter, self._most, self._most_rows = drafter, most, most_rows
        self._next = np.full(max_sequences, min(FIRST_GUESSES, most), dtype=np.int64)
        self.guessed = self.right = self.rounds = 0  # rounds: how often a sequence's guesses were tried

    def start(self, sequence: Sequence) -> None:
        """A sequence has got a slot."""
        self._next[sequence.slot] = min(FIRST_GUESSES, self._most)
        self._drafter.start(sequence)

    def most(self, slots: np.ndarray) -> np.ndarray:
        """Return how many guesses each slot may get, int64 [S]."""
        return np.minimum(self._next[slots], max(0, self._most_rows // len(slots) - 1))

    def guess(self, slots: np.ndarray, lengths: np.ndarray, most: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """See `Drafter`."""
        return self._drafter.guess(slots, lengths, most, tokens) if most.any() else np.zeros(len(slots), dtype=np.int64)

    def drop(self) -> None:
        """Give back what memory can be spared."""
        self._drafter.drop()

    def learn(self, slots: np.ndarray, guessed: np.ndarray, right: np.ndarray) -> None:
        """Note how many guesses of slots were right, int64 [S] each."""
        self.rounds += len(slots)
        self.guessed += int(guessed.sum())
        self.right += int(right.sum())
        kept = self._next[slots]
        slower = np.maximum(1, np.minimum(kept, right + 1))
        self._next[slots] = np.where(right >= guessed, np.minimum(2 * kept, self._most), slower)
