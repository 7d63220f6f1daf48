"""The fallback for exactness, PyTorch's own operators in tiles where no compiled kernels are: a row's bits are its own.

Nothing here needs a compiler: every operator is switched to its reference, and exactness is asked for.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from liaoyuan import ops
from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops import choice, tiled
from liaoyuan.ops.log_sum_exp import row_sum
from liaoyuan.ops.operator import OPERATORS, cast, outputs_and_gradients
from tests.ops.cases import difference, torch_threads
from tests.ops.drawing import DRAWINGS
from tests.ops.test_promises import sample_of, tuple_of

TILED = [name for name, operator in OPERATORS.items() if any(kernel.fallback for kernel in operator.kernels)]
NEEDLESS = {  # by training or by the engine, or of no rows
    "decoder_layer", "quantised_decoder_layer", "block_attention", "adamw_step", "square_sum", "checksum",
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_kernels() -> Iterator[None]:
    ops.configure(dict.fromkeys(OPERATORS, "reference"))
    ops.seek_exactness()
    yield
    ops.seek_exactness(False)
    ops.configure({})


def outputs_of(function: Callable[..., Any], sample: tuple[Any, ...]) -> list[Tensor]:
    """Return what an operator gives, or changes in place."""
    given = [x.clone() if torch.is_tensor(x) else x for x in sample]
    outputs = tuple_of(function(*given))
    return [*outputs] or [x for x in given if torch.is_tensor(x)]


def test_every_operator_of_training_and_of_the_engine_has_a_fallback_and_says_that_it_is_exact() -> None:
    rows = {row.operator: row for row in ops.status()}
    assert set(TILED) == OPERATORS.keys() - NEEDLESS
    assert all(rows[name].kernel == "tiled" and rows[name].exact for name in TILED)
    assert rows["linear"].reason == "exactness was asked for; the configuration has the reference"
    assert all(rows[name].kernel == "reference" and not rows[name].exact for name in NEEDLESS)


def test_it_is_not_chosen_unless_exactness_is_asked_for_or_it_is_named() -> None:
    ops.seek_exactness(False)
    assert {row.kernel for row in ops.status()} == {"reference"}
    ops.configure({"linear": "tiled", "attention": "reference"})
    rows = {row.operator: (row.kernel, row.reason) for row in ops.status()}
    assert rows["linear"] == ("tiled", "chosen in the configuration") and rows["attention"][0] == "reference"
    assert rows["swiglu"][0] != "tiled"


def test_kernels_that_are_exact_stay_where_exactness_is_asked_for() -> None:
    ops.seek_exactness(False)
    ops.configure({})
    before = {row.operator: row.kernel for row in ops.status()}
    ops.seek_exactness()
    after = {row.operator: row.kernel for row in ops.status()}
    assert all(after[name] == ("tiled" if before[name] == "reference" else before[name]) for name in TILED)


def test_a_vendors_operator_that_promises_nothing_comes_last_where_exactness_is_asked_for() -> None:
    assert [kernel.name for kernel in choice._candidates(OPERATORS["rms_norm"], None)] == [
        "native",
        "triton",
        "tiled",
        "npu",
    ]
    ops.seek_exactness(False)
    assert [kernel.name for kernel in choice._candidates(OPERATORS["rms_norm"], None)] == ["native", "npu", "triton"]


@pytest.mark.parametrize("name", TILED)
def test_it_is_right_on_any_shape(name: str) -> None:
    operator = OPERATORS[name]
    for dtype in choice._choose(name, "cpu").dtypes:
        for rows, width in ((0, 3), (1, 1), (13, 17), (33, 5), (300, 7), (70, 64)):
            sample = sample_of(name, rows, width, dtype)
            expected = outputs_of(operator.reference, cast(sample, torch.float64))
            for a, b in zip(outputs_of(operator.call, sample), expected, strict=True):
                assert a.shape == b.shape
                if b.is_floating_point():
                    assert difference(a, b, floor=1.0) <= operator.tolerance[dtype]
                else:
                    assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in TILED if DRAWINGS[name].part])
def test_a_rows_bits_depend_on_it_alone(name: str) -> None:
    """Wherever it stands, in a batch of one or of many, on one thread or two; odd widths and those of models."""
    operator, one = OPERATORS[name], DRAWINGS[name]
    assert one.part
    for dtype in choice._choose(name, "cpu").dtypes:
        for rows, width in (
            (37, 7),
            (150, 8),
            (200, 64),
            (9, 600 if name in ("linear", "loss_head", "swiglu") else 33),
        ):
            sample = sample_of(name, rows, width, dtype)
            units = one.units(sample)
            whole = outputs_of(operator.call, sample)
            half = units // 2
            batches = ([0], [units - 1], [*range(half)], [*range(half, units)], [*reversed(range(units))])
            for threads in (1, 2):
                with torch_threads(threads):
                    for batch in batches:
                        some, chosen = one.part(sample, batch)
                        found = outputs_of(operator.call, some)
                        for place in one.output_rows:
                            assert torch.equal(found[place], whole[place][chosen]), f"{dtype}, {batch}, {threads}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "groups", "length", "window"), [(32, 2, 1, None), (32, 1, 33, 5), (64, 7, 150, None), (8, 2, 600, 140)]
)
def test_decode_and_prefill_in_chunks_have_the_bits_of_attention(dtype, dim, groups, length, window) -> None:
    """A token sees the same blocks of keys whether it comes alone, in a chunk, or in the whole; sinks included."""
    generator = torch.Generator().manual_seed(length)
    heads, size = 2, 16
    query = torch.randn(length, heads * groups, dim, generator=generator).to(dtype)
    key, value = (torch.randn(length, heads, dim, generator=generator).to(dtype) for _ in range(2))
    sinks = torch.randn(heads * groups, generator=generator)
    settings = (dim**-0.5, window, sinks)
    others = torch.tensor([0, 1, 1 + length], dtype=torch.int32)  # another document stands before it
    whole = ops.attention(*(torch.cat((x[:1], x)) for x in (query, key, value)), others, *settings)[1:]
    blocks = -(-length // size)
    table = torch.randperm(blocks + 3, generator=generator)[:blocks].to(torch.int32)
    keys, values = (torch.full((blocks + 3, size, heads, dim), torch.nan, dtype=dtype) for _ in range(2))
    place = torch.arange(length)
    ops.write_cache(key, value, keys, values, table[place // size].long() * size + place % size)
    for end, count in ((length, 1), (length, min(length, 7)), (max(length // 2, 1), 1), (length, length)):
        starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, count], [end]))
        found = ops.paged_attention(query[end - count : end], keys, values, table[None], starts, lengths, *settings)
        assert torch.equal(found, whole[end - count : end])


def test_a_long_row_that_is_alone_has_its_sum_in_the_same_order_on_two_threads() -> None:
    rows = torch.randn(5, 128_256, generator=torch.Generator().manual_seed(3))
    expected, logs = row_sum(rows), ops.log_sum_exp(rows)
    for threads in (1, 2):
        with torch_threads(threads):
            alone = [row_sum(row[None]) for row in rows]
            assert torch.equal(torch.cat(alone), expected)
            assert torch.equal(torch.cat([ops.log_sum_exp(row[None]) for row in rows]), logs)


def test_the_head_and_the_sampler_give_a_token_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(4)
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = (torch.randn(n, 48, generator=generator).to(dtype) for n in (70, 2503))
        logits = ops.linear(hidden[:9], weight)
        drawn = ops.sample_tokens(logits, ops.sampling_settings(9, uniform=torch.rand(9, generator=generator)))
        targets = torch.cat((drawn.tokens, torch.zeros(61, dtype=torch.long)))
        assert torch.equal(ops.token_log_prob(hidden, weight, targets)[:9], drawn.log_probs)
        scored = ops.log_probability(logits.gather(1, drawn.tokens[:, None])[:, 0], ops.log_sum_exp(logits))
        assert torch.equal(scored, drawn.log_probs)


def test_gradients_are_those_of_the_references() -> None:
    for name in ("linear", "grouped_linear", "attention", "loss_head", "rms_norm", "swiglu", "route"):
        operator = OPERATORS[name]
        assert operator.gradient
        assert choice.self_test(operator, next(k for k in operator.kernels if k.fallback), "cpu") is None


@pytest.mark.parametrize("name", [name for name in TILED if OPERATORS[name].gradient])
def test_whoever_watches_every_call_changes_no_gradient(name: str) -> None:
    """Below a mode like this PyTorch switches autograd off, of which the gradients of references are made."""
    operator, sample = OPERATORS[name], next(iter(OPERATORS[name].samples(torch.float32)))
    alone = outputs_and_gradients(operator, operator.call, sample)
    with FlopCounterMode(display=False):
        watched = outputs_and_gradients(operator, operator.call, sample)
    assert all(map(torch.equal, alone, watched)) and len(alone) == len(watched)


def rows_in_one_piece(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def columns_as_they_are(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Tiles of rows alone: MKL computes 8 columns of fp32 in another way in some rows."""
    rows = [F.linear(tile, weight, bias) for tile in tiled.filled(x).split(tiled.TILE)]
    return torch.cat(rows)[: len(x)]


@pytest.mark.parametrize("product", [rows_in_one_piece, columns_as_they_are])
def test_a_machine_whose_products_are_not_exact_in_tiles_has_no_fallback(
    monkeypatch: pytest.MonkeyPatch, product: Callable[..., Tensor]
) -> None:
    tiled.check()
    tiled.check.cache_clear()
    monkeypatch.setattr(tiled, "product", product)
    try:
        tiled.check()
    except LiaoyuanError:
        choice.forget()
        row = next(row for row in ops.status() if row.operator == "linear")
        assert row.kernel == "reference" and "are not exact in tiles either" in row.reason
    else:
        pytest.skip("PyTorch's products on this machine are exact even so")
