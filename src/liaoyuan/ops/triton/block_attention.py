"""Attention of a block of queries over ranges of a block of keys: a program takes some queries of one head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.operator import OPERATORS
from liaoyuan.ops.triton.launch import (
    MAX_HEAD_DIM,
    attention_backward_tile,
    attention_tile,
    ceil_div,
    launch,
    power_of_two,
)
from liaoyuan.ops.triton.softmax import LOG2_E, LOG_2, absorb, load_rows


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute the operator `block_attention`."""
    dim = max(query.shape[2], value.shape[2])
    if dim > MAX_HEAD_DIM:
        return OPERATORS["block_attention"].reference(query, key, value, first, last, scale)
    given = [x.contiguous() for x in (query, key, value, first, last)]
    out = query.new_empty(*query.shape[:2], value.shape[2], dtype=torch.float32)
    log_sum_exp = query.new_empty(query.shape[:2], dtype=torch.float32)
    tile = attention_tile(dim, query.dtype)
    numbers = (scale * LOG2_E.value, *_numbers(query, key))
    grid = (ceil_div(len(query), tile.rows), query.shape[1])
    launch(_forward, grid, query, *given, out, log_sum_exp, *numbers, **_sizes(query, value), **tile.options())
    return out, log_sum_exp


def block_attention_backward(
    grad: Tensor,
    delta: Tensor,
    log_sum_exp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """Compute the backward side of `block_attention`."""
    dim = max(query.shape[2], value.shape[2])
    if dim > MAX_HEAD_DIM:
        gradient = OPERATORS["block_attention"].gradient
        assert gradient is not None
        return gradient.reference(grad, delta, log_sum_exp, query, key, value, first, last, scale)
    grad = grad.to(query.dtype)  # as products take it; it is read once for each tile of keys
    given = [x.contiguous() for x in (grad, delta, log_sum_exp, query, key, value, first, last)]
    grads = [x.new_empty(x.shape, dtype=torch.float32) for x in (query, key, value)]
    tile = attention_backward_tile(dim, query)
    numbers, sizes = (scale, scale * LOG2_E.value, *_numbers(query, key)), _sizes(query, value)
    grid = (ceil_div(len(query), tile.rows), query.shape[1])
    launch(_query_gradients, grid, query, *given, grads[0], *numbers, **sizes, **tile.options())
    grid = (ceil_div(len(key), tile.columns), key.shape[1])
    launch(_key_gradients, grid, query, *given, *grads[1:], *numbers, **sizes, **tile.options())
    return tuple(grads)


def _numbers(query: Tensor, key: Tensor) -> tuple[int, ...]:
    return len(query), len(key), query.shape[1], key.shape[1]


def _sizes(query: Tensor, value: Tensor) -> dict[str, int]:
    dim, value_dim = query.shape[2], value.shape[2]
    blocks = {"BLOCK_DIM": power_of_two(dim, 16), "BLOCK_VALUE": power_of_two(value_dim, 16)}
    return {"DIM": dim, "VALUE_DIM": value_dim, **blocks}


@triton.jit
def _range(first, last, row, place, valid):
    """Return the ranges of some rows, and the least range that has them all."""
    begin = tl.load(first + row + place, mask=valid, other=0).to(tl.int32)
    end = tl.load(last + row + place, mask=valid, other=0).to(tl.int32)
    some = begin < end
    return begin, end, tl.min(tl.where(some, begin, 2147483647), 0), tl.max(tl.where(some, end, 0), 0)


@triton.jit
def _score(query, key, begin, end, column, factor):
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
    seen = (column[None, :] >= begin[:, None]) & (column[None, :] < end[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _total(log_sum_exp, at, valid):
    """Return the denominators' logarithms to base 2; infinite where a row sees nothing, so that no weight is left."""
    total = tl.load(log_sum_exp + at, mask=valid, other=float("-inf")) * LOG2_E
    return tl.where(total == float("-inf"), float("inf"), total)


@triton.jit(do_not_specialize=("queries", "keys"))
def _forward(
    query, key, value, first, last, out, log_sum_exp, factor, queries, keys, heads, key_heads,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) * ROWS, tl.program_id(1)
    key_head = head // (heads // key_heads)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    place, across = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    valid = row + place < queries
    begin, end, low, high = _range(first, last, row, place, valid)
    q = load_rows(query + head * DIM, row, heads * DIM, place, valid, dims, DIM)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    summed = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    for at in range(low // COLUMNS * COLUMNS, tl.minimum(high, keys), COLUMNS):
        inside = at + across < keys
        k = load_rows(key + key_head * DIM, at, key_heads * DIM, across, inside, dims, DIM)
        v = load_rows(value + key_head * VALUE_DIM, at, key_heads * VALUE_DIM, across, inside, value_dims, VALUE_DIM)
        maximum, summed, output = absorb(_score(q, k, begin, end, at + across, factor), v, maximum, summed, output)
    some = summed > 0.0
    at = (tl.cast(row, tl.int64) + place) * heads + head
    inside = valid[:, None] & (value_dims < VALUE_DIM)[None, :]
    result = output / tl.where(some, summed, 1.0)[:, None]
    tl.store(out + at[:, None] * VALUE_DIM + value_dims[None, :], result, mask=inside)
    total = tl.where(some, (maximum + tl.log2(tl.where(some, summed, 1.0))) * LOG_2, float("-inf"))
    tl.store(log_sum_exp + at, total, mask=valid)


@triton.jit(do_not_specialize=("queries", "keys"))
def _query_gradients(
    grad, delta, log_sum_exp, query, key, value, first, last, grad_query,
    scale, factor, queries, keys, heads, key_heads,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) * ROWS, tl.program_id(1)
    key_head = head // (heads // key_heads)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    place, across = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    valid = row + place < queries
    begin, end, low, high = _range(first, last, row, place, valid)
    q = load_rows(query + head * DIM, row, heads * DIM, place, valid, dims, DIM)
    g = load_rows(grad + head * VALUE_DIM, row, heads * VALUE_DIM, place, valid, value_dims, VALUE_DIM)
    at_row = (tl.cast(row, tl.int64) + place) * heads + head
    total = _total(log_sum_exp, at_row, valid)
    own = tl.load(delta + at_row, mask=valid, other=0.0)
    summed = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for at in range(low // COLUMNS * COLUMNS, tl.minimum(high, keys), COLUMNS):
        inside = at + across < keys
        k = load_rows(key + key_head * DIM, at, key_heads * DIM, across, inside, dims, DIM)
        v = load_rows(value + key_head * VALUE_DIM, at, key_heads * VALUE_DIM, across, inside, value_dims, VALUE_DIM)
        weight = tl.exp2(_score(q, k, begin, end, at + across, factor) - total[:, None])
        grad_weight = tl.dot(g, tl.trans(v), input_precision="ieee")
        grad_score = weight * (grad_weight - own[:, None])
        summed += tl.dot(grad_score.to(k.dtype), k, input_precision="ieee")
    mask = valid[:, None] & (dims < DIM)[None, :]
    tl.store(grad_query + at_row[:, None] * DIM + dims[None, :], summed * scale, mask=mask)


@triton.jit(do_not_specialize=("queries", "keys"))
def _key_gradients(
    grad, delta, log_sum_exp, query, key, value, first, last, grad_key, grad_value,
    scale, factor, queries, keys, heads, key_heads,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column, key_head = tl.program_id(0) * COLUMNS, tl.program_id(1)
    groups = heads // key_heads
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    place, across = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = column + across < keys
    k = load_rows(key + key_head * DIM, column, key_heads * DIM, across, inside, dims, DIM)
    v = load_rows(value + key_head * VALUE_DIM, column, key_heads * VALUE_DIM, across, inside, value_dims, VALUE_DIM)
    key_sum = tl.zeros([COLUMNS, BLOCK_DIM], tl.float32)
    value_sum = tl.zeros([COLUMNS, BLOCK_VALUE], tl.float32)
    for head in range(key_head * groups, key_head * groups + groups):
        for row in range(0, queries, ROWS):
            valid = row + place < queries
            begin, end, low, high = _range(first, last, row, place, valid)
            if (low < column + COLUMNS) & (high > column):
                q = load_rows(query + head * DIM, row, heads * DIM, place, valid, dims, DIM)
                g = load_rows(grad + head * VALUE_DIM, row, heads * VALUE_DIM, place, valid, value_dims, VALUE_DIM)
                at_row = (tl.cast(row, tl.int64) + place) * heads + head
                total = _total(log_sum_exp, at_row, valid)
                own = tl.load(delta + at_row, mask=valid, other=0.0)
                weight = tl.exp2(_score(q, k, begin, end, column + across, factor) - total[:, None])
                value_sum += tl.dot(tl.trans(weight).to(g.dtype), g, input_precision="ieee")
                grad_weight = tl.dot(g, tl.trans(v), input_precision="ieee")
                grad_score = weight * (grad_weight - own[:, None])
                key_sum += tl.dot(tl.trans(grad_score).to(q.dtype), q, input_precision="ieee")
    at = ((tl.cast(column, tl.int64) + across) * key_heads + key_head)[:, None]
    mask = inside[:, None] & (dims < DIM)[None, :]
    tl.store(grad_key + at * DIM + dims[None, :], key_sum * scale, mask=mask)
    mask = inside[:, None] & (value_dims < VALUE_DIM)[None, :]
    tl.store(grad_value + at * VALUE_DIM + value_dims[None, :], value_sum, mask=mask)
