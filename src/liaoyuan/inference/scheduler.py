"""Who computes what in the next step: first come, first served, one token budget for decode and prefill alike.

Every running sequence has a slot, a row in preallocated arrays, and a sequence is only its number of known tokens
(`length`) and of those in the cache (`computed`). A step computes some of the tokens between the two; a sequence
that has all of them in the cache gets its next token. Decode, whole prefill, chunked prefill and recomputation
after preemption are this one rule. Python touches single sequences only when they come and go.

A sequence whose prompt another one is already computing waits for that and copies its keys and values (the many
samples of one prompt in rollouts and pass@k): all but the last token, whose logits it needs.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from liaoyuan.inference.cache import BlockPool
from liaoyuan.inference.request import Request, RequestId, TopLogprobs
from liaoyuan.inference.sampling import Settings, uniform


@dataclass
class Sequence:
    """A request on its way. tokens and logprobs hold what was generated before a preemption."""

    request: Request
    seed: int
    limit: int  # of prompt and completion together
    tokens: np.ndarray
    logprobs: np.ndarray
    slot: int = -1  # -1: waiting
    top_logprobs: list[TopLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """One step, for S sequences and N tokens.

    slots, counts: [S], the sequences and how many new tokens each has; samples: bool [S], who gets a next token.
    tokens, positions, cache_slots: int64 [N]; rows: int64 [R], the last row of each who samples.
    block_tables int32 [S, blocks], query_starts int32 [S + 1], lengths int32 [S]: see `ops.paged_attention`.
    copies: int64 [2, C], cache blocks to copy before the step, from and to.
    """

    slots: np.ndarray
    counts: np.ndarray
    samples: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    cache_slots: np.ndarray
    rows: np.ndarray
    block_tables: np.ndarray
    query_starts: np.ndarray
    lengths: np.ndarray
    copies: np.ndarray


class Scheduler:
    """Sequences that wait, sequences that run, and the blocks that these hold."""

    def __init__(
        self, max_sequences: int, max_length: int, max_batch_tokens: int, pool: BlockPool, block_size: int
    ) -> None:
        self.pool, self.block_size, self.max_batch_tokens = pool, block_size, max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running = np.empty(0, dtype=np.int64)  # slots in order of arrival
        self.sequences: dict[RequestId, Sequence] = {}
        self.preemptions = 0
        self._in_slot: list[Sequence | None] = [None] * max_sequences
        self._free_slots = list(range(max_sequences - 1, -1, -1))
        self.tokens = np.zeros((max_sequences, max_length), dtype=np.int64)
        self.logprobs = np.zeros((max_sequences, max_length), dtype=np.float32)
        self.length, self.computed, self.allocated, self.limit = np.zeros((4, max_sequences), dtype=np.int64)
        self._prompt = np.zeros(max_sequences, dtype=np.int64)  # length of the prompt
        self._tables = np.zeros((max_sequences, -(-max_length // block_size)), dtype=np.int32)
        self._leader = np.full(max_sequences, -1, dtype=np.int64)  # the slot whose prompt is waited for
        self._owners: dict[tuple[int, ...], int] = {}  # prompt -> the slot that computes it
        self._stop = np.full((max_sequences, 1), -1, dtype=np.int64)
        self._seed = np.zeros(max_sequences, dtype=np.uint64)
        self._temperature, self._top_p, self._min_p = np.zeros((3, max_sequences))
        self._top_k, self.top_logprobs = np.zeros((2, max_sequences), dtype=np.int64)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.sequences[sequence.request.id] = sequence
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or aborted, and free what it holds."""
        del self.sequences[sequence.request.id]
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self.running = self.running[self.running != sequence.slot]
            self._release(sequence)

    def plan(self) -> Plan | None:
        """Admit who fits, give blocks, and share out the token budget; None if nobody runs."""
        self._grow()
        self._admit()
        if not len(self.running):
            return None
        copies = self._fork()
        waits = self._leader[self.running] >= 0
        todo = np.where(waits, 0, self.length[self.running] - self.computed[self.running])
        counts = self._share(todo)
        chosen = counts > 0
        return self._plan(self.running[chosen], counts[chosen], (counts == todo)[chosen], copies)

    def settings(self, slots: np.ndarray) -> Settings:
        """Return the sampling parameters of slots, with the random numbers of their next positions."""
        number = uniform(self._seed[slots], self.length[slots])
        return Settings(self._temperature[slots], self._top_p[slots], self._top_k[slots], self._min_p[slots], number)

    def commit(self, plan: Plan, tokens: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Record a step's result for those who sampled, [R]; return who met a stop token and who their limit."""
        self.computed[plan.slots] += plan.counts
        slots = plan.slots[plan.samples]
        place = self.length[slots]
        self.tokens[slots, place] = tokens
        self.logprobs[slots, place] = logprobs
        self.length[slots] = place + 1
        stopped = (self._stop[slots] == tokens[:, None]).any(1)
        return stopped, place + 1 >= self.limit[slots]

    def finish(self, slots: np.ndarray) -> list[Sequence]:
        """Forget the sequences in these slots, keeping their tokens and log-probabilities in what is returned."""
        if not len(slots):
            return []
        gone = np.zeros(len(self._in_slot), dtype=bool)
        gone[slots] = True
        self.running = self.running[~gone[self.running]]
        done = [self.in_slot(slot) for slot in slots.tolist()]
        for sequence in done:
            self._save(sequence)
            self._release(sequence)
            del self.sequences[sequence.request.id]
        return done

    def in_slot(self, slot: int) -> Sequence:
        """Return the sequence that runs in a slot."""
        sequence = self._in_slot[slot]
        assert sequence is not None
        return sequence

    def _fork(self) -> np.ndarray:
        """Return the block copies for those whose prompt, but for its last token, another sequence has computed."""
        slots = self.running[self._leader[self.running] >= 0]
        slots = slots[self.computed[self._leader[slots]] >= self._prompt[slots] - 1]
        if not len(slots):
            return np.empty((2, 0), dtype=np.int64)
        blocks = -(-(self._prompt[slots] - 1) // self.block_size)
        held = np.arange(blocks.max()) < blocks[:, None]
        tables = self._tables[np.stack([self._leader[slots], slots]), : held.shape[1]]
        self.computed[slots] = self._prompt[slots] - 1
        self._leader[slots] = -1
        return tables[:, held].astype(np.int64)

    def _share(self, todo: np.ndarray) -> np.ndarray:
        """Return how many tokens each running sequence computes: all who decode, then prefill in order of arrival."""
        decode = todo == 1
        left = self.max_batch_tokens - int(decode.sum())
        prefill = np.where(decode, 0, todo)
        before = prefill.cumsum() - prefill
        return np.where(decode, 1, np.clip(left - before, 0, prefill))

    def _plan(self, slots: np.ndarray, counts: np.ndarray, samples: np.ndarray, copies: np.ndarray) -> Plan:
        starts = np.zeros(len(slots) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        computed = self.computed[slots]
        lengths = computed + counts
        owner = np.repeat(np.arange(len(slots)), counts)
        positions = np.arange(starts[-1]) + (computed - starts[:-1])[owner]
        places = slots[owner]
        size = self.block_size
        return Plan(
            slots=slots,
            counts=counts,
            samples=samples,
            tokens=self.tokens[places, positions],
            positions=positions,
            cache_slots=self._tables[places, positions // size].astype(np.int64) * size + positions % size,
            rows=starts[1:][samples].astype(np.int64) - 1,
            block_tables=self._tables[slots, : -(-int(lengths.max()) // size)],
            query_starts=starts,
            lengths=lengths.astype(np.int32),
            copies=copies,
        )

    def _grow(self) -> None:
        """Give a block to everyone whose next token begins one; if none is left, the last who came gives way."""
        while True:
            slots = self.running[self.length[self.running] > self.allocated[self.running] * self.block_size]
            if len(slots) <= self.pool.free:
                break
            self._preempt(self.in_slot(int(self.running[-1])))
        if len(slots):
            self._tables[slots, self.allocated[slots]] = self.pool.take(len(slots))
            self.allocated[slots] += 1

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the head of the queue; its keys and values are computed again later."""
        self.preemptions += 1
        self._save(sequence)
        self.running = self.running[self.running != sequence.slot]
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _admit(self) -> None:
        """Start those who wait, in order, while there are slots and blocks for all their known tokens.

        One block for everyone who runs stays in reserve, so that a newcomer is not preempted at once.
        """
        fresh = []
        reserve = len(self.running)
        budget = self.max_batch_tokens - reserve  # who would not compute in this step need not hold blocks yet
        while self.waiting and self._free_slots and budget > 0:
            count = -(-len(self.waiting[0].tokens) // self.block_size)
            if self.pool.free < count + reserve:
                break
            sequence = self.waiting.popleft()
            self._start(sequence, self.pool.take(count))
            fresh.append(sequence.slot)
            reserve += 1
            budget -= len(sequence.tokens)
        if fresh:
            self.running = np.append(self.running, np.array(fresh, dtype=np.int64))

    def _start(self, sequence: Sequence, blocks: np.ndarray) -> None:
        slot = sequence.slot = self._free_slots.pop()
        self._in_slot[slot] = sequence
        count = len(sequence.tokens)
        self.tokens[slot, :count] = sequence.tokens
        self.logprobs[slot, :count] = sequence.logprobs
        self.length[slot], self.computed[slot], self.limit[slot] = count, 0, sequence.limit
        self._tables[slot, : len(blocks)] = blocks
        self.allocated[slot] = len(blocks)
        prompt = sequence.request.prompt
        self._prompt[slot] = len(prompt)
        owner = self._owners.setdefault(prompt, slot)
        self._leader[slot] = owner if owner != slot and len(prompt) > 1 else -1
        sampling = sequence.request.sampling
        stops = sampling.stop_token_ids
        if len(stops) > self._stop.shape[1]:
            wider = np.full((len(self._stop), len(stops) - self._stop.shape[1]), -1, dtype=np.int64)
            self._stop = np.hstack([self._stop, wider])
        self._stop[slot] = -1
        self._stop[slot, : len(stops)] = stops
        self._seed[slot] = sequence.seed
        self._temperature[slot], self._top_p[slot] = sampling.temperature, sampling.top_p
        self._top_k[slot], self._min_p[slot] = sampling.top_k, sampling.min_p
        self.top_logprobs[slot] = sampling.top_logprobs

    def _save(self, sequence: Sequence) -> None:
        count = self.length[sequence.slot]
        sequence.tokens = self.tokens[sequence.slot, :count].copy()
        sequence.logprobs = self.logprobs[sequence.slot, :count].copy()

    def _release(self, sequence: Sequence) -> None:
        slot = sequence.slot
        if self._owners.get(sequence.request.prompt) == slot:
            del self._owners[sequence.request.prompt]
            self._leader[self._leader == slot] = -1  # who still waits computes the prompt for itself
        self._leader[slot] = -1
        self.pool.give(self._tables[slot, : self.allocated[slot]])
        self._free_slots.append(slot)
        self._in_slot[slot] = None
        sequence.slot = -1
