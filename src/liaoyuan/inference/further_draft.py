"""The model's own layer for the token after the next, as a draft (multi-token prediction: DeepSeek-AI 2024, arXiv
2412.19437, sec. 2.2 and 5.4.3; one layer a guess, instead of a second model).

Its keys and values are one more layer of the engine's cache, and it computes its rows right behind the model's, when
the token after each is known. So what the model has computed of a sequence this layer has too, and what is shared,
copied, kept, handed over or forgotten of a block is so for both. One row may be another's: the last of a shared block
was computed with the token that followed there. That can cost a guess, as all here can, and never an answer.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.cache import KeyValueCache, PagedContext
from liaoyuan.inference.draft_model import Draw
from liaoyuan.inference.plan import Plan, Table
from liaoyuan.inference.sequence import Sequence
from liaoyuan.models import Decoder
from liaoyuan.models.decoder import FurtherLayer

UNKNOWN = -1


class FurtherDrafter:
    """A `speculation.Drafter`. It is shown what the model computes, and guesses on from there; of several further
    layers it uses the first, again and again.
    """

    def __init__(self, model: Decoder, table: Table, cache: Callable[[], KeyValueCache], draw: Draw) -> None:
        """
        table: of the engine. cache: gives the engine's. draw: see `DraftModel`.

        Raises:
            LiaoyuanError: the model has no such layer.
        """
        if not model.config.further_layers:
            raise LiaoyuanError(
                f"This {model.config.model_type} model has no layer for predicting the token after the next: guess "
                "without 'mtp', or take a folder whose config.json has num_nextn_predict_layers (load_model reads the "
                "layer with further=True)."
            )
        further = model.further[0]
        assert isinstance(further, FurtherLayer)
        self._model, self._further, self._table, self._cache, self._draw = model, further, table, cache, draw
        slots = len(table.length)
        self._device = model.embed_tokens.weight.device
        self._stream = torch.zeros(slots, model.config.hidden_size, dtype=model.config.torch_dtype, device=self._device)
        self._place = np.full(slots, UNKNOWN, dtype=np.int64)  # which token a slot's stream predicts

    def start(self, sequence: Sequence) -> None:
        """Nothing is known of what comes after this sequence."""
        self._place[sequence.slot] = UNKNOWN

    def drop(self) -> None:
        """What takes memory is in the engine's cache."""
        self._place[:] = UNKNOWN

    def observe(self, plan: Plan, stream: Tensor) -> None:
        """Compute this layer for a plan's rows whose next token is known, from the model's stream [N, H] there."""
        owner = np.repeat(np.arange(len(plan.slots)), plan.counts)
        rows = np.flatnonzero(plan.positions + 1 < self._table.length[plan.slots[owner]])
        counts = np.bincount(owner[rows], minlength=len(plan.slots))
        slots, counts = plan.slots[counts > 0], counts[counts > 0]
        if not len(rows):
            return
        further = self._compute(stream[self._tensor(rows)], slots, counts, plan.positions[rows])
        last = counts.cumsum() - 1
        self._stream[self._tensor(slots)] = further[self._tensor(last)]
        self._place[slots] = plan.positions[rows][last] + 2

    @torch.inference_mode()
    def guess(self, slots: np.ndarray, lengths: np.ndarray, most: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """See `speculation.Drafter`."""
        guesses = np.zeros_like(most)
        rows = np.flatnonzero((most > 0) & (self._place[slots] == lengths))  # in `slots`
        stream = self._stream[self._tensor(slots[rows])]
        while len(rows):
            chosen, places = slots[rows], lengths[rows] + guesses[rows]
            read = self._further.norm(stream)
            tokens[chosen, places] = self._draw(self._model.logits(read), chosen, places, tokens)
            guesses[rows] += 1
            more = np.flatnonzero(guesses[rows] < most[rows])
            rows, chosen, places = rows[more], chosen[more], places[more]
            if len(rows):
                stream = (read if self._model.config.further_normed else stream)[self._tensor(more)]
                stream = self._compute(stream, chosen, np.ones_like(chosen), places - 1)
        return guesses

    def _compute(self, stream: Tensor, slots: np.ndarray, counts: np.ndarray, positions: np.ndarray) -> Tensor:
        """Return this layer's stream [N, H] at `positions` [N] of `slots` [S], `counts` [S] of each."""
        table, size, owner = self._table, self._table.block_size, np.repeat(slots, counts)
        starts = np.zeros(len(slots) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        lengths = positions[starts[1:] - 1] + 1
        blocks = table.blocks[slots, : -(-int(lengths.max()) // size)]
        places = table.blocks[owner, positions // size].astype(np.int64) * size + positions % size
        arrays = (places, blocks, starts, lengths.astype(np.int32))
        context = PagedContext(self._cache(), *(self._tensor(values) for values in arrays))
        embedded = self._model.embed_tokens(self._tensor(table.tokens[owner, positions + 1]))
        return self._further(stream, embedded, self._model.angles(self._tensor(positions)), context)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)
