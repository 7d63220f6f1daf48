"""Who computes what in the next step: one token budget for decode and prefill alike, the most urgent first.

Every running sequence has a slot, a row in preallocated arrays, and a sequence is only its number of known tokens
(`length`) and of those in the cache (`computed`). A step computes some of the tokens between the two; a sequence
that has all of them in the cache gets its next token. Decode, whole prefill, chunked prefill, what a prefix hit leaves
and recomputation after preemption are this one rule. Python touches single sequences only when they come and go, and
when they fill a block.

A sequence whose prompt begins as one does that is being computed shares those blocks at once and waits until they are
filled; if the whole prompt is the same (the many samples of one prompt in rollouts and pass@k), it copies the last,
half-filled block too and computes one token.
"""

import time
from collections.abc import Callable

import numpy as np

from liaoyuan.inference.blocks import BlockPool, Key
from liaoyuan.inference.plan import Plan, empty_table, lay_out
from liaoyuan.inference.request import RequestId
from liaoyuan.inference.sequence import Sequence, block_keys, root_key
from liaoyuan.inference.speculation import Speculation
from liaoyuan.inference.waiting import Waiting

NOBODY = -1
NO_COPIES = np.empty((2, 0), dtype=np.int64)


class Scheduler:
    """Sequences that wait, sequences that run, and the blocks that these hold."""

    def __init__(
        self,
        max_sequences: int,
        max_length: int,
        max_batch_tokens: int,
        pool: BlockPool,
        block_size: int,
        max_scored_rows: int,
        prefix_cache: bool,
        begin: Callable[[Sequence], None],
    ) -> None:
        """
        max_scored_rows: of the prompts whose log-probabilities are asked for, how many rows a step computes.
        begin: told of each sequence that gets a slot.
        """
        self.pool, self.block_size, self.max_batch_tokens = pool, block_size, max_batch_tokens
        self.max_scored_rows, self.prefix_cache = max_scored_rows, prefix_cache
        self._begin = begin
        self.speculation: Speculation | None = None
        self.version = 0
        self.draining = False  # nobody new is started
        self.waiting = Waiting()
        self.running = np.empty(0, dtype=np.int64)  # slots, the most urgent first, then in order of arrival
        self.sequences: dict[RequestId, Sequence] = {}
        self.preemptions = self.hit_tokens = self.asked_tokens = 0
        self._in_slot: list[Sequence | None] = [None] * max_sequences
        self._free_slots = list(range(max_sequences - 1, -1, -1))
        self.table = empty_table(max_sequences, max_length, block_size)
        self.tokens, self.logprobs, self.blocks = self.table.tokens, self.table.logprobs, self.table.blocks
        self.length, self.computed, self.prompt = self.table.length, self.table.computed, self.table.prompt
        self.allocated, self.limit = np.zeros((2, max_sequences), dtype=np.int64)  # blocks; tokens
        self._known = np.zeros(max_sequences, dtype=np.int64)  # blocks that have been offered to the prefix cache
        self._account, self._priority, self._arrival = np.zeros((3, max_sequences), dtype=np.int64)
        self._leader = np.full(max_sequences, NOBODY, dtype=np.int64)  # the slot whose tokens are waited for
        self._need = np.zeros(max_sequences, dtype=np.int64)  # how many of them
        self._owners: dict[tuple[Key, tuple[int, ...]], int] = {}  # prompt -> the slot that computes it
        self._pending: dict[Key, int] = {}  # key of a block -> the slot that fills it
        self._deadlines = False  # whether anybody has one

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.sequences[sequence.request.id] = sequence
        self._deadlines |= sequence.deadline is not None
        self.waiting.enter(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or aborted, and free what it holds."""
        del self.sequences[sequence.request.id]
        if sequence.slot < 0:
            self.waiting.take(sequence)
        else:
            self._stop(sequence)
        self.waiting.leave(sequence)

    def overdue(self) -> list[Sequence]:
        """Return those whose time is over."""
        if not self._deadlines:
            return []
        now = time.monotonic()
        having = [one for one in self.sequences.values() if one.deadline is not None]
        self._deadlines = bool(having)
        return [one for one in having if one.deadline is not None and one.deadline <= now]

    def plan(self, most_steps: Callable[[], int] = lambda: 1) -> Plan | None:
        """Admit who fits, give blocks, and share out the token budget; None if nobody runs.

        most_steps: asked, when it is known who runs, how many steps the plan may have if all decode.
        """
        self._grow()
        self._admit()
        if not len(self.running):
            return None
        copies, todo = NO_COPIES, self.length[self.running] - self.computed[self.running]
        if np.count_nonzero(self._leader[self.running] != NOBODY):  # of few it is three times as fast as `any`
            copies = self._fork()
            waits = self._leader[self.running] != NOBODY
            todo = np.where(waits, 0, self.length[self.running] - self.computed[self.running])
        slots, counts, steps = self.running, todo, 1
        if np.count_nonzero(todo != 1):  # else all decode, and there is a token for everyone who runs
            counts = self._share(todo)
            chosen = counts > 0
            slots, counts, todo = slots[chosen], counts[chosen], todo[chosen]
        elif self.speculation is None and (most := most_steps()) > 1:
            steps = self._steps(slots, most)
        self.waiting.charge(self._account[slots], counts * steps)
        drafts = self._guess(slots, counts, todo)
        return lay_out(self.table, slots, counts + drafts, drafts, copies, steps)

    def commit(self, plan: Plan, kept: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Record a step's result: of the plan's draws [R] those that count, bool [R], and what was drawn, [R]."""
        slots, place = plan.samplers[kept], plan.places[kept]
        self.tokens[slots, place] = tokens[kept]
        self.logprobs[slots, place] = logprobs[kept]
        self.computed[plan.slots] += plan.counts - plan.drafts
        self.length[slots] = place + 1  # of several draws of one sequence the last one stays
        if plan.steps > 1:
            self.computed[plan.slots] = self.length[plan.slots] - 1
        if self.speculation is not None:
            guessing = plan.slots[plan.drafts > 0]
            right = self.length[guessing] - self.computed[guessing] - 1
            self.computed[guessing] += right
            self.speculation.learn(guessing, plan.drafts[plan.drafts > 0], right)
        self._offer(plan.slots)

    def finish(self, slots: np.ndarray) -> list[Sequence]:
        """Forget the sequences in these slots, keeping their tokens and log-probabilities in what is returned."""
        done = [self.in_slot(slot) for slot in slots.tolist()]
        for sequence in done:
            self.remove(sequence)
        return done

    def preempt_all(self) -> None:
        """Send everyone back to the queue; all is computed again when they return."""
        for slot in self.running[::-1].tolist():
            if self._in_slot[slot] is not None:
                self.preempt(self.in_slot(slot))

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the head of the queue; its keys and values are computed again later."""
        self.preemptions += 1
        self._stop(sequence)
        self.waiting.put_back(sequence)

    def in_slot(self, slot: int) -> Sequence:
        """Return the sequence that runs in a slot."""
        sequence = self._in_slot[slot]
        assert sequence is not None
        return sequence

    def held(self) -> np.ndarray:
        """Return all blocks that running sequences hold, one after another."""
        parts = [self.blocks[slot, : self.allocated[slot]] for slot in self.running.tolist()]
        return np.concatenate([*parts, np.empty(0, dtype=np.int32)])

    def _share(self, todo: np.ndarray) -> np.ndarray:
        """Return how many tokens each running sequence computes: all who decode, then prefill in order of urgency."""
        decode = todo == 1
        left = self.max_batch_tokens - int(decode.sum())
        prefill = np.where(decode, 0, todo)
        scored = self.table.scored[self.running] & ~decode
        if scored.any():
            rows = np.where(scored, prefill, 0)
            prefill = np.where(scored, np.clip(self.max_scored_rows - (rows.cumsum() - rows), 0, prefill), prefill)
        before = prefill.cumsum() - prefill
        return np.where(decode, 1, np.clip(left - before, 0, prefill))

    def _steps(self, slots: np.ndarray, most: int) -> int:
        """Return how many steps all who decode can go on, at most `most`: to the limit of the first, with a further
        block for each who needs one if there are as many.
        """
        length = self.length[slots]
        most = 1 if np.count_nonzero(self.table.scored[slots]) else min(most, int((self.limit[slots] - length).min()))
        space = self.allocated[slots] * self.block_size - length + 1
        wanting = slots[space < most]
        if len(wanting) and len(wanting) <= self.pool.free - len(self.running):
            self.blocks[wanting, self.allocated[wanting]] = self.pool.take(len(wanting))
            self.allocated[wanting] += 1
            space = self.allocated[slots] * self.block_size - length + 1
        return max(1, min(most, int(space.min())))

    def _guess(self, slots: np.ndarray, counts: np.ndarray, todo: np.ndarray) -> np.ndarray:
        """Guess next tokens of those who decode, within the budget and the blocks at hand; return how many of each."""
        drafts = np.zeros(len(slots), dtype=np.int64)
        if self.speculation is None or not len(decode := np.flatnonzero((counts == todo) & (todo == 1))):
            return drafts
        chosen = slots[decode]
        most = np.minimum(self.speculation.most(chosen), self.limit[chosen] - self.length[chosen] - 1)
        budget = (self.max_batch_tokens - int(counts.sum())) // len(decode)
        space = self.allocated[chosen] * self.block_size - self.length[chosen]
        wanting = np.flatnonzero((space < most) & (budget > 0))[: max(0, self.pool.free - len(self.running))]
        if len(wanting):
            more = chosen[wanting]
            self.blocks[more, self.allocated[more]] = self.pool.take(len(more))
            self.allocated[more] += 1
            space[wanting] += self.block_size
        most = np.clip(np.minimum(most, space), 0, budget)
        drafts[decode] = self.speculation.guess(chosen, self.length[chosen], most, self.tokens)
        return drafts

    def _fork(self) -> np.ndarray:
        """Let those go on for whom all that they waited for is computed; return the blocks to copy, int64 [2, C]."""
        slots = self.running[self._leader[self.running] != NOBODY]
        leaders = self._leader[slots]
        ready = self.computed[leaders] >= self._need[slots]
        slots, leaders = slots[ready], leaders[ready]
        self.computed[slots] = self._need[slots]
        self._leader[slots] = NOBODY
        half = self._need[slots] % self.block_size != 0
        slots, leaders = slots[half], leaders[half]
        places = self._need[slots] // self.block_size
        return self.blocks[np.stack([leaders, slots]), places].astype(np.int64)

    def _offer(self, slots: np.ndarray) -> None:
        """Let blocks that have been filled be found by others."""
        filled = self.computed[slots] // self.block_size
        more = filled > self._known[slots]
        if not np.count_nonzero(more):
            return
        for slot, count in zip(slots[more].tolist(), filled[more].tolist(), strict=True):
            sequence, known = self.in_slot(slot), int(self._known[slot])
            self._known[slot] = count
            block_keys(sequence.root, sequence.keys, self.tokens[slot, : count * self.block_size], self.block_size)
            for index in range(known, count):
                key = sequence.keys[index]
                if self.prefix_cache:
                    self.pool.remember(key, int(self.blocks[slot, index]))
                if self._pending.get(key) == slot:
                    del self._pending[key]

    def _grow(self) -> None:
        """Give a block to everyone whose next token begins one; if none is left, the least urgent gives way."""
        while True:
            slots = self.running[self.length[self.running] > self.allocated[self.running] * self.block_size]
            if len(slots) <= self.pool.free:
                break
            self.preempt(self.in_slot(int(self.running[-1])))
        if len(slots):
            self.blocks[slots, self.allocated[slots]] = self.pool.take(len(slots))
            self.allocated[slots] += 1

    def _admit(self) -> None:
        """Start those who wait, the most urgent first, while there are slots and blocks for all their known tokens.

        One block for everyone who runs stays in reserve, so that a newcomer is not preempted at once. Who would not
        compute in this step need not hold blocks yet.
        """
        if not len(self.waiting) or self.draining:
            return
        todo = self.length[self.running] - self.computed[self.running]
        budget = self.max_batch_tokens - int(todo.sum())
        while budget > 0 and (sequence := self.waiting.first()) is not None:
            shared = self._shared(sequence)
            if not self._fits(sequence, shared.blocks):
                if not self._make_room(sequence):
                    break
                continue
            self.waiting.take(sequence)
            budget -= self._start(sequence, shared)

    def _fits(self, sequence: Sequence, shared: np.ndarray) -> bool:
        blocks = -(-len(sequence.tokens) // self.block_size) - len(shared) + self.pool.idle_among(shared)
        return bool(self._free_slots) and blocks + len(self.running) <= self.pool.free

    def _make_room(self, sequence: Sequence) -> bool:
        """Preempt the least urgent of those who run if it is less urgent than `sequence`."""
        if not len(self.running) or self._priority[self.running[-1]] <= sequence.request.priority:
            return False
        self.preempt(self.in_slot(int(self.running[-1])))
        return True

    def _shared(self, sequence: Sequence) -> "_Shared":
        """Find what a sequence need not compute: blocks that are known, and those that others are filling."""
        root = root_key(self.version, sequence.adapter.digest, sequence.request.salt)
        if root != sequence.root:
            sequence.root, sequence.keys = root, []
        if not sequence.is_scored:
            return _Shared(np.empty(0, dtype=np.int32), 0, NOBODY, 0)  # every row is wanted
        usable = (len(sequence.tokens) - 1) // self.block_size  # the last token's logits are wanted in any case
        block_keys(root, sequence.keys, sequence.tokens, self.block_size)
        keys = sequence.keys[:usable]
        blocks = self.pool.find(keys) if self.prefix_cache else np.empty(0, dtype=np.int32)
        hits, leader, pending = len(blocks), NOBODY, []
        for place in range(hits, usable):
            slot = self._pending.get(keys[place], NOBODY)
            if slot == NOBODY:
                break
            leader = slot
            pending.append(self.blocks[slot, place])
        blocks = np.concatenate([blocks, np.array(pending, dtype=np.int32)])
        need = len(blocks) * self.block_size
        prompt = sequence.request.prompt
        owner = self._owners.get((root, prompt), NOBODY) if len(sequence.tokens) == len(prompt) > 1 else NOBODY
        if owner != NOBODY and len(blocks) == usable:
            leader, need = owner, len(prompt) - 1
        return _Shared(blocks, hits * self.block_size, leader, need)

    def _start(self, sequence: Sequence, shared: "_Shared") -> int:
        """Give a sequence a slot and its blocks; return how many tokens it has to compute."""
        slot = sequence.slot = self._free_slots.pop()
        self._in_slot[slot] = sequence
        count, prompt = len(sequence.tokens), sequence.request.prompt
        self.pool.share(shared.blocks)
        own = self.pool.take(-(-count // self.block_size) - len(shared.blocks))
        blocks = np.concatenate([shared.blocks, own])
        self.blocks[slot, : len(blocks)] = blocks
        self.allocated[slot], self._known[slot] = len(blocks), shared.computed // self.block_size
        self.tokens[slot, :count], self.logprobs[slot, :count] = sequence.tokens, sequence.logprobs
        self.length[slot], self.computed[slot], self.limit[slot] = count, shared.computed, sequence.limit
        self._leader[slot], self._need[slot] = shared.leader, shared.need
        self.prompt[slot], self.table.scored[slot] = len(prompt), not sequence.is_scored
        request = sequence.request
        self._account[slot], self._priority[slot], self._arrival[slot] = (
            sequence.account, request.priority, sequence.arrival,
        )  # fmt: skip
        for key in sequence.keys[len(shared.blocks) :]:
            self._pending.setdefault(key, slot)
        self._owners.setdefault((sequence.root, prompt), slot)
        self._note_start(sequence, shared)
        self._begin(sequence)
        self.running = np.append(self.running, slot)
        if len(self.running) > 1:
            self.running = self.running[np.lexsort((self._arrival[self.running], self._priority[self.running]))]
        return count - max(shared.computed, shared.need)

    def _note_start(self, sequence: Sequence, shared: "_Shared") -> None:
        if not sequence.versions or sequence.versions[-1][1] != self.version:
            sequence.versions.append((len(sequence.tokens), self.version))
        if sequence.cached < 0:
            sequence.cached = max(shared.computed, shared.need)
            sequence.waited = time.monotonic() - sequence.added
            self.hit_tokens += sequence.cached
            self.asked_tokens += len(sequence.request.prompt)

    def _stop(self, sequence: Sequence) -> None:
        """Take a sequence out of its slot, with what it has; who waits for its tokens goes back to the queue."""
        slot = sequence.slot
        count = self.length[slot]
        sequence.tokens, sequence.logprobs = self.tokens[slot, :count].copy(), self.logprobs[slot, :count].copy()
        self.running = self.running[self.running != slot]
        if self._owners.get((sequence.root, sequence.request.prompt)) == slot:
            del self._owners[(sequence.root, sequence.request.prompt)]
        for key in sequence.keys:
            if self._pending.get(key) == slot:
                del self._pending[key]
        self._leader[slot] = NOBODY
        self.pool.give(self.blocks[slot, : self.allocated[slot]])
        self._free_slots.append(slot)
        self._in_slot[slot] = None
        sequence.slot = -1
        while len(followers := self.running[self._leader[self.running] == slot]):
            self.preempt(self.in_slot(int(followers[-1])))


class _Shared:
    """What a new sequence need not compute itself.

    blocks: int32, the first of its table; computed: tokens in them that are ready. leader: the slot that is to compute
    all up to `need` tokens, or NOBODY.
    """

    def __init__(self, blocks: np.ndarray, computed: int, leader: int, need: int) -> None:
        self.blocks, self.computed, self.leader, self.need = blocks, computed, leader, need
