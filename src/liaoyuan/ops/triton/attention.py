"""Causal attention over packed documents: a program takes some tokens of one document and one head.

Tiles begin where documents do, so a document's bits do not depend on where it lies. In the backward pass one kernel
sums over keys (the queries' gradient) and one over queries (that of keys and values), so no sum has two programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.operator import OPERATORS
from liaoyuan.ops.triton.launch import (
    MAX_HEAD_DIM,
    UNBOUNDED,
    attention_backward_tile,
    attention_tile,
    ceil_div,
    launch,
    power_of_two,
    roomy,
)
from liaoyuan.ops.triton.softmax import (
    LOG2_E,
    LOG_2,
    NO_WINDOW,
    PART,
    absorb,
    add_sink,
    find_tile,
    load_rows,
    merge,
    score,
)

DELTA_ROWS = 32


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the operator `attention`."""
    if max(query.shape[2], value.shape[2]) > MAX_HEAD_DIM:
        return OPERATORS["attention"].reference(query, key, value, boundaries, scale, window, sinks)
    tokens, heads, dim = query.shape
    query, key, value, boundaries = (x.contiguous() for x in (query, key, value, boundaries))
    out = query.new_empty(tokens, heads, value.shape[2])
    log_sum_exp = query.new_empty(heads, tokens, dtype=torch.float32)
    tile = roomy(attention_tile(max(dim, value.shape[2]), query.dtype), query)
    arguments = (query, key, value, boundaries, boundaries if sinks is None else sinks.contiguous(), out, log_sum_exp)
    sizes = {"SINKS": sinks is not None, **_sizes(query, value), **tile.options()}
    numbers = _numbers(query, key, boundaries, scale, window)
    launch(_forward, (_tiles(query, boundaries, tile.rows), heads), query, *arguments, *numbers, **sizes)
    return out, log_sum_exp


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
) -> tuple[Tensor, ...]:
    """Compute the backward side of `attention`."""
    if max(query.shape[2], value.shape[2]) > MAX_HEAD_DIM:
        gradient = OPERATORS["attention"].gradient
        assert gradient is not None
        return gradient.reference(grad, query, key, value, boundaries, scale, window, sinks, out, log_sum_exp)
    grad, query, key, value, boundaries = (x.contiguous() for x in (grad, query, key, value, boundaries))
    delta = _delta(grad, out.contiguous())
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    tile = attention_backward_tile(max(query.shape[2], value.shape[2]), query)
    inputs = (grad, query, key, value, boundaries, log_sum_exp, delta)
    numbers = _numbers(query, key, boundaries, scale, window)
    sizes = _sizes(query, value)
    grid = (_tiles(query, boundaries, tile.rows), query.shape[1])
    launch(_query_gradients, grid, query, *inputs, grad_query, scale, *numbers, **sizes, **tile.options())
    grid = (_tiles(query, boundaries, tile.columns), key.shape[1])
    launch(_key_gradients, grid, query, *inputs, grad_key, grad_value, scale, *numbers, **sizes, **tile.options())
    return grad_query, grad_key, grad_value, _sink_gradients(sinks, log_sum_exp, delta)


def _sink_gradients(sinks: Tensor | None, log_sum_exp: Tensor, delta: Tensor) -> Tensor:
    """Return minus the sum over tokens of the sink's weight times delta; a sink has no value of its own."""
    if sinks is None:
        return delta.new_empty(0)
    weight = (sinks.float()[:, None] - log_sum_exp).exp()
    return -(weight * delta.t()).sum(1).to(sinks.dtype)


def _numbers(query: Tensor, key: Tensor, boundaries: Tensor, scale: float, window: int | None) -> tuple[float, ...]:
    tokens, documents = query.shape[0], len(boundaries) - 1
    heads = query.shape[1], key.shape[1]
    return tokens, documents, documents.bit_length(), scale * LOG2_E.value, window or UNBOUNDED, *heads


def _sizes(query: Tensor, value: Tensor) -> dict[str, int]:
    dim, value_dim = query.shape[2], value.shape[2]
    blocks = {"BLOCK_DIM": power_of_two(dim, 16), "BLOCK_VALUE": power_of_two(value_dim, 16)}
    return {"DIM": dim, "VALUE_DIM": value_dim, **blocks}


