"""The engine: continuous batching of requests over a paged cache, with the training model's own forward.

`generate` runs a list of requests to their end; `add`, `step` and `abort` let a server drive it. Between steps the
engine holds no copy of the weights, and when it is idle no cached keys and values, so weights may change in place
between two calls of `generate`.
"""

import time

import numpy as np
import torch

from liaoyuan.config import Config
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.cache import BlockPool, KeyValueCache, PagedContext
from liaoyuan.inference.request import Completion, Event, Request, RequestId, TopLogprobs
from liaoyuan.inference.sampling import sample, top_logprobs
from liaoyuan.inference.scheduler import Plan, Scheduler, Sequence
from liaoyuan.models import Decoder
from liaoyuan.rundir import Progress, Report, silent


class EngineConfig(Config):
    """Sizes of an engine.

    max_sequences: how many run at once. max_batch_tokens: tokens of one step, decode and prefill together.
    cache_tokens: size of the cache; None: enough for all sequences at full length, within `cache_bytes`.
    seed: of requests that bring none.
    """

    max_sequences: int = 256
    max_batch_tokens: int = 2048
    block_size: int = 16
    cache_tokens: int | None = None
    cache_bytes: int = 2**30
    seed: int = 0


class Engine:
    """One model, one cache. Not thread-safe: `EngineThread` brings it to many clients."""

    def __init__(self, model: Decoder, config: EngineConfig = EngineConfig()) -> None:
        if config.max_batch_tokens < config.max_sequences:
            raise LiaoyuanError(
                f"max_batch_tokens ({config.max_batch_tokens}) must be at least max_sequences "
                f"({config.max_sequences}): every running sequence needs a token a step."
            )
        self.model, self.config = model, config
        self._device = model.embed_tokens.weight.device
        num_blocks = _num_blocks(model, config)
        self._pool = BlockPool(num_blocks)
        self._cache = KeyValueCache(model.config, num_blocks, config.block_size, self._device)
        longest = model.config.max_position_embeddings
        self.room = min(longest, num_blocks * config.block_size)  # the most tokens of one request
        self._scheduler = Scheduler(
            config.max_sequences, longest, config.max_batch_tokens, self._pool, config.block_size
        )
        self._added = self._steps = self._prompt_tokens = self._computed_tokens = self._generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._scheduler.sequences)

    def generate(self, requests: list[Request], report: Report = silent) -> list[Completion]:
        """Run requests to their end and return their completions in the same order.

        Raises:
            LiaoyuanError: a request is refused (see `add`; then none has run), or the engine is at work.
        """
        if self.has_work:
            raise LiaoyuanError("generate needs an idle engine; this one still has requests.")
        self._added = 0  # requests without a seed get the same numbers in every call
        try:
            for request in requests:
                self.add(request)
            done = self._run(len(requests), report)
        except BaseException:
            for sequence in list(self._scheduler.sequences.values()):
                self._scheduler.remove(sequence)
            raise
        return [done[request.id] for request in requests]

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            LiaoyuanError: see `check`.
        """
        self.check(request)
        sampling, count = request.sampling, len(request.prompt)
        limit = self.room if sampling.max_tokens is None else count + sampling.max_tokens
        seed = self.config.seed * 2**32 + self._added if sampling.seed is None else sampling.seed
        self._added += 1
        self._prompt_tokens += count
        tokens = np.array(request.prompt, dtype=np.int64)
        self._scheduler.add(Sequence(request, seed % 2**64, limit, tokens, np.zeros(count, dtype=np.float32)))

    def check(self, request: Request) -> None:
        """Raise LiaoyuanError if a request could never fit, or its id, tokens or parameters are wrong."""
        request.sampling.check()
        if request.id in self._scheduler.sequences:
            raise LiaoyuanError(f"There is already a request with the id '{request.id}'.")
        if not request.prompt:
            raise LiaoyuanError("The prompt is empty: it needs at least one token.")
        vocabulary = self.model.config.vocab_size
        if min(request.prompt) < 0 or max(request.prompt) >= vocabulary:
            wrong = next(token for token in request.prompt if not 0 <= token < vocabulary)
            raise LiaoyuanError(f"The prompt has the token {wrong}, but the vocabulary has {vocabulary} tokens.")
        count, most = len(request.prompt), request.sampling.max_tokens
        if count + (most or 1) > self.room:
            raise LiaoyuanError(
                f"The request needs {count + (most or 1)} tokens (prompt {count}, completion {most or 'at least 1'}), "
                f"but at most {self.room} fit: shorten the prompt or max_tokens."
            )

    def step(self) -> list[Event]:
        """Compute one batch; return an event for every request that got a token."""
        plan = self._scheduler.plan()
        if plan is None:
            return []
        stopped, full = self._advance(plan)
        scheduler, slots = self._scheduler, plan.slots[plan.samples]
        place = scheduler.length[slots] - 1
        tokens, logprobs = scheduler.tokens[slots, place].tolist(), scheduler.logprobs[slots, place].tolist()
        reasons = np.where(stopped, "stop", np.where(full, "length", None)).tolist()  # type: ignore[call-overload]
        events = []
        for slot, token, logprob, reason in zip(slots.tolist(), tokens, logprobs, reasons, strict=True):
            sequence = scheduler.in_slot(slot)
            top = sequence.top_logprobs[-1:] if sequence.top_logprobs else []
            events.append(Event(sequence.request.id, [token], [logprob], reason, top))
        scheduler.finish(slots[stopped | full])
        self._check_idle()
        return events

    def abort(self, request_id: RequestId) -> bool:
        """Forget a request and free its blocks; return whether it was here."""
        sequence = self._scheduler.sequences.get(request_id)
        if sequence is None:
            return False
        self._scheduler.remove(sequence)
        self._check_idle()
        return True

    def statistics(self) -> dict[str, int]:
        """Return counts: what runs and waits now, blocks, and totals since the start."""
        running = len(self._scheduler.running)
        return {
            "running": running,
            "waiting": len(self._scheduler.waiting),
            "free_blocks": self._pool.free,
            "blocks": self._pool.size,
            "steps": self._steps,
            "prompt_tokens": self._prompt_tokens,
            "computed_tokens": self._computed_tokens,
            "generated_tokens": self._generated_tokens,
            "preemptions": self._scheduler.preemptions,
        }

    def _run(self, total: int, report: Report) -> dict[RequestId, Completion]:
        done: dict[RequestId, Completion] = {}
        scheduler, before, last = self._scheduler, self._generated_tokens, time.monotonic()
        while (plan := scheduler.plan()) is not None:
            stopped, full = self._advance(plan)
            slots = plan.slots[plan.samples]
            ended = stopped | full
            for sequence, stop in zip(scheduler.finish(slots[ended]), stopped[ended].tolist(), strict=True):
                done[sequence.request.id] = _completion(sequence, "stop" if stop else "length")
            if time.monotonic() - last >= 1.0 or len(done) == total:
                last = time.monotonic()
                report(Progress(len(done), total, "request", f"{self._generated_tokens - before} tokens"))
        self._check_idle()
        return done

    @torch.inference_mode()
    def _advance(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """Compute a plan and record its tokens; return who of the samplers met a stop token and who their limit."""
        if plan.copies.size:
            self._cache.copy(*self._tensor(plan.copies))
        tensors = (plan.cache_slots, plan.block_tables, plan.query_starts, plan.lengths)
        context = PagedContext(self._cache, *(self._tensor(values) for values in tensors))
        logits = self.model(
            self._tensor(plan.tokens), self._tensor(plan.positions), context, rows=self._tensor(plan.rows)
        )
        slots = plan.slots[plan.samples]
        self._steps += 1
        self._computed_tokens += len(plan.tokens)
        self._generated_tokens += len(slots)
        if len(slots):
            tokens, logprobs = sample(logits, self._scheduler.settings(slots))
            self._keep_top(slots, logits)
            return self._scheduler.commit(plan, tokens.cpu().numpy(), logprobs.cpu().numpy())
        return self._scheduler.commit(plan, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))

    def _keep_top(self, slots: np.ndarray, logits: torch.Tensor) -> None:
        """Keep the most probable tokens of those who asked for them."""
        wanted = np.minimum(self._scheduler.top_logprobs[slots], logits.shape[1])
        rows = np.flatnonzero(wanted)
        if not len(rows):
            return
        tokens, logprobs = top_logprobs(logits[self._tensor(rows)], int(wanted.max()))
        for row, row_tokens, row_logprobs in zip(rows.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            count = wanted[row]
            top: TopLogprobs = list(zip(row_tokens[:count], row_logprobs[:count], strict=True))
            self._scheduler.in_slot(slots[row]).top_logprobs.append(top)

    def _check_idle(self) -> None:
        if not self._scheduler.sequences:
            self._pool.check()

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)


def _completion(sequence: Sequence, reason: str) -> Completion:
    start = len(sequence.request.prompt)
    return Completion(
        sequence.request.id,
        sequence.tokens[start:].tolist(),
        sequence.logprobs[start:].tolist(),
        reason,
        sequence.top_logprobs,
    )


def _num_blocks(model: Decoder, config: EngineConfig) -> int:
    shape = model.config
    if config.cache_tokens is not None:
        return max(1, config.cache_tokens // config.block_size)
    longest = -(-shape.max_position_embeddings // config.block_size)
    width = shape.num_hidden_layers * shape.num_key_value_heads * (shape.head_dim + shape.value_head_dim)
    block_bytes = width * shape.torch_dtype.itemsize * config.block_size
    return max(longest, min(config.max_sequences * longest, config.cache_bytes // block_bytes))
