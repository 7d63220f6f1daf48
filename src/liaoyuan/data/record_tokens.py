"""Tokenised records as a few flat arrays, in memory or mapped from files: a million records need no million objects."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from liaoyuan.data.encoding import Encoded


@dataclass(frozen=True)
class TokenisedRecord:
    """A conversation of L + 1 tokens; `weights[n]` is the loss weight of predicting token n (the first has none)."""

    tokens: Sequence[int] | np.ndarray
    weights: Sequence[float] | np.ndarray


@dataclass(frozen=True)
class RecordTokens(Sequence[TokenisedRecord]):
    """R tokenised records.

    tokens: [T], of all records, perhaps mapped from a file. begins, ends: int64 [R], where those of each record are.
    spans: int32 [S, 2], where in its record a run of tokens of one weight above 0 begins and ends; span_weights: fp32
    [S]; span_begins, span_ends: int64 [R], which spans each record has.
    """

    tokens: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    spans: np.ndarray
    span_weights: np.ndarray
    span_begins: np.ndarray
    span_ends: np.ndarray

    @classmethod
    def of(cls, records: Iterable[TokenisedRecord]) -> "RecordTokens":
        """Return records in memory in this form."""
        if isinstance(records, RecordTokens):
            return records
        growing = Growing(np.dtype(np.int64))
        kept = [growing.add(record.tokens, _runs(record.weights)) for record in records]
        return growing.whole(np.concatenate(kept) if kept else np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.begins)

    @overload
    def __getitem__(self, index: int) -> TokenisedRecord: ...
    @overload
    def __getitem__(self, index: slice) -> "RecordTokens": ...
    def __getitem__(self, index: int | slice) -> "TokenisedRecord | RecordTokens":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return TokenisedRecord(self.ids(index).astype(np.int64), self.weights(index))

    def __iter__(self) -> Iterator[TokenisedRecord]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RecordTokens)
            and len(self) == len(other)
            and all(
                np.array_equal(one.tokens, two.tokens) and np.array_equal(one.weights, two.weights)
                for one, two in zip(self, other, strict=True)
            )
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each record, int64 [R]."""
        return np.asarray(self.ends - self.begins)

    def ids(self, index: int) -> np.ndarray:
        """Return the tokens of a record, a view."""
        return self.tokens[self.begins[index] : self.ends[index]]

    def weights(self, index: int) -> np.ndarray:
        """Return the loss weight of each token of a record, fp32."""
        weights = np.zeros(self.ends[index] - self.begins[index], dtype=np.float32)
        for span in range(self.span_begins[index], self.span_ends[index]):
            begin, end = self.spans[span]
            weights[begin:end] = self.span_weights[span]
        return weights

    def learned(self) -> np.ndarray:
        """Return how many tokens of each record have a weight above 0, int64 [R]."""
        return self._sums(self._lengths().astype(np.float64)).astype(np.int64)

    def total_weights(self) -> np.ndarray:
        """Return the sum of the weights of each record, fp64 [R]."""
        return self._sums(self._lengths() * self.span_weights.astype(np.float64))

    def select(self, kept: np.ndarray) -> "RecordTokens":
        """Return these records alone, on the same tokens."""
        names = ("begins", "ends", "span_begins", "span_ends")
        return replace(self, **{name: getattr(self, name)[kept] for name in names})

    def followed_by(self, other: "RecordTokens") -> "RecordTokens":
        """Return these records, then those of another set. All tokens are in memory: 2 to 4 bytes each."""
        return RecordTokens(
            np.concatenate([self.tokens, other.tokens]),
            np.concatenate([self.begins, other.begins + len(self.tokens)]),
            np.concatenate([self.ends, other.ends + len(self.tokens)]),
            np.concatenate([self.spans, other.spans]),
            np.concatenate([self.span_weights, other.span_weights]),
            np.concatenate([self.span_begins, other.span_begins + len(self.spans)]),
            np.concatenate([self.span_ends, other.span_ends + len(self.spans)]),
        )

    def cut(self, may_be_cut: np.ndarray, length: int) -> tuple["RecordTokens", np.ndarray]:
        """Return the records with those that may be cut in pieces of at most `length` predictions, and the record of
        each piece; a piece begins with the last token of the one before it. What may be cut has one weight.
        """
        counts = np.where(may_be_cut, np.maximum(-(-(self.sizes - 1) // length), 1), 1)
        owner = np.repeat(np.arange(len(self)), counts)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        begins = self.begins[owner] + place * length
        ends = np.where(counts[owner] > 1, np.minimum(begins + length + 1, self.ends[owner]), self.ends[owner])
        is_piece = counts[owner] > 1
        span = len(self.spans) + np.cumsum(is_piece) - 1  # of its own, which holds the whole piece
        first = np.where(is_piece, span, self.span_begins[owner])
        last = np.where(is_piece, span + 1, self.span_ends[owner])
        pieces = np.stack([np.ones(is_piece.sum(), np.int32), (ends - begins)[is_piece].astype(np.int32)], 1)
        weights = self.span_weights[self.span_begins[owner[is_piece]]]
        spans, span_weights = np.concatenate([self.spans, pieces]), np.concatenate([self.span_weights, weights])
        return RecordTokens(self.tokens, begins, ends, spans, span_weights, first, last), owner

    def _lengths(self) -> np.ndarray:
        """Return the tokens of each span; the first token of a record is given, so it does not count."""
        return np.asarray(self.spans[:, 1] - np.maximum(self.spans[:, 0], 1)).clip(0)

    def _sums(self, values: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(values)])
        return np.asarray(sums[self.span_ends] - sums[self.span_begins])


SMALL = ("begins", "ends", "spans", "span_weights", "span_begins", "span_ends")


class Growing:
    """The arrays of `RecordTokens` but for the tokens, while records are added."""

    def __init__(self, dtype: "np.dtype[Any]") -> None:
        self.dtype = dtype
        self._sizes, self._counts, self._spans, self._weights = array("q"), array("q"), array("i"), array("f")

    def add(self, ids: Sequence[int] | np.ndarray, runs: Iterable[tuple[int, int, float]]) -> np.ndarray:
        """Add a record with its (begin, end, weight); return its tokens as they are kept."""
        count = 0
        for begin, end, weight in runs:
            if weight and end > begin:
                self._spans.extend((begin, end))
                self._weights.append(weight)
                count += 1
        self._sizes.append(len(ids))
        self._counts.append(count)
        return np.asarray(ids, dtype=self.dtype)

    def extend(self, encoded: Encoded, weights: Sequence[float]) -> np.ndarray:
        """Add records, with the weight of each of their pieces; return all their tokens."""
        owner = np.repeat(np.arange(len(encoded.sizes)), encoded.pieces)
        is_first = np.diff(owner, prepend=-1) > 0
        begins = np.where(is_first, 0, np.concatenate([[0], encoded.ends[:-1]]))
        values = np.array(weights, dtype=np.float32)
        is_learned = (values > 0) & (encoded.ends > begins)
        counts = np.bincount(owner[is_learned], minlength=len(encoded.sizes))
        spans = np.stack([begins[is_learned], encoded.ends[is_learned]], 1)
        self._sizes.frombytes(encoded.sizes.astype(np.int64).tobytes())
        self._counts.frombytes(counts.astype(np.int64).tobytes())
        self._spans.frombytes(spans.astype(np.int32).tobytes())
        self._weights.frombytes(values[is_learned].tobytes())
        return encoded.ids.astype(self.dtype)

    def whole(self, tokens: np.ndarray) -> RecordTokens:
        """Return the records whose tokens, one after another, are these."""
        sizes, counts = np.frombuffer(self._sizes, np.int64), np.frombuffer(self._counts, np.int64)
        spans, weights = np.frombuffer(self._spans, np.int32), np.frombuffer(self._weights, np.float32)
        ends, span_ends = np.cumsum(sizes), np.cumsum(counts)
        return RecordTokens(tokens, ends - sizes, ends, spans.reshape(-1, 2), weights, span_ends - counts, span_ends)


def save_arrays(records: RecordTokens, folder: Path) -> None:
    """Write all arrays but the tokens to `folder`, each a `.npy` file."""
    for name in SMALL:
        np.save(folder / f"{name}.npy", getattr(records, name))


def map_arrays(folder: Path, tokens: Path, dtype: str) -> RecordTokens:
    """Return the records in `folder`, with their tokens mapped from the file."""
    empty = tokens.stat().st_size == 0
    mapped = np.zeros(0, dtype) if empty else np.memmap(tokens, dtype=dtype, mode="r")
    return RecordTokens(mapped, *(np.load(folder / f"{name}.npy", allow_pickle=False) for name in SMALL))


def _runs(weights: Sequence[float] | np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Yield (begin, end, weight) of each run of equal weights."""
    values = np.asarray(weights, dtype=np.float32)
    cuts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    for begin, end in pairwise(cuts):
        if end > begin:
            yield begin, end, float(values[begin])
