"""One step as flat arrays: which tokens are computed, where their keys and values go, and whose next token is drawn."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """One step, for S sequences and N tokens.

    slots, counts: [S], the sequences and how many new tokens each has.
    tokens, positions, cache_slots: int64 [N].
    block_tables int32 [S, blocks], query_starts int32 [S + 1], lengths int32 [S]: see `ops.paged_attention`.
    drafts: int64 [S], how many of a sequence's new tokens, the last ones, are only guessed.
    rows: int64 [R + P], whose logits are wanted: of the R draws, then of the P tokens of prompts that are scored.
    samplers, places: [R], for whom a token is drawn, and which of its tokens that will be. A sequence with guessed
        tokens has several rows in order: one after its last known token and one after each guess.
    scored_slots, scored_places: [P], which token of whom is scored by each of the other rows.
    copies: int64 [2, C], cache blocks to copy before the step, from and to.
    steps: how many decode steps these are. If several, each has one token of each sequence, which the step before it
        drew: `tokens`, `lengths` and `rows` are of the first, `positions` and `cache_slots` of all, [steps * N], and
        R is S * steps, those of a sequence in order.
    """

    slots: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    cache_slots: np.ndarray
    block_tables: np.ndarray
    query_starts: np.ndarray
    lengths: np.ndarray
    drafts: np.ndarray
    rows: np.ndarray
    samplers: np.ndarray
    places: np.ndarray
    scored_slots: np.ndarray
    scored_places: np.ndarray
    copies: np.ndarray
    steps: int = 1


@dataclass(frozen=True)
class Table:
    """What is known of the sequences that run, in arrays with a row for each slot.

    tokens int64 [slots, n], logprobs fp32 [slots, n]: prompt and completion; blocks int32 [slots, m]: of the cache.
    length, computed, prompt: int64 [slots], known tokens, those of them in the cache, those of the prompt.
    scored: bool [slots], whether log-probabilities of the prompt are wanted.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    blocks: np.ndarray
    length: np.ndarray
    computed: np.ndarray
    prompt: np.ndarray
    scored: np.ndarray
    block_size: int


def empty_table(slots: int, max_length: int, block_size: int) -> Table:
    length, computed, prompt = np.zeros((3, slots), dtype=np.int64)
    return Table(
        np.zeros((slots, max_length), dtype=np.int64),
        np.zeros((slots, max_length), dtype=np.float32),
        np.zeros((slots, -(-max_length // block_size)), dtype=np.int32),
        length,
        computed,
        prompt,
        np.zeros(slots, dtype=bool),
        block_size,
    )


NONE = np.empty(0, dtype=np.int64)


def lay_out(
    table: Table, slots: np.ndarray, counts: np.ndarray, drafts: np.ndarray, copies: np.ndarray, steps: int = 1
) -> Plan:
    """Return the plan in which `slots` compute their next `counts` tokens, the last `drafts` of them guessed, [S].

    steps: more than one only if each has one token to compute, and blocks for those that come.
    """
    computed, known = table.computed[slots], table.length[slots]
    unlike = np.count_nonzero(counts != 1) or np.count_nonzero(table.scored[slots])
    if not unlike and not np.count_nonzero(computed + 1 != known):
        return _decode(table, slots, counts, drafts, copies, computed, steps)
    starts = np.zeros(len(slots) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    lengths = computed + counts
    owner = np.repeat(np.arange(len(slots)), counts)
    positions = np.arange(starts[-1]) + (computed - starts[:-1])[owner]
    places = slots[owner]
    size = table.block_size
    draws = np.where(lengths - drafts == known, drafts + 1, 0)
    sampler = np.repeat(np.arange(len(slots)), draws)
    step = np.arange(len(sampler)) - (draws.cumsum() - draws)[sampler]
    rows = (starts[1:] - draws)[sampler] + step
    scored, scored_slots, scored_places = NONE, NONE, NONE
    if table.scored[slots].any():
        wanted = table.scored[places] & (positions < table.prompt[places] - 1)
        scored = np.flatnonzero(wanted)
        scored_slots, scored_places = places[scored], positions[scored] + 1
    return Plan(
        slots=slots,
        counts=counts,
        tokens=table.tokens[places, positions],
        positions=positions,
        cache_slots=table.blocks[places, positions // size].astype(np.int64) * size + positions % size,
        block_tables=table.blocks[slots, : -(-int(lengths.max()) // size)] if len(slots) else table.blocks[:0],
        query_starts=starts,
        lengths=lengths.astype(np.int32),
        drafts=drafts,
        rows=np.concatenate([rows, scored]) if len(scored) else rows,
        samplers=slots[sampler],
        places=known[sampler] + step,
        scored_slots=scored_slots,
        scored_places=scored_places,
        copies=copies,
    )


def _decode(
    table: Table,
    slots: np.ndarray,
    counts: np.ndarray,
    drafts: np.ndarray,
    copies: np.ndarray,
    computed: np.ndarray,
    steps: int,
) -> Plan:
    """The same where every sequence computes its last token: most steps are such, and wait for nothing but this."""
    rows, lengths = np.arange(len(slots) + 1), computed + 1
    owners, positions, samplers, places = slots, computed, slots, lengths
    if steps > 1:
        each = np.arange(steps)
        owners, positions = np.tile(slots, steps), (computed + each[:, None]).ravel()
        samplers, places = np.repeat(slots, steps), (lengths[:, None] + each).ravel()
    index, offset = np.divmod(positions, table.block_size)
    return Plan(
        slots=slots,
        counts=counts,
        tokens=table.tokens[slots, computed],
        positions=positions,
        cache_slots=table.blocks[owners, index] * np.int64(table.block_size) + offset,
        block_tables=table.blocks[slots, : int(index.max()) + 1],
        query_starts=rows.astype(np.int32),
        lengths=lengths.astype(np.int32),
        drafts=drafts,
        rows=rows[:-1],
        samplers=samplers,
        places=places,
        scored_slots=NONE,
        scored_places=NONE,
        copies=copies,
        steps=steps,
    )
