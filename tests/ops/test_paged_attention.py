"""The paged cache: decode and prefill in chunks give what attention over the whole text gives, bit for bit."""

import pytest
import torch

from liaoyuan.ops import attention, paged_attention, write_cache
from tests.ops.cases import attention_by_hand, boundaries_of, difference, random

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


class Pages:
    """A cache of 16-token blocks in shuffled order, filled through `write_cache`."""

    def __init__(self, lengths, heads, dim, dtype):
        blocks = [-(-length // 16) for length in lengths]
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(5)).to(torch.int32)
        self.tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
        for row, part in enumerate(order.split(blocks)):
            self.tables[row, : len(part)] = part
        self.key, self.value = (torch.full((sum(blocks), 16, heads, dim), torch.nan, dtype=dtype) for _ in range(2))
        self.texts = [[random(n, heads, dim, dtype=dtype, seed=10 * i + j) for j in range(2)]
                      for i, n in enumerate(lengths)]  # fmt: skip

    def fill(self):
        for sequence, (key, value) in enumerate(self.texts):
            place = torch.arange(len(key))
            slots = self.tables[sequence, place // 16].long() * 16 + place % 16
            write_cache(key, value, self.key, self.value, slots)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query_heads", "key_heads", "dim"), [(4, 2, 64), (3, 3, 24), (8, 1, 16)])
def test_a_mixed_batch_equals_attention_over_the_whole_text(query_heads, key_heads, dim, dtype):
    lengths, fresh = (1, 17, 600, 40, 9), (1, 1, 1, 40, 4)  # decode, decode, long decode, prefill, chunk
    pages = Pages(lengths, key_heads, dim, dtype)
    pages.fill()
    queries = [random(n, query_heads, dim, dtype=dtype, seed=100 + n) for n in lengths]
    batch = torch.cat(
        [q[-n:] for q, n in zip(queries, fresh, strict=True)] + [random(3, query_heads, dim, dtype=dtype)]
    )
    starts, totals = boundaries_of(fresh), torch.tensor(lengths, dtype=torch.int32)
    out = paged_attention(batch, pages.key, pages.value, pages.tables, starts, totals, dim**-0.5)
    assert not out[sum(fresh) :].any()
    for q, (k, v), n, part in zip(queries, pages.texts, fresh, out.split([*fresh, 3]), strict=False):
        whole = attention(q, k, v, boundaries_of([len(q)]), dim**-0.5)
        assert torch.equal(part, whole[-n:])
        expected = attention_by_hand(q.double(), k.double(), v.double(), [len(q)], dim**-0.5)
        assert difference(part, expected[-n:]) < DTYPES[dtype]


def test_negative_slots_are_skipped_and_wild_ones_refused():
    key, value = random(3, 2, 8), random(3, 2, 8, seed=1)
    caches = [torch.zeros(2, 4, 2, 8) for _ in range(2)]
    write_cache(key, value, *caches, torch.tensor([7, -1, 0]))
    assert torch.equal(caches[0].flatten(0, 1)[[7, 0]], key[[0, 2]])
    assert torch.equal(caches[1].flatten(0, 1)[[7, 0]], value[[0, 2]])
    assert caches[0].count_nonzero() == 2 * 16
    with pytest.raises((RuntimeError, IndexError)):
        write_cache(key, value, *caches, torch.tensor([8, 1, 2]))


def test_a_table_that_points_outside_the_cache_is_refused():
    cache = torch.zeros(2, 4, 1, 8)
    starts, lengths = boundaries_of([1]), torch.tensor([5], dtype=torch.int32)
    for table in ([[0, 2]], [[0, -1]], [[0]]):
        with pytest.raises((RuntimeError, IndexError)):
            paged_attention(random(1, 1, 8), cache, cache, torch.tensor(table, dtype=torch.int32), starts, lengths, 1.0)
