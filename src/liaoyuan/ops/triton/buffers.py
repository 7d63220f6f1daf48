"""The checksum of bytes: words are mixed with their places and added, and sums of whole numbers have no order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.buffers import FACTORS, STEP
from liaoyuan.ops.triton.launch import ELEMENTS, ceil_div, launch, programs

SPACING = tl.constexpr(STEP)
FIRST, SECOND = tl.constexpr(FACTORS[0]), tl.constexpr(FACTORS[1])


def checksum(data: Tensor) -> Tensor:
    """Compute the operator `checksum`."""
    is_whole = len(data) % 8 == 0 and data.is_contiguous() and data.storage_offset() % 8 == 0
    words = (data if is_whole else torch.nn.functional.pad(data, (0, -len(data) % 8))).view(torch.int64)
    count = programs(ceil_div(len(words), ELEMENTS)) or 1  # one program at least adds the length
    sums = torch.empty(count, dtype=torch.int64, device=data.device)
    launch(_sum, (count,), data, words, sums, len(words), len(data), BLOCK=ELEMENTS)
    return sums.sum()


@triton.jit
def _mixed(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit(do_not_specialize=("count", "length"))
def _sum(words, sums, count, length, BLOCK: tl.constexpr):
    summed = tl.zeros([BLOCK], tl.int64)
    for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        place = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        word = tl.load(words + place, mask=place < count, other=0)
        # not `where`, which Ascend's compiler has for numbers of 32 bits alone
        summed += _mixed(word + (place + 1) * SPACING) * (place < count).to(tl.int64)
    own = tl.sum(summed, 0)
    if tl.program_id(0) == 0:
        own += _mixed(tl.cast(length, tl.int64))
    tl.store(sums + tl.program_id(0), own)
