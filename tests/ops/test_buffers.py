"""Tensors in one buffer come back as they were, and a checksum tells any two apart."""

import pytest
import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops import checksum, pack, unpack
from liaoyuan.ops.buffers import CHECKSUM
from tests.ops.cases import random

SHAPES = [(3, 4), (), (0, 5), (7,), (2, 3, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_is_packed_comes_back(dtype):
    tensors = [(100 * random(*shape, seed=i)).to(dtype) for i, shape in enumerate(SHAPES)]
    tensors[0] = tensors[0].t()
    flat = pack(tensors)
    assert flat.shape == (12 + 1 + 7 + 30,)
    found = unpack(flat, [x.shape for x in tensors])
    assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))
    assert all(x.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for x in found)
    again = torch.empty_like(flat)
    assert pack(tensors, out=again) is again and torch.equal(again, flat)
    assert pack([]).numel() == 0 and unpack(torch.empty(0), []) == []


def test_buffers_that_do_not_fit_are_named():
    with pytest.raises(LiaoyuanError, match="holds one dtype, not bfloat16, float32"):
        pack([torch.ones(2), torch.ones(2).bfloat16()])
    with pytest.raises(LiaoyuanError, match=r"The buffer \[3\] does not hold 2 tensors of 4 elements"):
        pack([torch.ones(2), torch.ones(2)], out=torch.empty(3))
    with pytest.raises(LiaoyuanError, match=r"The buffer \[5\] is not 2 tensors of 4 elements"):
        unpack(torch.ones(5), [(2,), (1, 2)])


def test_a_checksum_sees_every_bit_and_place():
    x = random(3000)
    whole, bits = checksum(x), x.view(torch.int32)
    seen = {whole}
    for place in (0, 1, 2, 1500, 2999):
        for bit in (0, 13, 31):
            other = bits.clone()
            other[place] ^= torch.tensor(1 << bit).int() if bit < 31 else torch.tensor(-(2**31)).int()
            seen.add(checksum(other))
    seen.add(checksum(x.roll(2)))
    seen.add(checksum(x[:-1]))
    seen.add(checksum(torch.cat((x, torch.zeros(1)))))
    assert len(seen) == 1 + 15 + 3
    assert checksum(x, x + 1) != checksum(x + 1, x)
    assert 0 <= whole < 2**64


@pytest.mark.parametrize("size", [0, 1, 5, 8, 600_001])
def test_a_checksum_is_the_same_on_every_way(size):
    data = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert checksum(data) == (int(CHECKSUM.reference(data)) % 2**64)
    torch.set_num_threads(2)
    try:
        assert checksum(data) == (int(CHECKSUM.reference(data)) % 2**64)
    finally:
        torch.set_num_threads(1)
    x = random(40, 30, dtype=torch.bfloat16)
    assert checksum(x.t().contiguous().t()) == checksum(x) == checksum(x.view(torch.int16)) == checksum(x.flatten())
