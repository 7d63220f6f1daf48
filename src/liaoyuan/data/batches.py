"""Batches: flat tokens of a fixed size that the model trains on, each a function of (seed, i) alone.

`TokenBatches` cuts a corpus into windows, `RecordBatches` packs conversations. Both give the step `i` the same global
batch on any number of processes: it is divided into equal pieces, and a process takes its own.
"""

import bisect
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liaoyuan.data.encoding import before
from liaoyuan.data.packing import Cursor, pack
from liaoyuan.data.permutation import Permutation, number, permutation
from liaoyuan.data.record_tokens import RecordTokens, TokenisedRecord
from liaoyuan.errors import LiaoyuanError


@dataclass(frozen=True)
class Batch:
    """Documents packed one after another; N and M are the same for all batches of a run.

    tokens, positions, targets: int64 [N]; `targets[n]` follows `tokens[n]`, `positions` count from 0 in each document.
    weights: fp32 [N], each target's share in the loss (0: not learned, as all of the padding).
    boundaries: int32 [M + 1], where documents begin, rising from 0 to N; repeated at the end.
    padding: how many of the N tokens only fill up rows.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    boundaries: Tensor
    padding: int = 0


@dataclass(frozen=True)
class TokenStream:
    """A tokenised split: each document begins with the end-of-text token, and one more ends the stream.

    tokens: uint16 or uint32 [T + 1], perhaps mapped from a file; starts: int64 [D], where documents begin.
    """

    tokens: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class Division:
    """How a global batch of `batch_tokens` is divided: rows of `sequence_length`, and this process's pieces of rows."""

    batch_tokens: int
    sequence_length: int
    microbatches: int = 1
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if min(self.batch_tokens, self.sequence_length, self.microbatches) < 1:
            raise LiaoyuanError("batch_tokens, sequence_length and microbatches must be above 0.")
        if self.batch_tokens % self.sequence_length:
            raise LiaoyuanError(
                f"batch_tokens ({self.batch_tokens}) must be a multiple of sequence_length ({self.sequence_length})."
            )
        if self.rows % (self.microbatches * self.world_size):
            raise LiaoyuanError(
                f"The {self.rows} sequences of a batch cannot be divided into {self.microbatches} microbatches "
                f"on each of {self.world_size} processes."
            )

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return self.batch_tokens // self.sequence_length

    @property
    def pieces(self) -> list[range]:
        """The rows of each microbatch of this process."""
        size = self.rows // (self.microbatches * self.world_size)
        first = self.rank * self.microbatches
        return [range(size * piece, size * (piece + 1)) for piece in range(first, first + self.microbatches)]


