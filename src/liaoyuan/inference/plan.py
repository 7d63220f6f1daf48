"""One step as flat arrays: which tokens are computed, where their keys and values go, and whose next token is drawn."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Plan:
    """One step, for S sequences and N tokens.

    slots, counts: [S], the sequences and how many new tokens each has.
    tokens, positions, cache_slots: int64 [N].
    block_tables int32 [S, blocks], query_starts int32 [S + 1], lengths int32 [S]: see `ops.paged_attention`.
    rows: int64 [R + P], whose logits are wanted: of the R draws, then of the P tokens of prompts that are scored.
    samplers, places: [R], for whom a token is drawn, and which of its tokens that will be.
    scored_slots, scored_places: [P], which token of whom is scored by each of the other rows.
    copies: int64 [2, C], cache blocks to copy before the step, from and to.
    """

    slots: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    cache_slots: np.ndarray
    block_tables: np.ndarray
    query_starts: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    samplers: np.ndarray
    places: np.ndarray
    scored_slots: np.ndarray
    scored_places: np.ndarray
    copies: np.ndarray


class Table(Protocol):
    """What a plan is made from: arrays with a row for each slot; see `Scheduler`."""

    tokens: np.ndarray
    length: np.ndarray
    computed: np.ndarray
    prompt: np.ndarray
    scores: np.ndarray
    tables: np.ndarray
    block_size: int


NONE = np.empty(0, dtype=np.int64)


def lay_out(table: Table, slots: np.ndarray, counts: np.ndarray, copies: np.ndarray) -> Plan:
    """Return the plan in which `slots` compute their next `counts` tokens, both int64 [S]."""
    starts = np.zeros(len(slots) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    computed = table.computed[slots]
    lengths = computed + counts
    owner = np.repeat(np.arange(len(slots)), counts)
    positions = np.arange(starts[-1]) + (computed - starts[:-1])[owner]
    places = slots[owner]
    size = table.block_size
    samples = lengths == table.length[slots]
    rows = starts[1:][samples].astype(np.int64) - 1
    scored, scored_slots, scored_places = NONE, NONE, NONE
    if table.scores[slots].any():
        wanted = table.scores[places] & (positions < table.prompt[places] - 1)
        scored = np.flatnonzero(wanted)
        scored_slots, scored_places = places[scored], positions[scored] + 1
    return Plan(
        slots=slots,
        counts=counts,
        tokens=table.tokens[places, positions],
        positions=positions,
        cache_slots=table.tables[places, positions // size].astype(np.int64) * size + positions % size,
        block_tables=table.tables[slots, : -(-int(lengths.max()) // size)] if len(slots) else table.tables[:0],
        query_starts=starts,
        lengths=lengths.astype(np.int32),
        rows=np.concatenate([rows, scored]) if len(scored) else rows,
        samplers=slots[samples],
        places=lengths[samples],
        scored_slots=scored_slots,
        scored_places=scored_places,
        copies=copies,
    )
