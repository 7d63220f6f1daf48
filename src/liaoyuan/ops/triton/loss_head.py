"""The loss head: a program holds a tile of logits at a time, with a running maximum and sums.

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


def loss_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: int, vocabulary: int, moments: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the operator `loss_head`."""
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    (rows, width), columns = hidden.shape, weight.shape[0]
    tile = logits_tile(hidden.dtype)
    parts = ceil_div(columns, tile.columns * TILES_PER_PART)
    kept = hidden.new_empty(rows if keep else 0, columns)
    partial = hidden.new_empty(4, parts, rows, dtype=torch.float32)
    chosen, log_sum_exp = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    entropy, mean = (hidden.new_empty(rows if moments else 0, dtype=torch.float32) for _ in range(2))
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "MOMENTS": moments}
    grid = (ceil_div(rows, tile.rows), parts)
    arguments = (hidden, weight, targets, kept, partial, first, rows, width, columns)
    launch(_forward, grid, hidden, *arguments, KEEP=keep, TILES=TILES_PER_PART, **sizes, **options)
    combined = (partial, targets, chosen, log_sum_exp, entropy, mean, rows, parts, vocabulary)
    launch(_combine, (ceil_div(rows, COMBINED_ROWS),), hidden, *combined, MOMENTS=moments, ROWS=COMBINED_ROWS)
    return chosen, log_sum_exp, entropy, mean, kept