class TokenBatches:
    """Pretraining batches: windows of `sequence_length` tokens, each once per epoch, in an order drawn by the seed.

    Where a document ends inside a window, the next one does not see it. Every epoch cuts the windows at other places.
    """

    def __init__(
        self,
        stream: TokenStream,
        seed: int,
        batch_tokens: int,
        sequence_length: int,
        microbatches: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream, self.seed = stream, seed
        self.division = Division(batch_tokens, sequence_length, microbatches, rank, world_size)
        count = len(stream.tokens) - 1
        self.windows = max(count // sequence_length - 1, count >= sequence_length)
        if not self.windows:
            raise LiaoyuanError(
                f"The corpus has {count} tokens, too few for a sequence of {sequence_length}: "
                "give more text or a smaller sequence_length."
            )
        self._slack = count - self.windows * sequence_length
        self._documents = _most_documents(stream.starts, sequence_length)

    def __call__(self, step: int) -> list[Batch]:
        """Return this process's microbatches of the global batch `step`."""
        return [self._batch(step, rows) for rows in self.division.pieces]

    def __getitem__(self, step: int) -> Batch:
        """Return the whole global batch `step` as one."""
        return self._batch(step, range(self.division.rows))

    def total_weight(self, step: int) -> float:
        """Return the sum of the weights of the global batch: every token counts."""
        return float(self.division.batch_tokens)

    def window(self, sample: int) -> int:
        """Return where in the stream sample `sample` of the run begins."""
        epoch, index = divmod(sample, self.windows)
        offset = number(min(self._slack + 1, self.division.sequence_length), self.seed, epoch)
        return offset + _order(self.windows, self.seed, epoch)[index] * self.division.sequence_length

    def _batch(self, step: int, rows: range) -> Batch:
        length = self.division.sequence_length
        begins = [self.window(step * self.division.rows + row) for row in rows]
        pieces = np.stack([self.stream.tokens[begin : begin + length + 1] for begin in begins]).astype(np.int64)
        cuts = [cut for row, begin in enumerate(begins) for cut in self._cuts(row * length, begin, begin + length)]
        return Batch(
            tokens=torch.from_numpy(pieces[:, :-1].flatten()),
            targets=torch.from_numpy(pieces[:, 1:].flatten()),
            weights=torch.ones(len(rows) * length),
            **_places(cuts, len(rows) * length, self._documents * len(rows)),
        )

    def _cuts(self, place: int, begin: int, end: int) -> Iterable[int]:
        """Yield where documents begin in the batch, for the window begin .. end that lies at `place` in it."""
        first, last = np.searchsorted(self.stream.starts, [begin + 1, end])
        yield place
        yield from (self.stream.starts[first:last] - begin + place).tolist()


class RecordBatches:
    """Batches of conversations: the records come epoch after epoch, each in an order of its own drawn by the seed.

    Rows are packed with whole records (see `packing`) and filled up with padding of weight 0.

    groups: how many records one after another are taken together, into one row (each alone if None).
    """

    def __init__(
        self,
        records: Sequence[TokenisedRecord],
        seed: int,
        batch_tokens: int,
        sequence_length: int | None = None,
        microbatches: int = 1,
        rank: int = 0,
        world_size: int = 1,
        padding: int = 0,
        groups: Sequence[int] | None = None,
    ) -> None:
        length = sequence_length or batch_tokens
        self.records, self.seed, self.padding = RecordTokens.of(records), seed, padding
        self._first = before(np.ones(len(self.records), np.int64) if groups is None else np.array(groups, np.int64))
        self.division = Division(batch_tokens, length, microbatches, rank, world_size)
        sizes = self.records.sizes - 1
        if not len(sizes) or sizes.min() < 1:
            raise LiaoyuanError("There are no records to learn from, or one of them is empty.")
        if sizes.max() > length:
            raise LiaoyuanError(
                f"Record {sizes.argmax()} has {sizes.max()} tokens, more than sequence_length ({length})."
            )
        self._sizes = np.diff(before(sizes)[self._first])
        if self._sizes.max() > length:
            raise LiaoyuanError(
                f"Records that go together have {self._sizes.max()} tokens, more than a row ({length})."
            )
        self._weights = self.records.total_weights()
        self._documents = length // int(sizes.min()) + 1
        self._begins = [Cursor()]

    def __call__(self, step: int) -> list[Batch]:
        """Return this process's microbatches of the global batch `step`."""
        rows = self.rows(step)
        return [self.batch([rows[row] for row in piece]) for piece in self.division.pieces]

    def __getitem__(self, step: int) -> Batch:
        """Return the whole global batch `step` as one."""
        return self.batch(self.rows(step))

    def total_weight(self, step: int) -> float:
        """Return the sum of the weights of the global batch `step`."""
        return float(sum(self._weights[record] for row in self.rows(step) for record in self._of(row)))

    def rows(self, step: int) -> list[list[int]]:
        """Return the records, or groups of them, of each row of the global batch `step`."""
        while len(self._begins) <= step:  # where a batch begins follows from the sizes of all before it
            self._begins.append(self._pack(self._begins[-1])[1])
        rows, end = self._pack(self._begins[step])
        if len(self._begins) == step + 1:
            self._begins.append(end)
        return [[self._record(sample) for sample in row] for row in rows]

    def steps_for(self, epochs: float) -> int:
        """Return in how many batches so many epochs are seen, the last one perhaps beyond."""
        samples = epochs * len(self._sizes)
        while self._begins[-1].oldest < samples:
            self.rows(len(self._begins) - 1)
        return bisect.bisect_left(self._begins, samples, key=lambda begin: begin.oldest)

    def _record(self, sample: int) -> int:
        epoch, index = divmod(sample, len(self._sizes))
        return int(_shuffled(len(self._sizes), self.seed, epoch)[index])

    def _of(self, row: Sequence[int]) -> Iterator[int]:
        """Yield the records of a row."""
        return (record for group in row for record in range(self._first[group], self._first[group + 1]))

    def fill(self, groups: Iterable[int]) -> list[list[int]]:
        """Put records, or groups of them, into as many rows as they need, in their order."""
        rows: list[list[int]] = []
        room = 0
        for group in groups:
            if self._sizes[group] > room:
                rows.append([])
                room = self.division.sequence_length
            rows[-1].append(group)
            room -= self._sizes[group]
        return rows

    def documents(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """Return which document of `batch` each record of the rows is; what fills up a row is one too."""
        found, document = list[int](), 0
        for row in rows:
            records = len([*self._of(row)])
            found += range(document, document + records)
            document += records + (sum(self._sizes[group] for group in row) < self.division.sequence_length)
        return found

    def _pack(self, begin: Cursor) -> tuple[list[list[int]], Cursor]:
        """Return the samples in each row of the batch that begins so, and how the next one begins."""
        division = self.division
        return pack(begin, division.rows, division.sequence_length, len(self._sizes), self._size)

    def _size(self, sample: int) -> int:
        return int(self._sizes[self._record(sample)])

    def batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Return these rows of records, or groups of them, as one batch."""
        length = self.division.sequence_length
        tokens = np.full((2, len(rows) * length), self.padding, dtype=np.int64)
        weights = np.zeros(len(rows) * length, dtype=np.float32)
        cuts = []
        for place, row in enumerate(rows):
            begin = place * length
            for record in self._of(row):
                ids = self.records.ids(record)
                end = begin + len(ids) - 1
                tokens[0, begin:end], tokens[1, begin:end] = ids[:-1], ids[1:]
                weights[begin:end] = self.records.weights(record)[1:]
                cuts.append(begin)
                begin = end
            if begin < (place + 1) * length:
                cuts.append(begin)
        return Batch(
            tokens=torch.from_numpy(tokens[0]),
            targets=torch.from_numpy(tokens[1]),
            weights=torch.from_numpy(weights),
            padding=len(rows) * length - int(sum(self._sizes[record] for row in rows for record in row)),
            **_places(cuts, len(rows) * length, self._documents * len(rows)),
        )


def _places(cuts: Sequence[int], length: int, documents: int) -> dict[str, Any]:
    """Return positions [length] and boundaries [documents + 1] of documents that begin at `cuts`."""
    boundaries = np.full(documents + 1, length, dtype=np.int32)
    boundaries[: len(cuts)] = cuts
    sizes = np.diff(boundaries)
    positions = np.arange(length) - np.repeat(boundaries[:-1].astype(np.int64), sizes)
    return {"positions": torch.from_numpy(positions), "boundaries": torch.from_numpy(boundaries)}


def _most_documents(starts: np.ndarray, length: int) -> int:
    """Return the most documents, whole or in part, that any `length` tokens in a row can touch."""
    last = np.searchsorted(starts, starts + length)
    return 1 + int((last - np.arange(len(starts))).max(initial=0))


@functools.lru_cache(maxsize=8)
def _order(size: int, seed: int, epoch: int) -> Permutation:
    return permutation(size, seed, epoch)


@functools.lru_cache(maxsize=8)
def _shuffled(size: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(size, seed, epoch).whole()
