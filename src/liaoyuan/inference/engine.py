"""The engine: continuous batching of requests over a paged cache, with the training model's own forward.

`generate` runs a list of requests to their end; `add`, `step` and `abort` let a server drive it. `pause`, `resume`,
`sleep`, `wake` and `update_weights` change its state; each either succeeds or raises, and a broken engine says so
instead of answering.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.adapters import Adapters
from liaoyuan.inference.blocks import BlockPool
from liaoyuan.inference.cache import KeyValueCache
from liaoyuan.inference.draft_model import DraftModel
from liaoyuan.inference.drawing import Drawing
from liaoyuan.inference.further_draft import FurtherDrafter
from liaoyuan.inference.graphs import can_capture
from liaoyuan.inference.model_step import MOST_LOGITS, ModelStep, groups_of, reason_of
from liaoyuan.inference.plan import Plan
from liaoyuan.inference.request import Completion, Event, Request, RequestId
from liaoyuan.inference.scheduler import Scheduler
from liaoyuan.inference.sequence import UNKNOWN, Sequence
from liaoyuan.inference.sizes import EngineConfig, num_blocks
from liaoyuan.inference.speculation import Drafter, NGramDrafter, Speculation
from liaoyuan.inference.spread.memory import Memory, OwnMemory
from liaoyuan.inference.weights import Weights
from liaoyuan.models import Decoder
from liaoyuan.models.lora import adapters_of
from liaoyuan.rundir import Progress, Report, silent

State = Literal["ready", "draining", "paused", "asleep", "broken"]


class Engine:
    """One model, one cache. Not thread-safe: `EngineThread` brings it to many clients."""

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig = EngineConfig(),
        draft: Decoder | Drafter | None = None,
        memory: Memory | None = None,
    ) -> None:
        """draft: a small model of the same vocabulary that guesses next tokens, or whatever else does.

        memory: where the model's weights and its cache lie, if not in this process alone.
        """
        if config.max_batch_tokens < config.max_sequences:
            raise LiaoyuanError(
                f"max_batch_tokens ({config.max_batch_tokens}) must be at least max_sequences "
                f"({config.max_sequences}): every running sequence needs a token a step."
            )
        if config.exact:
            from liaoyuan.inference.exactness.proof import require_exact  # which itself runs engines

            require_exact(model, memory)
        self.model, self.config = model, config
        self.state: State = "ready"
        self._device = model.embed_tokens.weight.device
        small = draft if isinstance(draft, Decoder) else None
        blocks, vocabulary = num_blocks(model, config, small), model.config.vocab_size
        self.pool = BlockPool(blocks)
        self.lenders: list[Callable[[], np.ndarray]] = []  # each tells which blocks it holds beside running sequences
        self._memory: Memory = memory or OwnMemory(model)
        self._dropped = False  # whether the memory of the weights was given back
        longest = model.config.max_position_embeddings
        self.room = min(longest, blocks * config.block_size)  # the most tokens of one request
        self._drawing = Drawing(config.max_sequences, vocabulary)
        self._scheduler = Scheduler(
            config.max_sequences,
            longest,
            config.max_batch_tokens,
            self.pool,
            config.block_size,
            max(16, MOST_LOGITS // vocabulary),
            config.prefix_cache,
            self._begin,
        )
        drafter = self._new_drafter(draft)
        self._speculation: Speculation | None = None
        if drafter is not None:
            self._speculation = Speculation(drafter, config.max_sequences, config.speculate_tokens)
        self._scheduler.speculation = self._speculation
        self.adapters = Adapters(self._memory.adapter_stacks())
        graphs = can_capture(self._device) if config.graphs is None else config.graphs
        observe = drafter.observe if isinstance(drafter, FurtherDrafter) else None
        # They make no calls that others could follow, keep no stream, and compute with what adapters in training were.
        graphs &= memory is None and observe is None and not adapters_of(model)
        running = (self._scheduler, self._drawing, self.adapters)
        self._step = ModelStep(model, self._new_cache(), *running, graphs, config.decode_steps, observe)
        self._ended: list[tuple[Sequence, str]] = []  # without a token of this step, and not told yet
        self._arrivals = self._added = self._prompt_tokens = 0
        self.updates = 0  # of the weights

    @property
    def memory(self) -> Memory:
        """Where the model lies: whoever calls it between two steps may need a cache of his own there."""
        return self._memory

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._scheduler.sequences)

    @property
    def can_step(self) -> bool:
        """Whether a step would do anything now."""
        active = self.has_work if self.state == "ready" else self.state == "draining"
        return bool(self._ended) or active

    @property
    def cache(self) -> KeyValueCache:
        """The memory of the cache; raises LiaoyuanError while the engine sleeps."""
        if self._step.cache is None:
            raise LiaoyuanError("The engine is asleep: it has no cache.")
        return self._step.cache

    @property
    def has_weights(self) -> bool:
        """Whether the weights are here and whole."""
        return not self._dropped and self.state != "broken"

    @property
    def version(self) -> int:
        """The version of the weights."""
        return self._scheduler.version

    def generate(
        self, requests: list[Request], report: Report = silent, keep_prefixes: bool = False
    ) -> list[Completion]:
        """Run requests to their end and return their completions in the same order.

        keep_prefixes: use what earlier calls left in the prefix cache. False forgets it, so that weights may have been
            changed in place since.

        Raises:
            LiaoyuanError: a request is refused (see `add`; then none has run), or the engine is at work or not ready.
        """
        if self.has_work or self.state != "ready":
            raise LiaoyuanError("generate needs an idle engine; this one still has requests or is not ready.")
        if not keep_prefixes:
            self.pool.forget()
        self._added = 0  # requests without a seed get the same numbers in every call
        try:
            for request in requests:
                self.add(request)
            done = self._run(len(requests), report)
        except BaseException:
            for sequence in list(self._scheduler.sequences.values()):
                self._scheduler.remove(sequence)
            self._ended.clear()
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
        self._arrivals += 1
        self._prompt_tokens += count
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        tokens = np.array(request.prompt, dtype=np.int64)
        sequence = Sequence(
            request, seed % 2**64, limit, self._arrivals, deadline, tokens, np.zeros(count, dtype=np.float32)
        )
        sequence.adapter = self.adapters.find(request.adapter)
        if sampling.prompt_logprobs is not None:
            sequence.scores = np.full(count - 1, UNKNOWN, dtype=np.float32)
        self._scheduler.add(sequence)

    def check(self, request: Request) -> None:
        """Raise LiaoyuanError if a request could never fit, or its id, tokens or parameters are wrong."""
        request.sampling.check()
        self.adapters.find(request.adapter)
        if request.id in self._scheduler.sequences:
            raise LiaoyuanError(f"There is already a request with the id '{request.id}'.")
        if not request.prompt:
            raise LiaoyuanError("The prompt is empty: it needs at least one token.")
        vocabulary = self.model.config.vocab_size
        if min(request.prompt) < 0 or max(request.prompt) >= vocabulary:
            wrong = next(token for token in request.prompt if not 0 <= token < vocabulary)
            raise LiaoyuanError(f"The prompt has the token {wrong}, but the vocabulary has {vocabulary} tokens.")
        for name, token in request.sampling.named_tokens():
            if not 0 <= token < vocabulary:
                raise LiaoyuanError(f"'{name}' has the token {token}, but the vocabulary has {vocabulary} tokens.")
        count, most = len(request.prompt), request.sampling.max_tokens
        if count + (most or 1) > self.room:
            raise LiaoyuanError(
                f"The request needs {count + (most or 1)} tokens (prompt {count}, completion {most or 'at least 1'}), "
                f"but at most {self.room} fit: shorten the prompt or max_tokens."
            )

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load the adapter in `folder` (PEFT's format) for requests that name it; LiaoyuanError if it is refused."""
        self.adapters.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter once the requests that use it have ended; LiaoyuanError if there is none of this name."""
        self.adapters.unload(name, self._adapters_in_use())

    def step(self) -> list[Event]:
        """Compute one batch, or a few where all decode; return events of every request that got a token or ended."""
        scheduler = self._scheduler
        plan = self._plan()
        events = self._tell_ended()
        if plan is None:
            self._after_step()
            return events
        events += self._step.reading(plan, first=True)
        draws = self._step.advance(plan)
        events += self._step.reading(plan)
        for first, end in groups_of(plan.samplers, draws.kept):
            together = 1 if plan.steps > 1 else end - first  # tokens that were guessed right are one event
            events += [self._step.event(plan, draws, at, at + together, end) for at in range(first, end, together)]
        scheduler.finish(plan.samplers[draws.ended])
        self._after_step()
        return events

    def abort(self, request_id: RequestId) -> bool:
        """Forget a request and free its blocks; return whether it was here."""
        sequence = self._scheduler.sequences.get(request_id)
        if sequence is None:
            return False
        self._scheduler.remove(sequence)
        self._check_idle()
        return True

    def pause(self, mode: Literal["abort", "wait", "keep"] = "keep") -> None:
        """Stop computing. New requests wait until `resume`.

        mode: "abort" ends all requests; "wait" lets those that run go on to their end first (the state is "draining"
            until then); "keep" freezes them, and they go on at `resume`.

        Raises:
            LiaoyuanError: the engine sleeps or is broken.
        """
        if mode not in ("abort", "wait", "keep"):
            raise LiaoyuanError(f"There is no way to pause '{mode}'; there are abort, wait and keep.")
        self._need("ready", "draining", "paused")
        if mode == "abort":
            for sequence in list(self._scheduler.sequences.values()):
                self._end(sequence, "abort")
        self._scheduler.draining = mode == "wait"
        self.state = "draining" if mode == "wait" and len(self._scheduler.running) else "paused"
        self._check_idle()

    def resume(self) -> None:
        """Go on after `pause`.

        Raises:
            LiaoyuanError: the engine sleeps, is broken, or has no weights.
        """
        self._need("ready", "draining", "paused")
        if self._dropped:
            raise LiaoyuanError("The engine has no weights since it slept without them: update them first.")
        self._scheduler.draining = False
        self.state = "ready"

    def sleep(self, without_weights: bool = False) -> None:
        """Give the memory of the cache back, and with `without_weights` that of the weights too; requests wait.

        Raises:
            LiaoyuanError: the engine is broken or sleeps.
        """
        self._need("ready", "draining", "paused")
        self._forget_computed()
        self._step.drop()
        if self._speculation is not None:
            self._speculation.drop()
        if without_weights:
            self._memory.drop_weights()
            self._dropped = True
        self._scheduler.draining = False
        self.state = "asleep"

    def wake(self) -> None:
        """Take the memory again. The engine is paused then: `resume` goes on, after `update_weights` if it has none.

        Raises:
            LiaoyuanError: the engine does not sleep, or there is not enough memory (it sleeps on then).
        """
        self._need("asleep")
        cache = self._new_cache()
        self._memory.take_memory()
        self._step.cache, self.state = cache, "paused"

    @torch.no_grad()
    def update_weights(self, weights: Weights, version: int | None = None) -> int:
        """Replace weights in place and return their version (the next number if None is given).

        All that was computed with the old weights is forgotten; requests go on with the new ones, and say which version
        made which token.

        Args:
            weights: a Hugging Face folder, or tensors by the model's own names.

        Raises:
            LiaoyuanError: see `checked_weights`: nothing has changed then. Or the engine sleeps, or copying failed in
                the middle: it is broken then, until a whole update succeeds.
        """
        self._need("ready", "draining", "paused", "broken")
        new = self._memory.checked(weights)
        missing = self.model.state_dict().keys() - new.keys()
        if missing and (self._dropped or self.state == "broken"):
            raise LiaoyuanError(f"The engine has no whole weights, and the update lacks '{min(missing)}'.")
        self._forget_computed()
        before, self.state = self.state, "broken"
        self._memory.copy_weights(new)
        self._dropped = False
        self.updates += 1
        self.state = "paused" if before == "broken" else before
        self._scheduler.version = self.version + 1 if version is None else version
        return self.version

    def forget_prefixes(self) -> None:
        """Forget all that was computed for requests that have ended."""
        self.pool.forget()

    def checksum(self) -> str:
        """Return the checksum of the weights; see `weights_checksum`.

        Raises:
            LiaoyuanError: there are none.
        """
        if not self.has_weights:
            raise LiaoyuanError("The engine has no whole weights: update them first.")
        return self._memory.checksum()

    def statistics(self) -> dict[str, Any]:
        """Return counts: what runs and waits now, blocks, and totals since the start; whether it is exact, and in which
        layout over processes.
        """
        scheduler = self._scheduler
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "free_blocks": self.pool.free,
            "cached_blocks": self.pool.cached,
            "blocks": self.pool.size,
            "steps": self._step.steps,
            "prompt_tokens": self._prompt_tokens,
            "computed_tokens": self._step.computed_tokens,
            "generated_tokens": self._step.generated_tokens,
            "preemptions": scheduler.preemptions,
            "prefix_hit_tokens": scheduler.hit_tokens,
            "prefix_asked_tokens": scheduler.asked_tokens,
            "version": self.version,
            "guessed_tokens": self._speculation.guessed if self._speculation else 0,
            "guessed_right": self._speculation.right if self._speculation else 0,
            "guesses": self._speculation.rounds if self._speculation else 0,
            "exact": "not proven" if self.config.exact is None else self.config.exact,
            "layout": self._memory.describe(),
            **self._memory.statistics(),
        }

    def _run(self, total: int, report: Report) -> dict[RequestId, Completion]:
        done: dict[RequestId, Completion] = {}
        scheduler, before, last = self._scheduler, self._step.generated_tokens, time.monotonic()
        while self.has_work:
            plan = self._plan()
            done |= {sequence.request.id: sequence.completion(reason) for sequence, reason in self._ended}
            self._ended.clear()
            if plan is not None:
                draws = self._step.advance(plan)
                rows = np.flatnonzero(draws.ended).tolist()
                for row, sequence in zip(rows, scheduler.finish(plan.samplers[rows]), strict=True):
                    done[sequence.request.id] = sequence.completion(str(reason_of(draws, row)))
            if time.monotonic() - last >= 1.0 or len(done) == total:
                last = time.monotonic()
                report(Progress(len(done), total, "request", f"{self._step.generated_tokens - before} tokens"))
        self._after_step()
        return done

    def _plan(self) -> Plan | None:
        for sequence in self._scheduler.overdue():
            self._end(sequence, "timeout")
        if self.state not in ("ready", "draining"):
            return None
        self._memory.before_step()
        return self._scheduler.plan(self._step.most_steps)

    def _begin(self, sequence: Sequence) -> None:
        """A sequence has got a slot."""
        self._drawing.start(sequence)
        self._step.begin(sequence)
        if self._speculation is not None:
            self._speculation.start(sequence)

    def _end(self, sequence: Sequence, reason: str) -> None:
        """End a request between two steps; the next one tells of it."""
        self._scheduler.remove(sequence)
        self._ended.append((sequence, reason))

    def _tell_ended(self) -> list[Event]:
        ended, self._ended = self._ended, []
        return [Event(sequence.request.id, [], [], reason, version=self.version) for sequence, reason in ended]

    def _after_step(self) -> None:
        if self.state == "draining" and not len(self._scheduler.running):
            self.state = "paused"
        self._check_idle()

    def _forget_computed(self) -> None:
        self._scheduler.preempt_all()
        self.pool.forget()

    def _need(self, *states: State) -> None:
        if self.state not in states:
            hint = {"asleep": "wake it first", "broken": "its weights are not whole: update them first"}
            raise LiaoyuanError(f"The engine is {self.state}: {hint.get(self.state, 'this cannot be done now')}.")

    def _new_cache(self) -> KeyValueCache:
        return self._memory.new_cache(self.pool.size, self.config.block_size)

    def _new_drafter(self, draft: Decoder | Drafter | None) -> Drafter | None:
        config, table = self.config, self._scheduler.table
        if draft is not None and config.speculate:
            raise LiaoyuanError(f"A draft model and speculate='{config.speculate}' both guess: leave out one of them.")
        if draft is not None and not isinstance(draft, Decoder):
            return draft
        if draft is not None:
            sizes = (self.pool.size, config.max_batch_tokens)
            return DraftModel(draft, self.model.config.vocab_size, table, *sizes, self._drawing.guess)
        if config.speculate == "mtp":
            streams = self._memory.further_streams
            return FurtherDrafter(self.model, table, lambda: self.cache, self._drawing.guess, streams)
        return NGramDrafter(config.max_sequences) if config.speculate else None

    def _adapters_in_use(self) -> set[int]:
        return {sequence.adapter.number for sequence in self._scheduler.sequences.values()}

    def _check_idle(self) -> None:
        if self.adapters.has_leaving:
            self.adapters.release(self._adapters_in_use())
        if not self._scheduler.sequences:
            self.pool.check(np.concatenate([self._scheduler.held(), *(held() for held in self.lenders)]))
