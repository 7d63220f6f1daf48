"""One step of the model: the logits of a plan, the tokens drawn from them, and what each sequence is told."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from operator import is_

import numpy as np
import torch

from liaoyuan.inference.adapters import Adapters
from liaoyuan.inference.cache import KeyValueCache, PagedContext
from liaoyuan.inference.drawing import Drawing, Draws
from liaoyuan.inference.graphs import DecodeGraphs, Inputs
from liaoyuan.inference.plan import Plan
from liaoyuan.inference.request import Event
from liaoyuan.inference.sampling import as_one, log_probs, top_logprobs
from liaoyuan.inference.scheduler import Scheduler
from liaoyuan.inference.sequence import Sequence
from liaoyuan.models import Decoder
from liaoyuan.models.rotary import TABLE
from liaoyuan.ops import sample_tokens

ROUND_SECONDS = 0.02  # of decode steps between two looks at who comes and goes: who comes waits no longer
# Elements of logits that are kept together, of prompts that are scored or for those who are told more than tokens.
MOST_LOGITS = 2**26  # 128 MiB in bf16
RECORDED_LOGITS = 2**24  # elements of the logits of a step that is recorded on a CPU, which keeps what it made


class ModelStep:
    """What runs a scheduler's plans. cache: None while the engine sleeps."""

    def __init__(
        self,
        model: Decoder,
        cache: KeyValueCache,
        scheduler: Scheduler,
        drawing: Drawing,
        adapters: Adapters,
        graphs: bool,
        decode_steps: int,
        observe: Callable[[Plan, torch.Tensor], None] | None = None,
    ) -> None:
        """
        graphs: capture steps in which all decode, for the device to replay. decode_steps: see `EngineConfig`.
        observe: is shown each plan, when its tokens are recorded, with the residual stream [N, H] of its rows.
        """
        self._model, self._scheduler, self._drawing, self._adapters = model, scheduler, drawing, adapters
        self.cache: KeyValueCache | None = cache
        self._observe, self._stream = observe, torch.empty(0)
        self._device = model.embed_tokens.weight.device
        self._telling, self._are_telling = np.zeros(len(scheduler.limit), dtype=bool), False
        self._graphs: DecodeGraphs | None = None
        if graphs:
            self._graphs = DecodeGraphs(lambda inputs: self._compute(inputs, True), self._device, decode_steps)
        self._recorded: tuple[object, ...] = ()
        self._most_steps, self._seconds = decode_steps, ROUND_SECONDS  # of the last step in which all decoded
        self.steps = self.computed_tokens = self.generated_tokens = 0

    def drop(self) -> None:
        """Give the memory of the cache back."""
        self.cache = None
        if self._graphs is not None:
            self._graphs.forget()

    def most_steps(self) -> int:
        """Return how many decode steps of those who run may follow each other before anybody looks."""
        if not self._drawing.are_free(self._scheduler.running):
            return 1
        most = min(self._most_steps, int(ROUND_SECONDS / self._seconds))
        if self._drawing.are_told:
            most = min(most, MOST_LOGITS // (len(self._scheduler.running) * self._model.config.vocab_size))
        return most

    @torch.inference_mode()
    def advance(self, plan: Plan) -> Draws:
        """Compute a plan and record its tokens."""
        began = time.perf_counter()
        table, count = self._drawing.table(plan.samplers, plan.places), len(plan.samplers)
        logits, found = self._logits(plan, table)
        self.steps += plan.steps
        self.computed_tokens += len(plan.tokens) * plan.steps
        if len(plan.scored_slots):
            self._score(plan, logits[count:])
        draws = self._drawing.draw(logits[:count], plan, self._scheduler.tokens, self._scheduler.limit, table, found)
        self._scheduler.commit(plan, draws.kept, draws.tokens, draws.logprobs)
        self.generated_tokens += int(np.count_nonzero(draws.kept))
        if len(plan.tokens) == len(plan.slots):
            self._seconds = (time.perf_counter() - began) / plan.steps
        if self._observe is not None:
            self._observe(plan, self._stream)
        return draws

    def event(self, plan: Plan, draws: Draws, first: int, end: int, last: int) -> Event:
        """Return what rows first .. end - 1 of a plan gave their sequence, whose rows go on to last - 1."""
        sequence, reason = self._scheduler.in_slot(plan.samplers[first]), reason_of(draws, end - 1)
        told = end - bool(reason == "error")
        own = slice(first - last, end - last or None)
        is_first = plan.places[first] == len(sequence.request.prompt)
        return Event(
            sequence.request.id,
            draws.tokens[first:told].tolist(),
            draws.logprobs[first:told].tolist(),
            reason,
            sequence.top_logprobs[own],
            sequence.versions[-1][1],
            sequence.prompt_logprobs() if is_first else None,
            sequence.masks[own],
            sequence.cached,
            sequence.error,
            sequence.waited,
        )

    def begin(self, sequence: Sequence) -> None:
        """Note whether a sequence that has got a slot wants to be told how its prompt is read."""
        unread = len(sequence.tokens) == len(sequence.request.prompt)
        self._telling[sequence.slot] = sequence.request.progress and unread
        self._are_telling |= bool(self._telling[sequence.slot])

    def reading(self, plan: Plan, first: bool = False) -> list[Event]:
        """Return how much of their prompts those of a plan who want to know it have read by now.

        first: only of those who have computed nothing yet.
        """
        if not self._are_telling:
            return []
        events = []
        for slot in plan.slots[self._telling[plan.slots]].tolist():
            sequence, read = self._scheduler.in_slot(slot), int(self._scheduler.computed[slot])
            if first and read > sequence.cached:
                continue
            self._telling[slot] = read < len(sequence.request.prompt)
            events.append(
                Event(sequence.request.id, [], [], cached_tokens=sequence.cached, waited=sequence.waited, read=read)
            )
        self._are_telling = bool(self._telling.any())
        return events

    def _logits(self, plan: Plan, table: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits [R + P, V] of a plan's rows, and what `table` draws from them where the device did so in
        the same breath: the only place where the model is called.
        """
        assert self.cache is not None
        if plan.copies.size:
            self.cache.copy(*self._tensor(plan.copies))
        slots = plan.slots.tolist() if self._adapters else []
        owners = [self._scheduler.in_slot(slot).adapter.number for slot in slots]
        graphs = None if any(owners) else self._graphs_of(plan)  # which would have the rows of each adapter in them
        if graphs is not None and (captured := graphs.run(plan, table, self._drawing.are_told)) is not None:
            return captured
        with self._adapters.chosen(owners, plan.counts) if any(owners) else nullcontext():
            if plan.steps > 1:
                return self._several(plan, table)
            arrays = (plan.tokens, plan.positions, plan.cache_slots, plan.block_tables)
            inputs = tuple(self._tensor(x) for x in (*arrays, plan.query_starts, plan.lengths, plan.rows))
            are_all = len(plan.rows) == len(plan.tokens) and not len(plan.scored_slots)  # then they are in order, too
            return self._compute(inputs, are_all), None

    def _graphs_of(self, plan: Plan) -> DecodeGraphs | None:
        """Return what may have captured a plan's steps. On a CPU a step is recorded with the very weights that it was
        given, by operators that take a whole layer, so those must be where they were, and angles be looked up.
        """
        if self._graphs is None or self._device.type != "cpu":
            return self._graphs
        logits = len(plan.slots) * self._model.config.vocab_size
        if logits > RECORDED_LOGITS or int(plan.positions.max()) >= TABLE:
            return None
        parts = self._model.plain_parts()
        if parts is None:
            return None
        if len(parts) != len(self._recorded) or not all(map(is_, parts, self._recorded)):
            self._graphs.forget()
            self._recorded = parts
        return self._graphs

    def _several(self, plan: Plan, table: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same of a plan of several steps; of the logits the last step's alone if nobody is told of them."""
        steps, count = plan.steps, len(plan.slots)
        tokens, block_tables, starts, rows = (
            self._tensor(x) for x in (plan.tokens, plan.block_tables, plan.query_starts, plan.rows)
        )
        lengths = plan.lengths + np.arange(steps, dtype=np.int32)[:, None]
        settings = np.ascontiguousarray(table.reshape(count, steps, -1).swapaxes(0, 1))
        arrays = (plan.positions.reshape(steps, count), plan.cache_slots.reshape(steps, count), lengths, settings)
        logits, sampled = [], []
        for place, slot, length, setting in zip(*(self._tensor(x).unbind() for x in arrays), strict=True):
            found = self._compute((tokens, place, slot, block_tables, starts, length, rows), True)
            sampled.append(sample_tokens(found, setting))
            tokens = sampled[-1].tokens.clamp_min(0)
            if self._drawing.are_told:
                logits.append(found)
        together = as_one(torch.stack(each, 1).flatten() for each in zip(*sampled, strict=True))
        return torch.stack(logits, 1).flatten(0, 1) if logits else found, together

    def _compute(self, inputs: Inputs, are_all: bool = False) -> torch.Tensor:
        """are_all: whether the logits of all rows are wanted."""
        assert self.cache is not None
        tokens, positions, *places, rows = inputs
        context = PagedContext(self.cache, *places)
        if self._observe is None:
            return self._model(tokens, positions, context, rows=None if are_all else rows)
        logits, self._stream = self._model.logits_and_stream(tokens, positions, context, rows)
        return logits

    def _score(self, plan: Plan, logits: torch.Tensor) -> None:
        """Keep the log-probabilities of prompts' tokens, and their rivals for those who want them."""
        slots, places = plan.scored_slots, plan.scored_places
        scores = log_probs(logits, self._scheduler.tokens[slots, places]).cpu().numpy()
        for slot in np.unique(slots).tolist():
            sequence, rows = self._scheduler.in_slot(slot), np.flatnonzero(slots == slot)
            assert sequence.scores is not None
            sequence.scores[places[rows] - 1] = scores[rows]
            count = min(sequence.request.sampling.prompt_logprobs or 0, logits.shape[1])
            if count:
                tokens, values = top_logprobs(logits[self._tensor(rows)], count)
                for place, *row in zip(places[rows].tolist(), tokens.tolist(), values.tolist(), strict=True):
                    sequence.rivals[place] = list(zip(*row, strict=True))

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._device.type == "cpu" else tensor.to(self._device)


def reason_of(draws: Draws, row: int) -> str | None:
    """Return why a sequence ended with this draw, if it did."""
    if draws.failed[row]:
        return "error"
    return "stop" if draws.stopped[row] else "length" if draws.full[row] else None


def groups_of(slots: np.ndarray, kept: np.ndarray) -> list[tuple[int, int]]:
    """Return the runs of kept rows of each sequence: (first, end); the first row of each is kept."""
    same = slots[1:] == slots[:-1]
    if not same.any():
        return [(row, row + 1) for row in range(len(slots))]
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    sizes = np.add.reduceat(kept, starts, dtype=np.int64)
    return list(zip(starts.tolist(), (starts + sizes).tolist(), strict=True))
