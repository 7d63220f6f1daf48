"""Log-probabilities of given tokens: a program holds a tile of logits at a time, with a running maximum and sum.

The vocabulary is dealt out in parts of a fixed size, so that a row's bits depend on it alone. The backward pass
computes the logits again, a slice of the vocabulary at a time (Wijmans et al. 2024, arXiv 2411.09009), and leaves the
products with their gradients to the vendor's library.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.triton.launch import ceil_div, launch, logits_tile

TILES_PER_PART = 16  # of the vocabulary: many parts keep all processors busy where rows are few
SLICE = 2**25  # elements of the gradients of logits that are held at a time: 64 MiB in bf16
COMBINED_ROWS = 128


def token_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the operator `token_log_prob`."""
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    tile = logits_tile(hidden.dtype)
    parts = ceil_div(vocabulary, tile.columns * TILES_PER_PART)
    kept = hidden.new_empty(rows if keep else 0, vocabulary)
    partial_sums, partial_chosen = (hidden.new_empty(parts, rows, dtype=torch.float32) for _ in range(2))
    result, log_sum_exp = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    arguments = (hidden, weight, targets, kept, partial_sums, partial_chosen, rows, width, vocabulary)
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    grid = (ceil_div(rows, tile.rows), parts)
    launch(_forward, grid, hidden, *arguments, KEEP=keep, TILES=TILES_PER_PART, **sizes, **options)
    combined = (partial_sums, partial_chosen, result, log_sum_exp, rows, parts)
    launch(_combine, (ceil_div(rows, COMBINED_ROWS),), hidden, *combined, ROWS=COMBINED_ROWS)
    return result, log_sum_exp, kept


def token_log_prob_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, log_sum_exp: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the backward side of `token_log_prob`."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    tile = logits_tile(hidden.dtype)
    step = max(tile.columns, SLICE // max(rows, 1) // tile.columns * tile.columns)
    grad_hidden = hidden.new_zeros(rows, width, dtype=torch.float32)
    grad_weight = weight.new_zeros(weight.shape)
    if rows == 0:
        return grad_hidden.to(hidden.dtype), grad_weight
    upper, targets, log_sum_exp = grad.float().contiguous(), targets.contiguous(), log_sum_exp.contiguous()
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    for first in range(0, vocabulary, step):
        part = weight[first : first + step]
        grad_logits = hidden.new_empty(rows, len(part))
        grid = (ceil_div(rows, tile.rows), ceil_div(len(part), tile.columns))
        arguments = (upper, hidden, part, targets, log_sum_exp, kept, grad_logits)
        numbers = (first, rows, width, len(part), vocabulary)
        launch(_logit_gradients, grid, hidden, *arguments, *numbers, KEPT=len(kept) > 0, **sizes, **options)
        grad_hidden += grad_logits @ part
        torch.mm(grad_logits.t(), hidden, out=grad_weight[first : first + step])
    return grad_hidden.to(hidden.dtype), grad_weight


@triton.jit
def _logits(hidden, weight, row, column, rows, width, columns, DEPTH: tl.constexpr):
    """Return hidden @ weight^T for these rows and columns, in fp32."""
    inner = tl.arange(0, DEPTH)
    left = hidden + row.to(tl.int64)[:, None] * width + inner[None, :]
    right = weight + column.to(tl.int64)[None, :] * width + inner[:, None]
    summed = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for at in range(0, width, DEPTH):
        x = tl.load(left + at, mask=(row < rows)[:, None] & (inner < width - at)[None, :], other=0.0)
        w = tl.load(right + at, mask=(column < columns)[None, :] & (inner < width - at)[:, None], other=0.0)
        summed += tl.dot(x, w, input_precision="ieee")
    return summed


@triton.jit(do_not_specialize=("rows",))
def _forward(
    hidden, weight, targets, kept, partial_sums, partial_chosen, rows, width, vocabulary,
    KEEP: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write the log of the sum of exponentials over a part of the vocabulary, and the target's logit if it is there."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets + row, mask=row < rows, other=-1)
    begin = tl.program_id(1) * (TILES * COLUMNS)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    summed = tl.zeros([ROWS], tl.float32)
    chosen = tl.full([ROWS], float("-inf"), tl.float32)
    for first in range(begin, tl.minimum(begin + TILES * COLUMNS, vocabulary), COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        logits = _logits(hidden, weight, row, column, rows, width, vocabulary, DEPTH)
        if KEEP:
            inside = (row < rows)[:, None] & (column < vocabulary)[None, :]
            at = row.to(tl.int64)[:, None] * vocabulary + column[None, :]
            tl.store(kept + at, logits.to(kept.dtype.element_ty), mask=inside)
        logits = tl.where((column < vocabulary)[None, :], logits, float("-inf"))
        chosen = tl.maximum(chosen, tl.max(tl.where(column[None, :] == target[:, None], logits, float("-inf")), 1))
        higher = tl.maximum(maximum, tl.max(logits, 1))
        summed = summed * tl.exp(maximum - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        maximum = higher
    out = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(partial_sums + out, maximum + tl.log(summed), mask=row < rows)
    tl.store(partial_chosen + out, chosen, mask=row < rows)


@triton.jit(do_not_specialize=("rows",))
def _combine(partial_sums, partial_chosen, result, log_sum_exp, rows, parts, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    maximum = tl.load(partial_sums + row, mask=inside, other=0.0)
    chosen = tl.load(partial_chosen + row, mask=inside, other=0.0)
    summed = tl.full([ROWS], 1.0, tl.float32)
    for part in range(1, parts):
        at = tl.cast(part, tl.int64) * rows + row
        more = tl.load(partial_sums + at, mask=inside, other=0.0)
        higher = tl.maximum(maximum, more)
        summed = summed * tl.exp(maximum - higher) + tl.exp(more - higher)
        maximum = higher
        chosen = tl.maximum(chosen, tl.load(partial_chosen + at, mask=inside, other=0.0))
    total = maximum + tl.log(summed)
    tl.store(result + row, chosen - total, mask=inside)
    tl.store(log_sum_exp + row, total, mask=inside)


@triton.jit(do_not_specialize=("rows", "first"))
def _logit_gradients(
    upper, hidden, weight, targets, log_sum_exp, kept, grad_logits, first, rows, width, columns, vocabulary,
    KEPT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a tile of logits: the upper gradient times (1 at the target, else 0, less softmax)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if KEPT:
        at = row.to(tl.int64)[:, None] * vocabulary + first + column[None, :]
        logits = tl.load(kept + at, mask=inside, other=0.0).to(tl.float32)
    else:
        logits = _logits(hidden, weight, row, column, rows, width, columns, DEPTH)
    target = tl.load(targets + row, mask=row < rows, other=-1)
    factor = tl.load(upper + row, mask=row < rows, other=0.0)
    total = tl.load(log_sum_exp + row, mask=row < rows, other=0.0)
    softmax = tl.exp(logits - total[:, None])
    is_target = (first + column)[None, :] == target[:, None]
    gradient = factor[:, None] * (tl.where(is_target, 1.0, 0.0) - softmax)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(grad_logits + at, gradient.to(grad_logits.dtype.element_ty), mask=inside)
