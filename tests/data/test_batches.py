"""Batch i is a function of (seed, i), holds what it should, and is the same on any number of processes."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.data import Batch, RecordBatches, TokenBatches, TokenisedRecord, TokenStream
from liaoyuan.data.permutation import number, permutation
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, PackedContext, packed_context

END = 0


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 99))
def test_the_computed_shuffle_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    order = permutation(size, seed, epoch)
    assert sorted(order[index] for index in range(size)) == list(range(size))
    assert order.whole().tolist() == [order[index] for index in range(size)]


def test_the_computed_shuffle_is_fair() -> None:
    """Over many seeds, every element comes first about equally often: chi-square with 9 degrees, 1 in 10^6."""
    first = Counter(permutation(10, seed)[0] for seed in range(5000))
    assert sum((first[element] - 500) ** 2 / 500 for element in range(10)) < 45
    assert len({tuple(permutation(1000, 1, epoch)[index] for index in range(5)) for epoch in range(50)}) == 50


def test_the_computed_shuffle_is_the_same_everywhere() -> None:
    """A changed order would break the resuming of runs that are under way."""
    order = permutation(1000, 7, 3)
    assert [order[index] for index in range(6)] == [623, 856, 27, 282, 890, 644]
    assert number(1000, 7, 3) == 581
    with pytest.raises(IndexError):
        order[1000]


@pytest.fixture
def stream() -> TokenStream:
    """Sixty documents of 1 to 40 tokens; token values tell the document apart from its neighbours."""
    generator = np.random.default_rng(0)
    tokens, starts = [], []
    for _ in range(60):
        starts.append(len(tokens))
        tokens += [END, *generator.integers(1, 96, generator.integers(0, 40))]
    return TokenStream(np.array([*tokens, END], dtype=np.uint16), np.array(starts, dtype=np.int64))


def equal(left: Batch, right: Batch) -> bool:
    parts = ([torch.as_tensor(getattr(one, name)) for name in Batch.__dataclass_fields__] for one in (left, right))
    return all(map(torch.equal, *parts))


def joined(batches: list[Batch], name: str) -> torch.Tensor:
    return torch.cat([getattr(batch, name) for batch in batches])


def test_batch_i_is_a_function_of_seed_and_i(stream: TokenStream) -> None:
    batches, others = (TokenBatches(stream, 1, 128, 32) for _ in range(2))
    later = others[37]
    assert all(equal(batches[step], others[step]) for step in (0, 5, 30, 37))
    assert equal(batches[37], later)
    assert not torch.equal(TokenBatches(stream, 2, 128, 32)[0].tokens, batches[0].tokens)


def test_windows_follow_the_stream_and_their_documents(stream: TokenStream) -> None:
    batches = TokenBatches(stream, 1, 128, 32)
    starts = set(stream.starts.tolist())
    for step in range(20):
        batch = batches[step]
        for row in range(4):
            begin = batches.window(step * 4 + row)
            window = stream.tokens[begin : begin + 33].astype(np.int64)
            part = slice(row * 32, row * 32 + 32)
            assert batch.tokens[part].tolist() == window[:-1].tolist()
            assert batch.targets[part].tolist() == window[1:].tolist()
            cuts = {0, *(place for place in range(32) if begin + place in starts)}
            assert set(np.flatnonzero(batch.positions[part].numpy() == 0)) == cuts


def test_every_window_comes_once_in_an_epoch(stream: TokenStream) -> None:
    batches = TokenBatches(stream, 1, 64, 32)
    assert len({batches.window(epoch * batches.windows) % 32 for epoch in range(20)}) > 5  # cut at other places
    for epoch in range(3):
        samples = range(epoch * batches.windows, (epoch + 1) * batches.windows)
        begins = sorted(batches.window(sample) for sample in samples)
        assert set(np.diff(begins)) == {32}
        assert begins[-1] + 32 < len(stream.tokens)


def check_places(batch: Batch) -> None:
    """Boundaries rise from 0 to N, positions count from 0 in each document, sizes are fixed."""
    boundaries = batch.boundaries.long()
    assert (boundaries[0], boundaries[-1]) == (0, len(batch.tokens))
    assert bool((boundaries.diff() >= 0).all())
    expected = torch.cat([torch.arange(size) for size in boundaries.diff().tolist()])
    assert torch.equal(batch.positions, expected)
    assert batch.boundaries.dtype == torch.int32
    assert batch.weights.dtype == torch.float32
    assert {batch.tokens.dtype, batch.targets.dtype, batch.positions.dtype} == {torch.int64}


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=30, max_size=60), seed=st.integers(0, 99))
def test_sizes_never_change(lengths: list[int], seed: int) -> None:
    starts = np.cumsum([0, *lengths])
    stream = TokenStream(np.arange(starts[-1] + 1, dtype=np.uint32), starts[:-1])
    records = [TokenisedRecord(tuple(range(length + 1)), (1.0,) * (length + 1)) for length in lengths]
    for batches in (TokenBatches(stream, seed, 60, 15), RecordBatches(records, seed, 120, 30)):
        first = batches[0]
        for step in range(12):
            check_places(batches[step])
            assert batches[step].boundaries.shape == first.boundaries.shape
            assert batches[step].tokens.shape == first.tokens.shape
            assert batches.total_weight(step) == float(batches[step].weights.sum())


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_and_microbatches_divide_the_same_global_batch(stream: TokenStream, world_size: int) -> None:
    records = records_of(30)
    whole = TokenBatches(stream, 1, 256, 32), RecordBatches(records, 1, 256, 32)
    for rank_count, micro in ((world_size, 1), (world_size, 2), (1, 8)):
        ranks = range(rank_count)
        parts = (
            [TokenBatches(stream, 1, 256, 32, micro, rank, rank_count) for rank in ranks],
            [RecordBatches(records, 1, 256, 32, micro, rank, rank_count) for rank in ranks],
        )
        for one, many in zip(whole, parts, strict=True):
            for step in (0, 3):
                batches = [batch for part in many for batch in part(step)]
                assert len(batches) == rank_count * micro
                for name in ("tokens", "targets", "positions", "weights"):
                    assert torch.equal(joined(batches, name), getattr(one[step], name))
                assert {part.total_weight(step) for part in many} == {one.total_weight(step)}


def records_of(count: int) -> list[TokenisedRecord]:
    """Conversations whose tokens name the record, so that each can be found again in a batch."""
    generator = np.random.default_rng(1)
    return [
        TokenisedRecord((record + 1,) * (size + 1), (0.0, 0.0, *(1.0,) * (size - 1)))
        for record, size in enumerate(generator.integers(2, 20, count))
    ]


def test_every_record_comes_once_in_an_epoch_whole_and_with_its_weights() -> None:
    records = records_of(50)
    batches = RecordBatches(records, 3, 64, 32)
    order = [record for step in range(40) for row in batches.rows(step) for record in row]
    counts = Counter(record for row in (batches.rows(step) for step in range(40)) for part in row for record in part)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(order) >= 100
    for step in range(40):
        batch = batches[step]
        for begin, end in zip(batch.boundaries[:-1].tolist(), batch.boundaries[1:].tolist(), strict=True):
            value = int(batch.tokens[begin]) if end > begin else 0
            if value:
                assert end - begin == len(records[value - 1].tokens) - 1
                assert batch.weights[begin:end].tolist() == list(records[value - 1].weights[1:])
            else:
                assert float(batch.weights[begin:end].sum()) == 0.0


def test_record_batches_are_a_function_of_seed_and_step_and_waste_little() -> None:
    records = records_of(50)
    batches, others = (RecordBatches(records, 3, 512) for _ in range(2))
    later = others[20]
    for step in range(20):
        assert equal(batches[step], others[step])
    assert equal(batches[20], later)
    used = sum(int((batches[step].tokens != 0).sum()) for step in range(20)) / (20 * 512)
    assert used > 0.95
    assert batches.rows(0) != RecordBatches(records, 4, 512).rows(0)


def test_records_that_go_together_lie_one_after_another_in_one_row() -> None:
    records, groups = records_of(30), [1, 2, 3] * 5
    firsts = [0, *itertools.accumulate(groups)]
    batches = RecordBatches(records, 3, 256, 64, groups=groups)
    seen: list[int] = []
    for step in range(8):
        rows, batch = batches.rows(step), batches[step]
        wanted = [list(range(firsts[group], firsts[group + 1])) for row in rows for group in row]
        places = batches.documents(rows)
        for record, document in zip((one for group in wanted for one in group), places, strict=True):
            begin, end = batch.boundaries[document : document + 2].tolist()
            assert batch.tokens[begin:end].tolist() == list(records[record].tokens[:-1])
            assert begin // 64 == (end - 1) // 64
        assert places == sorted(places)
        seen += [group for row in rows for group in row]
    counts = Counter(seen)
    assert len(counts) == 15 and max(counts.values()) - min(counts.values()) <= 1
    assert [one for row in batches.fill(range(15)) for one in row] == list(range(15))
    with pytest.raises(LiaoyuanError, match="go together"):
        RecordBatches(records, 3, 64, 64, groups=[30])


def test_a_packed_batch_gives_each_record_the_loss_it_has_alone(tiny_model: Decoder) -> None:
    records = records_of(12)
    batch = RecordBatches(records, 0, 128, 64)[0]
    with torch.no_grad():
        packed = tiny_model(batch.tokens, batch.positions, PackedContext(batch.boundaries), targets=batch.targets)
        alone = 0.0
        for row in RecordBatches(records, 0, 128, 64).rows(0):
            for record in (records[index] for index in row):
                tokens, weights = torch.tensor(record.tokens), torch.tensor(record.weights)
                positions, context = packed_context([len(tokens) - 1])
                scores = tiny_model(tokens[:-1], positions, context, targets=tokens[1:])
                alone += float((scores * weights[1:]).sum())
    assert float((packed * batch.weights).sum()) == pytest.approx(alone, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 32), min_size=1, max_size=200), rows=st.integers(1, 6), seed=st.integers(0, 9))
def test_packing_takes_every_record_once_before_any_comes_again(sizes: list[int], rows: int, seed: int) -> None:
    records = [TokenisedRecord((1,) * (size + 1), (1.0,) * (size + 1)) for size in sizes]
    batches = RecordBatches(records, seed, 32 * rows, 32)
    counts = Counter[int]()
    for step in range(8):
        for row in batches.rows(step):
            assert sum(sizes[record] for record in row) <= 32
            counts.update(row)
        assert sum(counts.values()) > 0
        assert max(counts.values()) - min(counts[record] for record in range(len(sizes))) <= 1


@pytest.mark.parametrize("groups", [None, [1, 2, 3] * 5])
def test_so_many_epochs_take_no_step_too_few_and_none_too_many(groups: list[int] | None) -> None:
    batches = RecordBatches(records_of(30), 3, 128, 64, groups=groups)
    for epochs in (1, 2, 3):
        steps = batches.steps_for(epochs)
        seen, before = (
            Counter(one for step in range(end) for row in batches.rows(step) for one in row)
            for end in (steps, steps - 1)
        )
        count = len(groups or range(30))
        assert min(seen[one] for one in range(count)) >= epochs > min(before[one] for one in range(count))


def test_packing_leaves_little_padding() -> None:
    """First fit, which packs in the order given, leaves a fifth of such rows empty."""
    generator = np.random.default_rng(0)
    sizes = np.minimum(np.exp(generator.normal(5, 0.7, 3000)).astype(int) + 2, 512).tolist()
    records = [TokenisedRecord((1,) * (size + 1), (1.0,) * (size + 1)) for size in sizes]
    batches = RecordBatches(records, 0, 4096, 512)
    used = [sum(sizes[record] for row in batches.rows(step) for record in row) / 4096 for step in range(100)]
    assert sum(used) / len(used) > 0.97


def test_packing_changes_neither_the_loss_nor_a_gradient(tiny_model: Decoder) -> None:
    """In one dtype of 64 bits, what is packed and what stands alone differ by rounding only."""
    model = tiny_model.double()
    records = records_of(12)
    batches = RecordBatches(records, 0, 128, 64)
    batch = batches[0]

    def gradients(parts: list[Batch]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            context = PackedContext(part.boundaries)
            scores = model(part.tokens, part.positions, context, targets=part.targets)
            total = total - (scores * part.weights).sum() / batches.total_weight(0)
        total.backward()
        return float(total.detach()), [value.grad.clone() for value in model.parameters() if value.grad is not None]

    chosen = [record for row in batches.rows(0) for record in row]
    alone = [RecordBatches([records[record]], 0, len(records[record].tokens) - 1)[0] for record in chosen]
    packed, single = gradients([batch]), gradients(alone)
    model.float()
    assert packed[0] == pytest.approx(single[0], rel=1e-6)
    assert packed[1]
    for one, other in zip(packed[1], single[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_impossible_divisions_are_refused_in_one_sentence(stream: TokenStream) -> None:
    records = records_of(3)
    wrong = [
        (lambda: TokenBatches(stream, 1, 100, 32), "multiple of sequence_length"),
        (lambda: TokenBatches(stream, 1, 64, 32, microbatches=4), "cannot be divided"),
        (lambda: TokenBatches(stream, 1, 2**20, 2**20), "too few"),
        (lambda: TokenBatches(stream, 1, 0, 32), "above 0"),
        (lambda: RecordBatches(records, 1, 2), "more than sequence_length"),
        (lambda: RecordBatches([], 1, 64), "no records"),
    ]
    for make, reason in wrong:
        with pytest.raises(LiaoyuanError, match=reason):
            make()
