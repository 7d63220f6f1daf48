"""The streams from which a model's further layer guesses, one of each slot of an engine; see `further_draft.py`."""

from typing import NamedTuple

import torch
from torch import Tensor

from liaoyuan.inference.cache import PagedContext
from liaoyuan.models import Decoder


class Rows(NamedTuple):
    """Rows of the further layer: the token after each of them, int64 [N], and their positions, int64 [N]."""

    tokens: Tensor
    positions: Tensor
    context: PagedContext


class FurtherStreams:
    """`seen` [slots, H]: what the layer made of the last known row of each slot; `guessed`: of the last guessed one."""

    def __init__(self, model: Decoder, slots: int) -> None:
        self._model = model
        weight, size = model.embed_tokens.weight, model.config.hidden_size
        self._seen, self._guessed = torch.zeros(2, slots, size, dtype=weight.dtype, device=weight.device)

    def observe(self, stream: Tensor, chosen: Tensor, last: Tensor, slots: Tensor, rows: Rows) -> None:
        """Compute rows from the model's stream [M, H] of a pass.

        chosen: int64 [N], which of the pass they are. last, slots: int64 [S], which of them is the last of each slot.
        """
        further = self._model.further_stream(stream[chosen], *rows)
        self._seen[slots] = further[last]

    def begin(self, slots: Tensor) -> None:
        """Guess on from the last known rows of slots, int64 [S]."""
        self._guessed[slots] = self._seen[slots]

    def logits(self, slots: Tensor) -> Tensor:
        """Return the logits [S, V] of the next guess of slots."""
        return self._model.further_logits(self._guessed[slots])

    def advance(self, slots: Tensor, rows: Rows) -> None:
        """Compute a row of each slot, from its last guess on."""
        self._guessed[slots] = self._model.further_stream(self._guessed[slots], *rows, again=True)
