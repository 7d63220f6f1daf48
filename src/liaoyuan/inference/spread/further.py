"""A further layer over several processes: it is cut as the others are, and each process has all slots' streams.

The model's own stream of a pass is whole in every process already, so none is sent.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from liaoyuan.inference.cache import KeyValueCache, PagedContext
from liaoyuan.inference.further_streams import FurtherStreams, Rows
from liaoyuan.inference.spread.message import Call
from liaoyuan.models import AttentionContext, Decoder

Make = Callable[[Call, Sequence[Tensor | None], Callable[[], Any]], Any]  # announces a call, and makes it


class LastStream:
    """The model's stream [N, H] of its last pass."""

    def __init__(self, model: Decoder) -> None:
        self.values = torch.empty(0)
        model.layers[-1].register_forward_hook(self._keep)

    def _keep(self, _: object, __: object, out: tuple[Tensor, Tensor]) -> None:
        residual, x = out
        self.values = residual + x


class SharedStreams(FurtherStreams):
    """The first process's streams: it announces what it does with them."""

    def __init__(self, model: Decoder, slots: int, make: Make) -> None:
        super().__init__(model, slots)
        self._make, last = make, LastStream(model)

        def logits_and_stream(
            tokens: Tensor, positions: Tensor, context: AttentionContext, rows: Tensor
        ) -> tuple[Tensor, Tensor]:
            return model(tokens, positions, context, rows=rows), last.values

        model.logits_and_stream = logits_and_stream  # type: ignore[method-assign]

    def observe(self, stream: Tensor, chosen: Tensor, last: Tensor, slots: Tensor, rows: Rows) -> None:
        head, *places = _places(rows)
        work = super().observe
        self._make(Call.OBSERVE, [head, chosen, last, slots, *places], lambda: work(stream, chosen, last, slots, rows))

    def begin(self, slots: Tensor) -> None:
        work = super().begin
        self._make(Call.BEGIN, [slots], lambda: work(slots))

    def logits(self, slots: Tensor) -> Tensor:
        work = super().logits
        found: Tensor = self._make(Call.GUESS, [slots], lambda: work(slots))
        return found

    def advance(self, slots: Tensor, rows: Rows) -> None:
        head, *places = _places(rows)
        work = super().advance
        self._make(Call.ADVANCE, [head, slots, *places], lambda: work(slots, rows))


class FollowedStreams:
    """The streams of another process, which does what the first one announces."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._last: LastStream | None = None
        self._streams: FurtherStreams | None = None

    @torch.inference_mode()
    def repeat(
        self, kind: Call, caches: Mapping[int, KeyValueCache], head: list[int], message: Sequence[Tensor]
    ) -> None:
        """Make the first process's call; head: the numbers of the message's first tensor."""
        if kind is Call.STREAMS:
            self._last = self._last or LastStream(self._model)
            self._streams = FurtherStreams(self._model, head[0])
            return
        assert self._streams is not None and self._last is not None
        if kind is Call.OBSERVE:
            _, chosen, last, slots, tokens, positions, *places = message
            rows = Rows(tokens, positions, PagedContext(caches[head[0]], *places))
            self._streams.observe(self._last.values, chosen, last, slots, rows)
        elif kind is Call.BEGIN:
            self._streams.begin(message[0])
        elif kind is Call.GUESS:
            self._streams.logits(message[0])
        else:
            _, slots, tokens, positions, *places = message
            self._streams.advance(slots, Rows(tokens, positions, PagedContext(caches[head[0]], *places)))


def _places(rows: Rows) -> list[Tensor]:
    """Return the number of a rows' cache, and all other tensors of it."""
    tokens, positions, context = rows
    number = torch.tensor([context.cache.number])  # type: ignore[attr-defined]
    return [number, tokens, positions, context.slots, context.block_tables, context.query_starts, context.lengths]
