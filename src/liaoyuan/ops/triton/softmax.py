"""What the attention kernels share: where a tile lies, and a softmax whose scores come tile by tile.

FlashAttention-2 (Dao 2023, arXiv 2307.08691, sec. 3.1). Keys are taken in parts of a fixed length, each with a sum of
its own; sums are then merged in order. Thus a long cache may be shared out among programs without a change of bits.
"""

import triton
import triton.language as tl

from liaoyuan.ops.triton.launch import UNBOUNDED

PART = tl.constexpr(1024)  # keys of a part: a multiple of every tile; shorter parts cost more merging
LOG2_E = tl.constexpr(1.4426950408889634)  # scores are in units of log 2, since hardware computes powers of two
LOG_2 = tl.constexpr(0.6931471805599453)
NO_WINDOW = tl.constexpr(UNBOUNDED)


@triton.jit
def find_tile(starts, count, steps, tile, SIZE: tl.constexpr):
    """Return the sequence in which a tile of SIZE rows lies, its first row, and that sequence's first and last row + 1.

    Sequence s has rows starts[s] to starts[s + 1], and the tiles from starts[s] // SIZE + s on: room for all its rows.
    A tile that no row needs begins at the end of its sequence or after it. `steps` halvings find one of `count`.
    """
    low = tl.program_id(0) * 0
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(starts + middle) // SIZE + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = tl.load(starts + low)
    return low, start + (tile - start // SIZE - low) * SIZE, start, tl.load(starts + low + 1)


@triton.jit
def load_rows(base, row, stride, place, valid, columns, WIDTH: tl.constexpr):
    """Return WIDTH elements of each of the rows `row + place`, zero where not valid."""
    at = base + tl.cast(row, tl.int64) * stride + place[:, None] * stride + columns[None, :]
    return tl.load(at, mask=valid[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def score(query, key, row, column, factor, window, see_all=False):
    """Return the scores of a tile, -inf where the row's token does not see the column's.

    see_all: whether it is known that all see all; to look takes a tenth of the time.
    """
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
    if not see_all:
        behind = row[:, None] - column[None, :]
        scores = tl.where((behind >= 0) & (behind < window), scores, float("-inf"))
    return scores


@triton.jit
def absorb(scores, value, maximum, summed, output):
    """Take one more tile of scores and their values into a running softmax."""
    higher = tl.maximum(maximum, tl.max(scores, 1))
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(maximum - finite)
    more = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    return higher, summed * shrink + tl.sum(weight, 1), output * shrink[:, None] + more


@triton.jit
def merge(maximum, summed, output, more_maximum, more_summed, more_output):
    """Return two softmaxes over different keys as one."""
    higher = tl.maximum(maximum, more_maximum)
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    one, two = tl.exp2(maximum - finite), tl.exp2(more_maximum - finite)
    return higher, summed * one + more_summed * two, output * one[:, None] + more_output * two[:, None]


@triton.jit
def add_sink(maximum, summed, output, sink):
    """Take a token without value, of this score, into a softmax."""
    higher = tl.maximum(maximum, sink)
    shrink = tl.exp2(maximum - higher)
    return higher, summed * shrink + tl.exp2(sink - higher), output * shrink[:, None]
