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


def packed_context(lengths: Sequence[int], device: torch.device | None = None) -> tuple[Tensor, PackedContext]:
    """Return positions int64 [N] and the context of documents of these lengths, packed in this order."""
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    return positions, PackedContext(boundaries)
