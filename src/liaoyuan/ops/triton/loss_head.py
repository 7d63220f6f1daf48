"""The loss head: logits of some rows at a time, by the product that decoding takes and the sum that sampling takes.

So what training scores has the bits that decoding gave: a sum in tiles of its own would round otherwise. The backward
pass computes the logits again, a slice of the vocabulary at a time (Wijmans et al. 2024, arXiv 2411.09009), and leaves
the products with their gradients to the vendor's library.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.triton.launch import ceil_div, launch, logits_tile, programs
from liaoyuan.ops.triton.linear import linear
from liaoyuan.ops.triton.sampling import log_sum_exp as row_log_sum_exp

ROW_SLICE = 2**26  # elements of logits that are held at a time, if they are not kept: 128 MiB in bf16
SLICE = 2**25  # elements of the gradients of logits that are held at a time: 64 MiB in bf16
BLOCK = 4096  # logits of a row at a time


def loss_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: int, vocabulary: int, moments: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the operator `loss_head`."""
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    rows, columns = len(hidden), len(weight)
    step = max(1, rows if keep else ROW_SLICE // max(columns, 1))
    kept = hidden.new_empty(0, columns)
    chosen, log_sum_exp = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    entropy, mean = (hidden.new_empty(rows if moments else 0, dtype=torch.float32) for _ in range(2))
    for begin in range(0, rows, step):
        some = slice(begin, begin + step)
        logits = linear(hidden[some], weight, None, None)
        log_sum_exp[some] = row_log_sum_exp(logits)
        statistics = (logits, targets[some], log_sum_exp[some], chosen[some], entropy[some], mean[some])
        numbers = (first, len(logits), columns, vocabulary)
        launch(_statistics, (programs(len(logits)),), hidden, *statistics, *numbers, MOMENTS=moments, BLOCK=BLOCK)
        if keep:
            kept = logits
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
def _statistics(
    logits, targets, log_sum_exp, chosen, entropy, mean, first, rows, columns, vocabulary,
    MOMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write of each row the target's logit (0 if it is not here), the softmax's entropy and the logits' mean."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        own = logits + tl.cast(row, tl.int64) * columns
        target = tl.load(targets + row)
        local = target - first
        here = (local >= 0) & (local < columns)
        found = tl.load(own + tl.where(here, local, 0), mask=here, other=0.0).to(tl.float32)
        known = (target >= 0) & (target < vocabulary)
        tl.store(chosen + row, tl.where(known, found, float("-inf")))
        if MOMENTS:
            height = tl.load(log_sum_exp + row)
            spread, total = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
            for at in range(0, columns, BLOCK):
                column = at + tl.arange(0, BLOCK)
                logit = tl.load(own + column, mask=column < columns, other=0.0).to(tl.float32)
                below = logit - height
                spread -= tl.sum(tl.where(column < columns, tl.exp(below) * below, 0.0), 0)
                total += tl.sum(logit, 0)
            tl.store(entropy + row, spread)
            tl.store(mean + row, total / vocabulary)


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