def loss_head_backward(
    grad_chosen: Tensor | None,
    grad_log_sum_exp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_mean: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor,
    kept: Tensor,
    first: int,
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """Compute the backward side of `loss_head`."""
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    (rows, width), columns = hidden.shape, weight.shape[0]
    tile = logits_tile(hidden.dtype)
    step = max(tile.columns, SLICE // max(rows, 1) // tile.columns * tile.columns)
    grad_hidden = hidden.new_zeros(rows, width, dtype=torch.float32)
    grad_weight = weight.new_zeros(weight.shape)
    if rows == 0:
        return grad_hidden.to(hidden.dtype), grad_weight
    factors = _factors(grad_chosen, grad_log_sum_exp, grad_entropy, grad_mean, log_sum_exp, entropy, vocabulary)
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "KEPT": len(kept) > 0}
    for begin in range(0, columns, step):
        part = weight[begin : begin + step]
        grad_logits = hidden.new_empty(rows, len(part))
        grid = (ceil_div(rows, tile.rows), ceil_div(len(part), tile.columns))
        arguments = (factors, hidden, part, targets, kept, grad_logits)
        numbers = (first, begin, rows, width, len(part), columns)
        launch(_logit_gradients, grid, hidden, *arguments, *numbers, **sizes, **options)
        grad_hidden += grad_logits @ part
        torch.mm(grad_logits.t(), hidden, out=grad_weight[begin : begin + step])
    return grad_hidden.to(hidden.dtype), grad_weight


def _factors(
    grad_chosen: Tensor | None,
    grad_log_sum_exp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_mean: Tensor | None,
    log_sum_exp: Tensor,
    entropy: Tensor,
    vocabulary: int,
) -> Tensor:
    """Return [5, N]: the log-sum-exp L, and a, b, c, d of each row's gradients of logits z.

    They are softmax * (a + (z - L) * b) + c, and d more at the target.
    """
    zero = torch.zeros_like(log_sum_exp)
    chosen, total, spread, mean = (
        zero if grad is None else grad.float() for grad in (grad_chosen, grad_log_sum_exp, grad_entropy, grad_mean)
    )
    level = total if grad_entropy is None else total - spread * entropy
    return torch.stack((log_sum_exp, level, -spread, mean / vocabulary, chosen))


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


@triton.jit(do_not_specialize=("first", "rows"))
def _forward(
    hidden, weight, targets, kept, partial, first, rows, width, columns,
    KEEP: tl.constexpr, MOMENTS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Write of a part of the vocabulary the log-sum-exp, the target's logit or 0, the entropy and the logits' sum."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets + row, mask=row < rows, other=-1) - first
    begin = tl.program_id(1) * (TILES * COLUMNS)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    summed = tl.zeros([ROWS], tl.float32)
    chosen = tl.zeros([ROWS], tl.float32)
    products = tl.zeros([ROWS], tl.float32)  # of exponentials with the logits less the maximum
    total = tl.zeros([ROWS], tl.float32)
    for at in range(begin, tl.minimum(begin + TILES * COLUMNS, columns), COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        here = (column < columns)[None, :]
        logits = _logits(hidden, weight, row, column, rows, width, columns, DEPTH)
        logits = logits.to(kept.dtype.element_ty).to(tl.float32)  # as whoever samples from logits meets them
        if KEEP:
            place = row.to(tl.int64)[:, None] * columns + column[None, :]
            tl.store(kept + place, logits.to(kept.dtype.element_ty), mask=(row < rows)[:, None] & here)
        chosen += tl.sum(tl.where((column[None, :] == target[:, None]) & here, logits, 0.0), 1)
        higher = tl.maximum(maximum, tl.max(tl.where(here, logits, float("-inf")), 1))
        below = tl.where(here, logits - higher[:, None], 0.0)
        power = tl.where(here, tl.exp(below), 0.0)
        shrink = tl.exp(maximum - higher)
        if MOMENTS:
            shift = tl.where(maximum == float("-inf"), 0.0, maximum - higher)
            products = (products + summed * shift) * shrink + tl.sum(power * below, 1)
            total += tl.sum(tl.where(here, logits, 0.0), 1)
        summed = summed * shrink + tl.sum(power, 1)
        maximum = higher
    parts = tl.num_programs(1).to(tl.int64)
    out = partial + tl.program_id(1).to(tl.int64) * rows + row
    tl.store(out, maximum + tl.log(summed), mask=row < rows)
    tl.store(out + parts * rows, chosen, mask=row < rows)
    if MOMENTS:
        tl.store(out + 2 * parts * rows, tl.log(summed) - products / summed, mask=row < rows)
        tl.store(out + 3 * parts * rows, total, mask=row < rows)


@triton.jit(do_not_specialize=("rows",))
def _combine(
    partial, targets, chosen, log_sum_exp, entropy, mean, rows, parts, vocabulary,
    MOMENTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write what the parts give together: their softmaxes are weighted with exp(log-sum-exp)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    plane = tl.cast(parts, tl.int64) * rows
    maximum = tl.load(partial + row, mask=inside, other=0.0)
    found = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS], tl.float32)
    spread = tl.zeros([ROWS], tl.float32)  # of weights with the parts' entropies less their log-sum-exp
    total = tl.zeros([ROWS], tl.float32)
    for part in range(parts):
        at = partial + tl.cast(part, tl.int64) * rows + row
        height = tl.load(at, mask=inside, other=0.0)
        found += tl.load(at + plane, mask=inside, other=0.0)
        higher = tl.maximum(maximum, height)
        shrink, mass = tl.exp(maximum - higher), tl.exp(height - higher)
        if MOMENTS:
            own = tl.load(at + 2 * plane, mask=inside, other=0.0)
            spread = (spread + summed * (higher - maximum)) * shrink + mass * (own - (height - higher))
            total += tl.load(at + 3 * plane, mask=inside, other=0.0)
        summed = summed * shrink + mass
        maximum = higher
    target = tl.load(targets + row, mask=inside, other=0)
    known = (target >= 0) & (target < vocabulary)
    tl.store(chosen + row, tl.where(known, found, float("-inf")), mask=inside)
    tl.store(log_sum_exp + row, maximum + tl.log(summed), mask=inside)
    if MOMENTS:
        tl.store(entropy + row, spread / summed + tl.log(summed), mask=inside)
        tl.store(mean + row, total / vocabulary, mask=inside)


@triton.jit(do_not_specialize=("first", "begin", "rows"))
def _logit_gradients(
    factors, hidden, weight, targets, kept, grad_logits, first, begin, rows, width, columns, kept_columns,
    KEPT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a tile of logits, whose first column is `begin` of those that are kept."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if KEPT:
        at = row.to(tl.int64)[:, None] * kept_columns + begin + column[None, :]
        logits = tl.load(kept + at, mask=inside, other=0.0).to(tl.float32)
    else:
        logits = _logits(hidden, weight, row, column, rows, width, columns, DEPTH)
        logits = logits.to(kept.dtype.element_ty).to(tl.float32)
    target = tl.load(targets + row, mask=row < rows, other=-1)
    log_sum_exp = tl.load(factors + row, mask=row < rows, other=0.0)
    level = tl.load(factors + rows + row, mask=row < rows, other=0.0)
    slope = tl.load(factors + 2 * rows + row, mask=row < rows, other=0.0)
    every = tl.load(factors + 3 * rows + row, mask=row < rows, other=0.0)
    at_target = tl.load(factors + 4 * rows + row, mask=row < rows, other=0.0)
    below = logits - log_sum_exp[:, None]
    is_target = (first + begin + column)[None, :] == target[:, None]
    gradient = tl.exp(below) * (level[:, None] + below * slope[:, None]) + every[:, None]
    gradient += tl.where(is_target, at_target[:, None], 0.0)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(grad_logits + at, gradient.to(grad_logits.dtype.element_ty), mask=inside)
