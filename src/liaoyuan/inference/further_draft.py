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
from liaoyuan.inference.further_streams import FurtherStreams, Rows
from liaoyuan.inference.plan import Plan, Table
from liaoyuan.inference.sequence import Sequence
from liaoyuan.models import Decoder, ModelConfig

UNKNOWN = -1


def check_further(config: ModelConfig) -> None:
    """Raise LiaoyuanError if a model has no layer to guess with."""
    if not config.further_layers:
        raise LiaoyuanError(
            f"This {config.model_type} model has no layer for predicting the token after the next: guess "
            "without 'mtp', or take a folder whose config.json has num_nextn_predict_layers (load_model reads the "
            "layer with further=True)."
        )


class FurtherDrafter:
    """A `speculation.Drafter`. It is shown what the model computes, and guesses on from there; of several further
    layers it uses the first, again and again.
    """

    def __init__(
        self,
        model: Decoder,
        table: Table,
        cache: Callable[[], KeyValueCache],
        draw: Draw,
        streams: Callable[[int], FurtherStreams],
    ) -> None:
        """
        table: of the engine. cache: gives the engine's. draw: see `DraftModel`. streams: makes those of so many slots.

        Raises:
            LiaoyuanError: the model has no such layer.
        """
        check_further(model.config)
        slots = len(table.length)
        self._table, self._cache, self._draw, self._streams = table, cache, draw, streams(slots)
        self._device = model.embed_tokens.weight.device
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
        positions, last = plan.positions[rows], counts.cumsum() - 1
        chosen, last_of, of_slots = (self._tensor(values) for values in (rows, last, slots))
        self._streams.observe(stream, chosen, last_of, of_slots, self._rows(slots, counts, positions))
        self._place[slots] = positions[last] + 2

    @torch.inference_mode()
    def guess(self, slots: np.ndarray, lengths: np.ndarray, most: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """See `speculation.Drafter`."""
        guesses = np.zeros_like(most)
        rows = np.flatnonzero((most > 0) & (self._place[slots] == lengths))  # in `slots`
        if len(rows):
            self._streams.begin(self._tensor(slots[rows]))
        while len(rows):
            chosen, places = slots[rows], lengths[rows] + guesses[rows]
            tokens[chosen, places] = self._draw(self._streams.logits(self._tensor(chosen)), chosen, places, tokens)
            guesses[rows] += 1
            more = np.flatnonzero(guesses[rows] < most[rows])
            rows, chosen, places = rows[more], chosen[more], places[more]
            if len(rows):
                self._streams.advance(self._tensor(chosen), self._rows(chosen, np.ones_like(chosen), places - 1))
        return guesses

    def _rows(self, slots: np.ndarray, counts: np.ndarray, positions: np.ndarray) -> Rows:
        """Return the rows at `positions` [N] of `slots` [S], `counts` [S] of each."""
        table, size, owner = self._table, self._table.block_size, np.repeat(slots, counts)
        starts = np.zeros(len(slots) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        lengths = positions[starts[1:] - 1] + 1
        blocks = table.blocks[slots, : -(-int(lengths.max()) // size)]
        places = table.blocks[owner, positions // size].astype(np.int64) * size + positions % size
        arrays = (places, blocks, starts, lengths.astype(np.int32))
        context = PagedContext(self._cache(), *(self._tensor(values) for values in arrays))
        return Rows(self._tensor(table.tokens[owner, positions + 1]), self._tensor(positions), context)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)
