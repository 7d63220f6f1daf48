"""The paged cache: decode and prefill in chunks give what attention over the whole text gives, bit for bit."""

import time

import pytest
import torch

from liaoyuan.ops import attention, linear, paged_attention, write_cache
from tests.ops.cases import attention_by_hand, boundaries_of, difference, random

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


class Pages:
    """A cache of 16-token blocks in shuffled order, filled through `write_cache`."""

    def __init__(self, lengths, heads, dim, dtype, value_dim=None):
        dims = (dim, value_dim or dim)
        blocks = [-(-length // 16) for length in lengths]
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(5)).to(torch.int32)
        self.tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
        for row, part in enumerate(order.split(blocks)):
            self.tables[row, : len(part)] = part
        self.key, self.value = (torch.full((sum(blocks), 16, heads, dim), torch.nan, dtype=dtype) for dim in dims)
        self.texts = [[random(n, heads, dim, dtype=dtype, seed=10 * i + j) for j, dim in enumerate(dims)]
                      for i, n in enumerate(lengths)]  # fmt: skip

    def fill(self):
        for sequence, (key, value) in enumerate(self.texts):
            place = torch.arange(len(key))
            slots = self.tables[sequence, place // 16].long() * 16 + place % 16
            write_cache(key, value, self.key, self.value, slots)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 20, 65, 540])
@pytest.mark.parametrize(
    ("query_heads", "key_heads", "dim", "value_dim"),
    [(4, 2, 64, 64), (3, 3, 24, 24), (8, 1, 16, 16), (7, 1, 96, 64), (2, 1, 32, 48)],
)
def test_a_mixed_batch_equals_attention_over_the_whole_text(query_heads, key_heads, dim, value_dim, window, dtype):
    lengths, fresh = (1, 17, 600, 40, 9), (1, 1, 1, 40, 4)  # decode, decode, long decode, prefill, chunk
    sinks = None if window is None else random(query_heads, seed=3)
    pages = Pages(lengths, key_heads, dim, dtype, value_dim)
    pages.fill()
    queries = [random(n, query_heads, dim, dtype=dtype, seed=100 + n) for n in lengths]
    batch = torch.cat(
        [q[-n:] for q, n in zip(queries, fresh, strict=True)] + [random(3, query_heads, dim, dtype=dtype)]
    )
    starts, totals = boundaries_of(fresh), torch.tensor(lengths, dtype=torch.int32)
    out = paged_attention(batch, pages.key, pages.value, pages.tables, starts, totals, dim**-0.5, window, sinks)
    assert not out[sum(fresh) :].any()
    for q, (k, v), n, part in zip(queries, pages.texts, fresh, out.split([*fresh, 3]), strict=False):
        whole = attention(q, k, v, boundaries_of([len(q)]), dim**-0.5, window, sinks)
        assert torch.equal(part, whole[-n:])
        wide = None if sinks is None else sinks.double()
        expected = attention_by_hand(q.double(), k.double(), v.double(), [len(q)], dim**-0.5, window, wide)
        assert difference(part, expected[-n:]) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 45])
def test_a_prompt_in_chunks_of_any_size_has_the_bits_of_the_whole(window, dtype):
    length, sinks = 560, random(4, seed=3)
    pages = Pages((length,), 2, 32, dtype)
    pages.fill()
    query = random(length, 4, 32, dtype=dtype, seed=8)
    whole = attention(query, *pages.texts[0], boundaries_of([length]), 0.2, window, sinks)
    for begin, end in ((0, 1), (1, 3), (3, 70), (70, 71), (71, 513), (513, 560)):
        counts = torch.tensor([end], dtype=torch.int32)
        places = (pages.tables, boundaries_of([end - begin]), counts)
        part = paged_attention(query[begin:end], pages.key, pages.value, *places, 0.2, window, sinks)
        assert torch.equal(part, whole[begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("query_heads", "key_heads", "dim"), [(3, 3, 32), (10, 2, 64), (7, 1, 96), (8, 4, 16), (12, 4, 64)]
)
def test_a_token_is_decoded_with_the_bits_of_its_prompt_beside_any_others(query_heads, key_heads, dim, dtype):
    """Key heads go through the cache together, more or fewer with the number of sequences and threads."""
    lengths, threads = (1, 17, 560, 64), torch.get_num_threads()
    pages = Pages(lengths, key_heads, dim, dtype)
    pages.fill()
    query = random(len(lengths), query_heads, dim, dtype=dtype, seed=8)
    whole = [
        attention(query[i : i + 1].expand(n, -1, -1), *pages.texts[i], boundaries_of([n]), 0.2)[-1]
        for i, n in enumerate(lengths)
    ]
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for first, last in ((0, 4), (2, 3), (1, 3)):
                counts = torch.tensor(lengths[first:last], dtype=torch.int32)
                places = (pages.tables[first:last], boundaries_of([1] * (last - first)), counts)
                found = paged_attention(query[first:last], pages.key, pages.value, *places, 0.2)
                assert all(torch.equal(a, b) for a, b in zip(found, whole[first:last], strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [40, 1100])
def test_keys_that_weights_drove_out_of_the_caches_give_the_same_bits(length, dtype):
    """They are read in either of two ways, by chance at first (`ops/native/far.h`)."""
    pages = Pages((length, 17), 4, 64, dtype)
    pages.fill()
    query = random(2, 12, 64, dtype=dtype, seed=8)
    places = (pages.tables, boundaries_of([1, 1]), torch.tensor([length, 17], dtype=torch.int32))
    near = paged_attention(query, pages.key, pages.value, *places, 0.125)
    row, others = random(1, 192, dtype=dtype), torch.ones(2**16, 192, dtype=dtype)  # of 24 MiB or more
    for _ in range(6):
        for _ in range(8):
            linear(row, others)
        assert torch.equal(paged_attention(query, pages.key, pages.value, *places, 0.125), near)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fresh", [1, 9])
def test_what_lies_before_the_window_is_not_read(fresh, dtype):
    length, window = 700, 40
    pages = Pages((length,), 2, 32, dtype)
    pages.fill()
    query = random(fresh, 4, 32, dtype=dtype, seed=8)
    places = (pages.tables, boundaries_of([fresh]), torch.tensor([length], dtype=torch.int32))
    before = paged_attention(query, pages.key, pages.value, *places, 0.2, window)
    hidden = torch.arange(length - fresh - window + 1)
    slots = pages.tables[0, hidden // 16].long() * 16 + hidden % 16
    for cache in (pages.key, pages.value):
        cache.flatten(0, 1)[slots] = torch.nan
    assert torch.equal(before, paged_attention(query, pages.key, pages.value, *places, 0.2, window))


def test_a_long_text_costs_what_its_window_does():
    pages = Pages((8000,), 2, 64, torch.bfloat16)
    pages.fill()
    query = random(1, 8, 64, dtype=torch.bfloat16)
    places = (pages.tables, boundaries_of([1]), torch.tensor([8000], dtype=torch.int32))

    def seconds(window):
        times = []
        for _ in range(20):
            start = time.thread_time()
            paged_attention(query, pages.key, pages.value, *places, 0.125, window)
            times.append(time.thread_time() - start)
        return min(times)

    seconds(64)
    assert seconds(64) < 0.3 * seconds(None)


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
