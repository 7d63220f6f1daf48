"""A small model that guesses for a large one. It has a cache of its own over the same blocks, so who holds which block
is decided once, for both; and it draws with the large one's random numbers and settings.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.blocks import Key
from liaoyuan.inference.cache import KeyValueCache, PagedContext
from liaoyuan.inference.plan import NONE, Plan, Table, lay_out
from liaoyuan.inference.sequence import Sequence
from liaoyuan.models import Decoder

Draw = Callable[
    [torch.Tensor, np.ndarray, np.ndarray, np.ndarray], np.ndarray
]  # logits, slots, places, tokens -> drawn


class DraftModel:
    """A `speculation.Drafter`."""

    def __init__(self, model: Decoder, vocabulary: int, table: Table, num_blocks: int, budget: int, draw: Draw) -> None:
        """
        vocabulary: the large model's. table: of the engine. budget: tokens that one call of the model computes.
        draw: draws the tokens at `places` [R] of `slots` [R] as the large model would.

        Raises:
            LiaoyuanError: the models have different vocabularies.
        """
        if model.config.vocab_size != vocabulary:
            raise LiaoyuanError(
                f"The draft model has {model.config.vocab_size} tokens, but the model {vocabulary}: "
                "both must have the same vocabulary."
            )
        self._model, self._budget, self._draw, self._num_blocks = model, budget, draw, num_blocks
        self._table = table
        self._cache: KeyValueCache | None = None
        self._computed, self._noted = np.zeros((2, len(table.length)), dtype=np.int64)  # tokens; blocks in `_filled`
        self._sequences: list[Sequence | None] = [None] * len(table.length)
        self._filled: dict[int, Key] = {}  # block -> the key of what this model put into it
        self._device = model.embed_tokens.weight.device

    def start(self, sequence: Sequence) -> None:
        """Find out which of the sequence's blocks this model has filled before."""
        slot, ready = sequence.slot, 0
        for key, block in zip(sequence.keys, self._table.blocks[slot].tolist(), strict=False):
            if self._filled.get(block) != key:
                break
            ready += 1
        self._sequences[slot], self._noted[slot] = sequence, ready
        self._computed[slot] = min(ready * self._table.block_size, len(sequence.tokens) - 1)

    def drop(self) -> None:
        """Give the cache's memory back; it is taken again when it is needed."""
        self._cache = None
        self._filled.clear()
        self._computed[:] = self._noted[:] = 0

    @torch.inference_mode()
    def guess(self, slots: np.ndarray, lengths: np.ndarray, most: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """See `speculation.Drafter`."""
        self._computed[slots] = np.minimum(self._computed[slots], lengths - 1)  # what followed was only guessed
        guesses, place_of = np.zeros_like(most), np.zeros(len(self._computed), dtype=np.int64)
        place_of[slots] = np.arange(len(slots))
        nobody = np.zeros_like(self._table.scored)  # a draft's prompts are not scored
        view = replace(self._table, length=self._table.length.copy(), computed=self._computed, scored=nobody)
        chosen = slots[most > 0]
        todo = view.length[chosen] - self._computed[chosen]
        counts = np.clip(self._budget - (todo.cumsum() - todo), 0, todo)  # who is far behind catches up over some steps
        chosen, counts = chosen[counts > 0], counts[counts > 0]
        while len(chosen):
            plan = lay_out(view, chosen, counts, np.zeros_like(counts), NONE.reshape(2, 0))
            logits = self._logits(plan)
            self._computed[chosen] += counts
            chosen = plan.samplers
            tokens[chosen, plan.places] = self._draw(logits, chosen, plan.places, tokens)
            view.length[chosen] += 1
            guesses[place_of[chosen]] += 1
            chosen = chosen[guesses[place_of[chosen]] < most[place_of[chosen]]]
            counts = np.ones_like(chosen)
        self._note_filled(slots, lengths)
        return guesses

    def _logits(self, plan: Plan) -> torch.Tensor:
        config = self._model.config
        if self._cache is None:
            self._cache = KeyValueCache(config, self._num_blocks, self._table.block_size, self._device)
        arrays = (plan.cache_slots, plan.block_tables, plan.query_starts, plan.lengths)
        context = PagedContext(self._cache, *(self._tensor(values) for values in arrays))
        tokens, positions, rows = (self._tensor(values) for values in (plan.tokens, plan.positions, plan.rows))
        return self._model(tokens, positions, context, rows=rows)

    def _note_filled(self, slots: np.ndarray, lengths: np.ndarray) -> None:
        """Note which blocks hold keys and values of known tokens."""
        filled = np.minimum(self._computed[slots], lengths) // self._table.block_size
        more = filled > self._noted[slots]
        for slot, count in zip(slots[more].tolist(), filled[more].tolist(), strict=True):
            sequence = self._sequences[slot]
            assert sequence is not None
            for index in range(int(self._noted[slot]), min(count, len(sequence.keys))):
                self._filled[int(self._table.blocks[slot, index])] = sequence.keys[index]
            self._noted[slot] = count

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)
