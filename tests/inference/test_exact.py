"""Decode gives the very bits that training computes, where the native kernels are in use."""

import pytest
import torch

from liaoyuan import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "groups", "length"), [(32, 2, 1), (32, 1, 33), (64, 7, 100), (128, 4, 16), (64, 2, 600)]
)
def test_decode_equals_attention_bit_for_bit(dtype: torch.dtype, dim: int, groups: int, length: int) -> None:
    kernels = {status.operator: status.kernel for status in ops.status()}
    if not kernels["attention"] == kernels["paged_attention"] == "native":
        pytest.skip("the native kernels are not in use here, and the references differ in the last bits")
    generator = torch.Generator().manual_seed(length)
    heads, size = 2, 16
    query = torch.randn(length, heads * groups, dim, generator=generator).to(dtype)
    key, value = (torch.randn(length, heads, dim, generator=generator).to(dtype) for _ in range(2))
    whole = ops.attention(query, key, value, torch.tensor([0, length], dtype=torch.int32), dim**-0.5)
    blocks = -(-length // size)
    table = torch.randperm(blocks + 3, generator=generator)[:blocks].to(torch.int32)
    keys, values = (torch.full((blocks + 3, size, heads, dim), torch.nan, dtype=dtype) for _ in range(2))
    place = torch.arange(length)
    ops.write_cache(key, value, keys, values, table[place // size].long() * size + place % size)
    starts, lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    decoded = ops.paged_attention(query[-1:], keys, values, table[None], starts, lengths, dim**-0.5)
    assert torch.equal(decoded[0], whole[-1])