def _tiles(query: Tensor, boundaries: Tensor, size: int) -> int:
    """Return how many tiles `find_tile` may be asked for: those of all documents, and at most one too many for each."""
    return query.shape[0] // size + len(boundaries) - 1 if query.shape[0] else 0


def _delta(grad: Tensor, out: Tensor) -> Tensor:
    """Return rowsum(grad * out), fp32 [N, Hq]."""
    delta = grad.new_empty(grad.shape[:2], dtype=torch.float32)
    width = grad.shape[2]
    grid = (ceil_div(delta.numel(), DELTA_ROWS),)
    block = power_of_two(width)
    launch(_row_products, grid, grad, grad, out, delta, delta.numel(), WIDTH=width, BLOCK=block, ROWS=DELTA_ROWS)
    return delta


@triton.jit(do_not_specialize=("rows",))
def _row_products(one, two, result, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    place, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    valid = row + place < rows
    x = load_rows(one, row, WIDTH, place, valid, columns, WIDTH).to(tl.float32)
    y = load_rows(two, row, WIDTH, place, valid, columns, WIDTH).to(tl.float32)
    tl.store(result + row + place, tl.sum(x * y, 1), mask=valid)


@triton.jit(do_not_specialize=("tokens", "documents", "steps"))
def _forward(
    query, key, value, boundaries, sinks, out, log_sum_exp,
    tokens, documents, steps, factor, window, heads, key_heads, SINKS: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    key_head = head // (heads // key_heads)
    _, first, start, end = find_tile(boundaries, documents, steps, tl.program_id(0), ROWS)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    place, across = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    valid = first + place < end
    row = first - start + place  # positions in the document, as are `low`, `last` and `at`
    q = load_rows(query + head * DIM, first, heads * DIM, place, valid, dims, DIM)
    low = tl.maximum(first - start - window + 1, 0) // COLUMNS * COLUMNS
    last = tl.where(first < end, tl.minimum(first + ROWS, end) - start, low)
    # Up to `seen` every token sees every column; a window leaves few such tiles.
    seen = tl.where(window < NO_WINDOW, low, (first - start + 1) // COLUMNS * COLUMNS)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    summed = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    for part in range(low // PART * PART, last, PART):
        part_maximum = tl.full([ROWS], float("-inf"), tl.float32)
        part_summed = tl.zeros([ROWS], tl.float32)
        part_output = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
        for at in range(tl.maximum(part, low), tl.minimum(part + PART, last), COLUMNS):
            inside = start + at + across < end
            k = load_rows(key + key_head * DIM, start + at, key_heads * DIM, across, inside, dims, DIM)
            v = load_rows(
                value + key_head * VALUE_DIM, start + at, key_heads * VALUE_DIM, across, inside, value_dims, VALUE_DIM
            )
            scores = score(q, k, row, at + across, factor, window, at < seen)
            part_maximum, part_summed, part_output = absorb(scores, v, part_maximum, part_summed, part_output)
        maximum, summed, output = merge(maximum, summed, output, part_maximum, part_summed, part_output)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        maximum, summed, output = add_sink(maximum, summed, output, sink)
    summed = tl.where(valid, summed, 1.0)
    token = tl.cast(first, tl.int64) + place
    at = out + (token * heads + head)[:, None] * VALUE_DIM + value_dims[None, :]
    mask = valid[:, None] & (value_dims < VALUE_DIM)[None, :]
    tl.store(at, (output / summed[:, None]).to(out.dtype.element_ty), mask=mask)
    total = (maximum + tl.log2(summed)) * LOG_2
    tl.store(log_sum_exp + head * tl.cast(tokens, tl.int64) + token, total, mask=valid)


@triton.jit(do_not_specialize=("tokens", "documents", "steps"))
def _query_gradients(
    grad, query, key, value, boundaries, log_sum_exp, delta, grad_query, scale,
    tokens, documents, steps, factor, window, heads, key_heads,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    key_head = head // (heads // key_heads)
    _, first, start, end = find_tile(boundaries, documents, steps, tl.program_id(0), ROWS)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    place, across = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    valid = first + place < end
    row = first - start + place
    token = tl.cast(first, tl.int64) + place
    q = load_rows(query + head * DIM, first, heads * DIM, place, valid, dims, DIM)
    g = load_rows(grad + head * VALUE_DIM, first, heads * VALUE_DIM, place, valid, value_dims, VALUE_DIM)
    total = tl.load(log_sum_exp + head * tl.cast(tokens, tl.int64) + token, mask=valid, other=0.0) * LOG2_E
    own = tl.load(delta + token * heads + head, mask=valid, other=0.0)
    summed = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    low = tl.maximum(first - start - window + 1, 0) // COLUMNS * COLUMNS
    last = tl.where(first < end, tl.minimum(first + ROWS, end) - start, low)
    seen = tl.where(window < NO_WINDOW, low, (first - start + 1) // COLUMNS * COLUMNS)
    for at in range(low, last, COLUMNS):
        inside = start + at + across < end
        k = load_rows(key + key_head * DIM, start + at, key_heads * DIM, across, inside, dims, DIM)
        v = load_rows(
            value + key_head * VALUE_DIM, start + at, key_heads * VALUE_DIM, across, inside, value_dims, VALUE_DIM
        )
        weight = tl.exp2(score(q, k, row, at + across, factor, window, at < seen) - total[:, None])
        grad_weight = tl.dot(g, tl.trans(v), input_precision="ieee")
        grad_score = weight * (grad_weight - own[:, None])
        summed += tl.dot(grad_score.to(k.dtype), k, input_precision="ieee")
    at = grad_query + (token * heads + head)[:, None] * DIM + dims[None, :]
    mask = valid[:, None] & (dims < DIM)[None, :]
    tl.store(at, (summed * scale).to(grad_query.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("tokens", "documents", "steps"))
def _key_gradients(
    grad, query, key, value, boundaries, log_sum_exp, delta, grad_key, grad_value, scale,
    tokens, documents, steps, factor, window, heads, key_heads,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    key_head = tl.program_id(1)
    groups = heads // key_heads
    _, first, start, end = find_tile(boundaries, documents, steps, tl.program_id(0), COLUMNS)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    place, across = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    valid = first + across < end
    column = first - start + across
    k = load_rows(key + key_head * DIM, first, key_heads * DIM, across, valid, dims, DIM)
    v = load_rows(value + key_head * VALUE_DIM, first, key_heads * VALUE_DIM, across, valid, value_dims, VALUE_DIM)
    key_sum = tl.zeros([COLUMNS, BLOCK_DIM], tl.float32)
    value_sum = tl.zeros([COLUMNS, BLOCK_VALUE], tl.float32)
    low = (first - start) // ROWS * ROWS
    last = tl.where(first < end, tl.minimum(first - start + COLUMNS - 1 + window, end - start), low)
    # from `seen` on every token sees every column
    seen = tl.where(window < NO_WINDOW, last, (first - start + COLUMNS + ROWS - 2) // ROWS * ROWS)
    for head in range(key_head * groups, key_head * groups + groups):
        for at in range(low, last, ROWS):
            inside = start + at + place < end
            token = tl.cast(start + at, tl.int64) + place
            q = load_rows(query + head * DIM, start + at, heads * DIM, place, inside, dims, DIM)
            g = load_rows(grad + head * VALUE_DIM, start + at, heads * VALUE_DIM, place, inside, value_dims, VALUE_DIM)
            in_head = log_sum_exp + head * tl.cast(tokens, tl.int64)
            # rows that do not exist have no gradient: their weight is exp(-inf)
            total = tl.load(in_head + token, mask=inside, other=float("inf")) * LOG2_E
            own = tl.load(delta + token * heads + head, mask=inside, other=0.0)
            weight = tl.exp2(score(q, k, at + place, column, factor, window, at >= seen) - total[:, None])
            value_sum += tl.dot(tl.trans(weight).to(g.dtype), g, input_precision="ieee")
            grad_weight = tl.dot(g, tl.trans(v), input_precision="ieee")
            grad_score = weight * (grad_weight - own[:, None])
            key_sum += tl.dot(tl.trans(grad_score).to(q.dtype), q, input_precision="ieee")
    token = tl.cast(first, tl.int64) + across
    at = (token * key_heads + key_head)[:, None]
    mask = valid[:, None] & (dims < DIM)[None, :]
    tl.store(grad_key + at * DIM + dims[None, :], (key_sum * scale).to(grad_key.dtype.element_ty), mask=mask)
    mask = valid[:, None] & (value_dims < VALUE_DIM)[None, :]
    tl.store(grad_value + at * VALUE_DIM + value_dims[None, :], value_sum.to(grad_value.dtype.element_ty), mask=mask)
