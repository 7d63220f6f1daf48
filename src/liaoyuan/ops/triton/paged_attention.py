"""Attention over a paged cache: a program takes some tokens of one sequence, with all query heads of one key head.

The tile, the order of keys and their parts are those of `attention`. Where queries are few and the cache is long, each
part of it has a program of its own, and a second kernel merges what they found in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.operator import OPERATORS
from liaoyuan.ops.triton.launch import (
    ELEMENTS,
    MAX_HEAD_DIM,
    UNBOUNDED,
    attention_tile,
    ceil_div,
    launch,
    power_of_two,
    roomy,
)
from liaoyuan.ops.triton.softmax import LOG2_E, NO_WINDOW, PART, absorb, add_sink, find_tile, merge, score

SPLIT_ELEMENTS = 2**24  # of sums that parts may leave for the second kernel: 64 MiB
COMBINED_ROWS = 16


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute the operator `paged_attention`."""
    inputs = (query, key_cache, value_cache, block_tables, query_starts, lengths)
    dims = query.shape[2], value_cache.shape[3]
    if max(dims) > MAX_HEAD_DIM:
        return OPERATORS["paged_attention"].reference(*inputs, scale, window, sinks)
    tokens, heads = query.shape[:2]
    out = query.new_zeros(tokens, heads, dims[1])
    capacity = block_tables.shape[1] * key_cache.shape[1]
    parts = ceil_div(capacity, PART.value)
    split = parts > 1 and out.numel() * parts <= SPLIT_ELEMENTS
    room = (parts, tokens, heads) if split else (0,)
    partial = [query.new_empty(*room, *last, dtype=torch.float32) for last in ((), (), dims[1:])]
    groups, tile = heads // key_cache.shape[2], roomy(attention_tile(max(dims), query.dtype), query)
    rows = max(tile.rows, power_of_two(groups))
    grid = (tokens // (rows // groups) + len(lengths) if tokens else 0, key_cache.shape[2], parts if split else 1)
    given = [x.contiguous() for x in inputs]
    sink_scores = query if sinks is None else sinks.contiguous()
    counts = (len(key_cache), block_tables.shape[1], len(lengths), len(lengths).bit_length())
    numbers = (*counts, scale * LOG2_E.value, window or UNBOUNDED, tokens, heads)
    sizes = {"VALUE_DIM": dims[1], "BLOCK_VALUE": power_of_two(dims[1], 16), "SINKS": sinks is not None}
    more = {"DIM": dims[0], "BLOCK_DIM": power_of_two(dims[0], 16), "GROUPS": groups, "PAGE": key_cache.shape[1]}
    options = {"ROWS": rows, "COLUMNS": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages}
    arguments = (*given, sink_scores, out, *partial, *numbers)
    launch(_forward, grid, query, *arguments, SPLIT=split, **sizes, **more, **options)
    if split:
        combined = (*partial, given[4], sink_scores, out, tokens * heads, heads, parts, len(lengths))
        launch(_combine, (ceil_div(tokens * heads, COMBINED_ROWS),), query, *combined, **sizes, ROWS=COMBINED_ROWS)
    return out


def write_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Compute the operator `write_cache`; a slot outside the cache is skipped, since a kernel cannot raise."""
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        OPERATORS["write_cache"].reference(key, value, key_cache, value_cache, slots)
        return
    for rows, cache in ((key, key_cache), (value, value_cache)):
        capacity, width = cache.shape[0] * cache.shape[1], rows[0].numel() if len(rows) else 0
        grid = (len(rows), ceil_div(width, ELEMENTS))
        launch(_write, grid, rows, rows.contiguous(), cache, slots.contiguous(), capacity, width, BLOCK=ELEMENTS)


@triton.jit(do_not_specialize=("capacity",))
def _write(rows, cache, slots, capacity, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(rows + row.to(tl.int64) * width + column, mask=column < width, other=0.0)
    limit = tl.where((slot >= 0) & (slot < capacity), width, 0)
    tl.store(cache + slot * width + column, found, mask=column < limit)


@triton.jit
def _load_pages(cache, slot, key_head, key_heads, valid, columns, WIDTH: tl.constexpr):
    at = cache + (slot * key_heads + key_head)[:, None] * WIDTH + columns[None, :]
    return tl.load(at, mask=valid[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit(do_not_specialize=("pages", "table_size", "sequences", "steps", "tokens"))
def _forward(
    query, key_cache, value_cache, tables, starts, lengths, sinks, out, maxima, sums, outputs,
    pages, table_size, sequences, steps, factor, window, tokens, heads,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    GROUPS: tl.constexpr, PAGE: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Row r of a tile is query r // GROUPS from its first one on, and query head r % GROUPS of the key head."""
    key_head = tl.program_id(1)
    sequence, first, _, end = find_tile(starts, sequences, steps, tl.program_id(0), ROWS // GROUPS)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    place, across = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    token = first + place // GROUPS
    valid = (token < end) & (place < ROWS // GROUPS * GROUPS)
    at_row = token.to(tl.int64) * heads + key_head * GROUPS + place % GROUPS
    total = tl.load(lengths + sequence)
    position = total - end + token
    inside = valid[:, None] & (dims < DIM)[None, :]
    q = tl.load(query + at_row[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
    low = tl.maximum(total - end + first - window + 1, 0) // COLUMNS * COLUMNS
    last = tl.where(first < end, total - end + tl.minimum(first + ROWS // GROUPS, end), low)
    # Up to `seen` every token sees every column, see `attention`.
    seen = tl.where(window < NO_WINDOW, low, (total - end + first + 1) // COLUMNS * COLUMNS)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    summed = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    begin, stop = low // PART * PART, last
    if SPLIT:
        begin = tl.maximum(begin, tl.program_id(2) * PART)
        stop = tl.minimum(last, tl.program_id(2) * PART + PART)
    for part in range(begin, stop, PART):
        part_maximum = tl.full([ROWS], float("-inf"), tl.float32)
        part_summed = tl.zeros([ROWS], tl.float32)
        part_output = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
        for at in range(tl.maximum(part, low), tl.minimum(part + PART, last), COLUMNS):
            column = at + across
            entry = tables + tl.cast(sequence, tl.int64) * table_size + column // PAGE
            page = tl.load(entry, mask=(column < last) & (column // PAGE < table_size), other=-1)
            there = (page >= 0) & (page < pages)  # a table that points outside the cache must not be followed
            slot = page.to(tl.int64) * PAGE + column % PAGE
            k = _load_pages(key_cache, slot, key_head, heads // GROUPS, there, dims, DIM)
            v = _load_pages(value_cache, slot, key_head, heads // GROUPS, there, value_dims, VALUE_DIM)
            scores = score(q, k, position, column, factor, window, at < seen)
            part_maximum, part_summed, part_output = absorb(scores, v, part_maximum, part_summed, part_output)
        maximum, summed, output = merge(maximum, summed, output, part_maximum, part_summed, part_output)
    inside = valid[:, None] & (value_dims < VALUE_DIM)[None, :]
    if SPLIT:
        at = tl.program_id(2).to(tl.int64) * tokens * heads + at_row
        tl.store(maxima + at, maximum, mask=valid)
        tl.store(sums + at, summed, mask=valid)
        found = (summed > 0.0)[:, None]  # the rest is not read
        tl.store(outputs + at[:, None] * VALUE_DIM + value_dims[None, :], output, mask=inside & found)
    else:
        if SINKS:
            sink = tl.load(sinks + key_head * GROUPS + place % GROUPS).to(tl.float32) * LOG2_E
            maximum, summed, output = add_sink(maximum, summed, output, sink)
        summed = tl.where(valid, summed, 1.0)
        at = out + at_row[:, None] * VALUE_DIM + value_dims[None, :]
        tl.store(at, (output / summed[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("rows", "parts", "sequences"))
def _combine(
    maxima, sums, outputs, starts, sinks, out, rows, heads, parts, sequences,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    value_dims = tl.arange(0, BLOCK_VALUE)
    valid = (row < rows) & (row < tl.load(starts + sequences).to(tl.int64) * heads)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    summed = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    inside = valid[:, None] & (value_dims < VALUE_DIM)[None, :]
    for part in range(parts):
        at = tl.cast(part, tl.int64) * rows + row
        more_maximum = tl.load(maxima + at, mask=valid, other=float("-inf"))
        more_summed = tl.load(sums + at, mask=valid, other=0.0)
        found = (more_summed > 0.0)[:, None]
        more = tl.load(outputs + at[:, None] * VALUE_DIM + value_dims[None, :], mask=inside & found, other=0.0)
        maximum, summed, output = merge(maximum, summed, output, more_maximum, more_summed, more)
    if SINKS:
        sink = tl.load(sinks + row % heads).to(tl.float32) * LOG2_E
        maximum, summed, output = add_sink(maximum, summed, output, sink)
    summed = tl.where(valid, summed, 1.0)
    at = out + row[:, None] * VALUE_DIM + value_dims[None, :]
    tl.store(at, (output / summed[:, None]).to(out.dtype.element_ty), mask=inside)
