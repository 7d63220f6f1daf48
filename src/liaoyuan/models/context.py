"""Which tokens see which: the model asks its attention context, and knows no other difference between uses.

Training, scoring and prefill of whole prompts use `PackedContext`; the engine brings its own over a paged cache,
context parallelism its own over several processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from liaoyuan.ops import attention


@dataclass(frozen=True, eq=False)
class Pattern:
    """How a layer attends, whatever the context.

    scale: factor of the scores. window: a token sees so many tokens, itself included (None: all before it).
    sinks: [Hq] scores of a token that everybody sees and that has no value, or None.
    """

    scale: float
    window: int | None = None
    sinks: Tensor | None = None


class AttentionContext(Protocol):
    """What the attention layer of a decoder asks.

    One over a paged cache also has `pages(layer)`, which returns `ops.Pages`: with it a whole layer is one operator.
    """

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
        """Return a layer's attention output [N, Hq, Dv] for query [N, Hq, D], key [N, Hk, D] and value [N, Hk, Dv]."""
        ...


@dataclass(frozen=True)
class PackedContext:
    """Documents packed one after another; a token sees itself and what precedes it in its own document.

    boundaries: int32 [M + 1], rising from 0 to N; repeated at the end to fill a fixed size.
    """

    boundaries: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
        return attention(query, key, value, self.boundaries, pattern.scale, pattern.window, pattern.sinks)


@dataclass(frozen=True)
class BranchedContext:
    """Documents whose common beginnings are computed once: N rows stand for M places of documents, M >= N.

    All but attention is done once for a row that several documents share; attention sees whole documents, so every
    row has the bits that it has in a `PackedContext` of them.

    documents: of M places. row_of: int64 [M], the row that stands at each place. place_of: int64 [N], the first place
        at which each row stands.
    """

    documents: PackedContext
    row_of: Tensor
    place_of: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
        query, key, value = (x.index_select(0, self.row_of) for x in (query, key, value))
        return self.documents.attend(layer, query, key, value, pattern).index_select(0, self.place_of)


def packed_context(lengths: Sequence[int], device: torch.device | None = None) -> tuple[Tensor, PackedContext]:
    """Return positions int64 [N] and the context of documents of these lengths, packed in this order."""
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    return positions, PackedContext(boundaries)


def branched_context(
    groups: Sequence[tuple[int, Sequence[int]]], device: torch.device | None = None
) -> tuple[Tensor, BranchedContext]:
    """Return positions int64 [N] and the context of documents in groups of one beginning.

    groups: (length of the beginning, lengths of what follows it in each document). The rows of a group are those of
        its beginning, then those of its documents one after another.
    """
    positions, row_of, place_of, lengths, row, place = [], [], [], list[int](), 0, 0
    for begin, ends in groups:
        shared = torch.arange(begin)
        positions += [shared, *(begin + torch.arange(end) for end in ends)]
        place_of.append(place + shared)
        own = row + begin
        for end in ends:
            row_of += [row + shared, own + torch.arange(end)]
            place_of.append(place + begin + torch.arange(end))
            lengths.append(begin + end)
            own, place = own + end, place + begin + end
        row = own
    _, documents = packed_context(lengths, device)
    wholes = [torch.cat(parts).to(device) for parts in (positions, row_of, place_of)]
    return wholes[0], BranchedContext(documents, wholes[1], wholes[2])
