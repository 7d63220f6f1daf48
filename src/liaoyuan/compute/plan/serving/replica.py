"""A replica that serves: the engine's own scheduler, with a clock that the price of each step moves on.

What is computed when, who waits, what is found in the prefix cache and who gives way is decided by
`inference.scheduler` itself; only the model is missing, and the tokens mean nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from liaoyuan.compute.plan.serving.asks import Ask
from liaoyuan.inference.blocks import BlockPool
from liaoyuan.inference.plan import Plan
from liaoyuan.inference.request import Request, SamplingParams
from liaoyuan.inference.scheduler import Scheduler
from liaoyuan.inference.sequence import Sequence, block_keys, root_key
from liaoyuan.inference.sizes import EngineConfig

Price = Callable[[np.ndarray, np.ndarray, int], float]  # counts, lengths, rows -> seconds; see `StepPrice`
KEPT_EVERY = 32  # steps
FIRST_PREFIX = 2**40  # tokens that stand for prefixes begin here, above the numbers of requests


@dataclass
class Answer:
    """What became of a request. first, last: when its first and its last token came, by the clock of the trace; inf:
    never. cached: tokens of the prompt that were known. refused: it could never fit.
    """

    ask: Ask
    number: int
    first: float = float("inf")
    last: float = float("inf")
    cached: int = 0
    refused: bool = False


@dataclass
class Replica:
    """One engine that serves. Its time is `now`; it is busy or idle until whoever drives it says what comes next.

    blocks: of its cache. most: tokens of the longest request. steps, busy: how many it took, and their seconds.
    gaps: seconds between two tokens of one answer, for all. peak: blocks held at most. kinds: every `KEPT_EVERY`-th
    step, as a price takes it.
    """

    price: Price
    config: EngineConfig
    blocks: int
    most: int
    now: float = 0.0
    steps: int = 0
    computed: int = 0
    busy: float = 0.0
    peak: int = 0
    gaps: list[np.ndarray] = field(default_factory=list)
    kinds: list[tuple[np.ndarray, np.ndarray, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        self.pool = BlockPool(self.blocks)
        self._scheduler = Scheduler(
            config.max_sequences,
            self.most,
            config.max_batch_tokens,
            self.pool,
            config.block_size,
            16,
            config.prefix_cache,
            lambda _: None,
        )
        self._answers: dict[int, Answer] = {}
        self._last = np.zeros(config.max_sequences)
        self._prefixes: dict[str, int] = {}
        self._arrivals = 0

    @property
    def open(self) -> int:
        """How many requests are here."""
        return len(self._answers)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of prompts here that are not computed yet, and one for each answer under way."""
        scheduler = self._scheduler
        todo = scheduler.length[scheduler.running] - scheduler.computed[scheduler.running]
        waits = sum(len(one.request.prompt) for one in scheduler.sequences.values() if one.slot < 0)
        return int(todo.sum()) + waits

    @property
    def preemptions(self) -> int:
        """How often somebody gave way."""
        return self._scheduler.preemptions

    def submit(self, answer: Answer, known: bool = False) -> None:
        """Let a request come now. known: keys and values of its prompt's full blocks came with it, if there is room."""
        ask = answer.ask
        total = ask.prompt_tokens + ask.output_tokens
        if total > min(self.most, self.blocks * self.config.block_size):
            answer.refused = True
            return
        prompt = self._prompt(answer)
        self._arrivals += 1
        request = Request(answer.number, prompt, SamplingParams(max_tokens=ask.output_tokens))
        tokens = np.array(prompt, dtype=np.int64)
        sequence = Sequence(request, 0, total, self._arrivals, None, tokens, np.zeros(len(tokens), dtype=np.float32))
        if known:
            self._bring(sequence)
        self._answers[answer.number] = answer
        self._scheduler.add(sequence)

    def advance(self, until: float) -> list[Answer]:
        """Take all steps that begin before `until`; return the answers that ended, each with its times."""
        ended = list[Answer]()
        while self.now < until:
            plan = self._scheduler.plan() if self._answers else None
            if plan is None:
                self.now = until if until != float("inf") else self.now
                break
            ended += self._step(plan)
        return ended

    def _step(self, plan: Plan) -> list[Answer]:
        took = self.price(plan.counts, plan.lengths, len(plan.samplers))
        self.now += took
        self.busy += took
        if self.steps % KEPT_EVERY == 0:
            self.kinds.append((plan.counts, plan.lengths, len(plan.samplers)))
        self.steps += 1
        self.computed += len(plan.tokens)
        self.peak = max(self.peak, self.pool.size - self.pool.free)
        scheduler, slots = self._scheduler, plan.samplers
        numbers = np.array([scheduler.in_slot(slot).request.id for slot in slots.tolist()], dtype=np.int64)
        scheduler.commit(plan, np.ones(len(slots), dtype=bool), numbers, np.zeros(len(slots), dtype=np.float32))
        self._note(slots, plan.places, numbers)
        return self._finish(slots[plan.places + 1 >= scheduler.limit[slots]])

    def _note(self, slots: np.ndarray, places: np.ndarray, numbers: np.ndarray) -> None:
        """Note when the tokens came that were drawn."""
        is_first = places == self._scheduler.prompt[slots]
        if len(later := slots[~is_first]):
            self.gaps.append(self.now - self._last[later])
        for slot, number in zip(slots[is_first].tolist(), numbers[is_first].tolist(), strict=True):
            self._answers[number].first = self.now
            self._answers[number].cached = max(0, self._scheduler.in_slot(slot).cached)
        self._last[slots] = self.now

    def _finish(self, slots: np.ndarray) -> list[Answer]:
        ended = []
        for sequence in self._scheduler.finish(slots):
            answer = self._answers.pop(int(sequence.request.id))
            answer.last = self.now
            ended.append(answer)
        return ended

    def _prompt(self, answer: Answer) -> tuple[int, ...]:
        ask = answer.ask
        prefix = self._prefixes.setdefault(ask.prefix, FIRST_PREFIX + len(self._prefixes))
        return (prefix,) * ask.prefix_tokens + (answer.number,) * (ask.prompt_tokens - ask.prefix_tokens)

    def _bring(self, sequence: Sequence) -> None:
        """Let the full blocks of a prompt be known here, as if another engine had sent them."""
        root, size = root_key(self._scheduler.version, sequence.adapter.digest, ""), self.config.block_size
        keys = list[bytes]()
        block_keys(root, keys, sequence.tokens[: (len(sequence.tokens) - 1) // size * size], size)
        missing = keys[len(self.pool.find(keys)) :]
        if len(missing) > self.pool.free:
            return
        blocks = self.pool.take(len(missing))
        for key, block in zip(missing, blocks.tolist(), strict=True):
            self.pool.remember(key, block)
        self.pool.give(blocks)
