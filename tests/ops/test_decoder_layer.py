"""A layer that runs as one gives the bits of its parts, whatever the rows, and is used only where it is the same."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from liaoyuan import ops
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams
from liaoyuan.models import Decoder, ModelConfig, Quantisation, quantise_model
from liaoyuan.models.context import Pattern
from liaoyuan.ops.decoder_layer import FewBits, few_bits_sample, layer_sample
from tests.conftest import randomised
from tests.ops.cases import DTYPES, torch_threads

SIZES = (48, 40, 2, 2, 32)  # hidden, intermediate, key-value heads, query heads of each, head dimension
CASES = [([1], [1]), ([1], [300]), ([1] * 8, [*range(1, 9)]), ([1] * 33, [40] * 33), ([1, 70, 1], [9, 90, 64])]
KINDS = [("int8", None, True), ("int8", 32, True), ("fp8", None, True), ("int4", 32, True), ("int4", 64, False)]
WAYS = [None, *(Quantisation(*kind) for kind in KINDS)]  # of a model's weights; None: they are whole
Product = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def native_only() -> None:
    if not runs(torch.empty(1, 8)):
        pytest.skip("the native kernels are not in use here")


def runs(stream: Tensor) -> bool:
    with torch.no_grad():
        return ops.layer_kernel(stream, 32) is not None


def apart(sample: tuple) -> tuple[Tensor, ...]:
    """The same layer by the operators one after another: stream, addend, and the caches that it has written."""
    weights = ops.LayerWeights(*sample[10:23])
    products = [lambda x, w=w, b=b: ops.linear(x, w, b) for w, b in weights.projections]
    return composed(sample[:4], sample[4:10], weights, products, sample[23:])


def quantised_apart(sample: tuple) -> tuple[Tensor, ...]:
    """The same of a layer whose projections have few bits."""
    residual, intermediate = sample[0], len(sample[19]) // 2
    weights, bits = ops.LayerWeights(*sample[10:23]), FewBits(*sample[23:27])
    queries = len(weights.qkv) - 2 * sample[4].shape[2:].numel()
    hidden = residual.shape[1]

    def product(place: int, depth: int) -> Product:
        data, bias = weights.projections[place]
        zeros = bits.zeros[place] if bits.zeros else None
        group = bits.group or None
        weight = ops.QuantisedWeight(data, bits.scales[place], zeros, bits.kind, group, (len(data), depth))  # type: ignore[arg-type]
        return lambda x: ops.quantised_linear(x, weight, bias)

    products = [product(place, depth) for place, depth in enumerate((hidden, queries, hidden, intermediate))]
    return composed(sample[:4], sample[4:10], weights, products, sample[27:])


def composed(
    stream: tuple, pages: tuple, weights: ops.LayerWeights, products: list[Product], settings: tuple
) -> tuple[Tensor, ...]:
    (residual, x, cosine, sine), (scale, window, eps) = stream, settings
    pages = ops.Pages(*(y.clone() for y in pages))
    to_qkv, to_output, to_gate_up, to_down = products
    if x is None:
        x = ops.rms_norm(residual, weights.input_norm, eps)
    else:
        residual, x = ops.add_rms_norm(residual, x, weights.input_norm, eps)
    heads, dim = pages.key_cache.shape[2:]
    query, key, value = ops.split_rotary(
        to_qkv(x), cosine, sine, heads, dim, weights.query_norm, weights.key_norm, eps
    )  # fmt: skip
    ops.write_cache(key, value, pages.key_cache, pages.value_cache, pages.slots)
    places = (pages.block_tables, pages.query_starts, pages.lengths)
    seen = ops.paged_attention(query, pages.key_cache, pages.value_cache, *places, scale, window, weights.sinks)
    residual, x = ops.add_rms_norm(residual, to_output(seen.flatten(1)), weights.post_norm, eps)
    return residual, to_down(ops.swiglu(to_gate_up(x))), pages.key_cache, pages.value_cache


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("with_extras", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_as_one_has_the_bits_of_its_parts(dtype: torch.dtype, with_extras: bool, threads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch_threads(threads):
        for queries, lengths in CASES:
            sample = layer_sample(queries, lengths, SIZES, with_extras, dtype, generator)
            expected = apart(sample)
            found = (*ops.decoder_layer(*sample), *sample[4:6])
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (queries, lengths)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("with_extras", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_so_has_a_layer_of_few_bits(dtype: torch.dtype, kind: tuple, with_extras: bool, threads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    more = [([1] * rows, [rows + 3] * rows) for rows in (2, 3, 4, 5, 15, 16, 17, 32, 40)]
    with torch_threads(threads):
        for queries, lengths in (*CASES, *more):
            sample = few_bits_sample(layer_sample(queries, lengths, SIZES, with_extras, dtype, generator), *kind)
            expected = quantised_apart(sample)
            pages, weights, bits = sample[:10], ops.LayerWeights(*sample[10:23]), FewBits(*sample[23:27])
            found = (*ops.quantised_decoder_layer(*pages, weights, bits, *sample[27:]), *sample[4:6])
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (queries, lengths)


def test_few_bits_that_do_not_fit_are_refused() -> None:
    sample = layer_sample([1, 3], [9, 20], SIZES, True, torch.float32, torch.Generator().manual_seed(2))
    *stream, scales, zeros, kind, group, scale, window, eps = few_bits_sample(sample, "int4", 32, False)
    call = torch.ops.liaoyuan.quantised_decoder_layer
    for wrong in (
        (scales[:3], zeros, kind, group), (scales, zeros[:3], kind, group), (scales, zeros, "int8", group),
        (scales, zeros, "int2", group), (scales, zeros, kind, 64), (scales, zeros, kind, 0),
        ([scales[1], *scales[1:]], zeros, kind, group), (scales, [x.mT.contiguous().mT for x in zeros], kind, group),
        ([x.float() for x in scales], zeros, kind, group), (scales, zeros, "", group),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            call(*stream, *wrong, scale, window, eps)
    assert all(x.isfinite().all() for x in call(*stream, scales, zeros, kind, group, scale, window, eps))


def test_rows_behind_the_last_sequence_do_no_harm() -> None:
    sample = layer_sample([1, 3], [9, 20], SIZES, True, torch.float32, torch.Generator().manual_seed(2))
    whole, longer = ops.decoder_layer(*sample), list(sample)
    for place in (0, 1, 2, 3):
        longer[place] = torch.cat((sample[place], torch.randn(2, sample[place].shape[1])))
    longer[6] = torch.cat((sample[6], torch.full((2,), -1)))
    for a, b in zip(ops.decoder_layer(*longer), whole, strict=True):
        assert torch.equal(a[: len(b)], b) and a.isfinite().all()


def test_places_outside_the_cache_are_refused() -> None:
    sample = list(layer_sample([1], [9], SIZES, False, torch.float32, torch.Generator()))
    for place, wrong in ((6, torch.tensor([16])), (7, torch.tensor([[1]], dtype=torch.int32))):
        with pytest.raises(RuntimeError, match="outside"):
            ops.decoder_layer(*sample[:place], wrong, *sample[place + 1 :])


def test_who_chooses_a_part_or_compares_operators_gets_the_parts() -> None:
    from liaoyuan.ops.choice import operators_called

    stream = torch.empty(1, 8)
    assert runs(stream) and ops.layer_kernel(stream, 32) is None  # a gradient may be wanted
    assert not runs(stream.double()) and not runs(stream.to("meta"))
    with operators_called():
        assert not runs(stream)
    for name in ("swiglu", "linear", "decoder_layer"):
        with_reference(name, lambda: not runs(stream))
    with torch.no_grad():
        assert ops.layer_kernel(stream, 32, True) is torch.ops.liaoyuan.quantised_decoder_layer.default
        with_reference("linear", lambda: ops.layer_kernel(stream, 32, True))
        for name in ("swiglu", "quantised_linear", "quantised_decoder_layer"):
            with_reference(name, lambda: not ops.layer_kernel(stream, 32, True))


def with_reference(name: str, holds: Callable[[], object]) -> None:
    ops.configure({name: "reference"})
    try:
        assert holds(), name
    finally:
        ops.configure({})


class OnlyAttends:
    """A context over the same pages that does not let a layer run as one."""

    def __init__(self, inner) -> None:
        self.inner = inner

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
        return self.inner.attend(layer, query, key, value, pattern)


FEATURES = {
    "qwen3": {"qk_norm": True, "tie_word_embeddings": True},
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": True},
    "llama": {"mlp_bias": True, "output_bias": True, "qkv_bias": True},
    "mistral": {"sliding_window": 7},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("family", FEATURES)
def test_a_model_gives_the_same_bits_with_layers_as_one(
    family: str, how: Quantisation | None, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liaoyuan.inference.cache import KeyValueCache, PagedContext

    config = ModelConfig(family, 64, 32, 48, 2, 4, 2, 16, dtype=dtype, **FEATURES[family])
    model = of_few_bits(randomised(config, 0).eval(), how)
    calls = []
    monkeypatch.setattr(
        "liaoyuan.models.decoder.layer_kernel",
        lambda *which: lambda *x: calls.append(1) or ops.layer_kernel(*which)(*x),  # type: ignore[misc]
    )

    def logits(wrap) -> Tensor:
        cache = KeyValueCache(config, 4, 16, torch.device("cpu"))
        table, found = torch.tensor([[2, 0]], dtype=torch.int32), []
        for first, end in ((0, 18), (18, 19), (19, 20)):
            place = torch.arange(first, end)
            starts, lengths = torch.tensor([0, end - first]), torch.tensor([end])
            slots = table[0, place // 16].long() * 16 + place % 16
            context = PagedContext(cache, slots, table, starts.int(), lengths.int())
            found.append(model((place * 7) % 64, place, wrap(context)))
        return torch.cat(found)

    with torch.inference_mode():
        expected = logits(OnlyAttends)
        assert not calls
        assert torch.equal(logits(lambda context: context), expected)
    assert len(calls) == 3 * config.num_hidden_layers


def of_few_bits(model: Decoder, how: Quantisation | None) -> Decoder:
    return model if how is None else quantise_model(model, how)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_an_engine_gives_the_same_tokens_and_log_probabilities_with_layers_as_one(
    how: Quantisation | None, tiny_config: ModelConfig
) -> None:
    config = dataclasses.replace(tiny_config, hidden_size=96, intermediate_size=160, dtype="bfloat16")
    model = of_few_bits(randomised(config, 0), how)
    assert all(layer.plain.of(layer) for layer in model.layers)
    asked = [Request(n, tuple(range(1, 4 + 5 * n)), SamplingParams(12, seed=n, top_logprobs=3)) for n in range(7)]

    def answers() -> list:
        return Engine(model, EngineConfig(max_batch_tokens=16, max_sequences=5)).generate(asked)

    expected = answers()
    for name in ("decoder_layer", "quantised_decoder_layer"):
        with_reference(name, lambda: answers() == expected)
