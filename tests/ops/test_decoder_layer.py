"""A layer that runs as one gives the bits of its parts, whatever the rows, and is used only where it is the same."""

import pytest
import torch
from torch import Tensor

from liaoyuan import ops
from liaoyuan.models import Decoder, ModelConfig, initialise
from liaoyuan.models.context import Pattern
from liaoyuan.ops.decoder_layer import layer_sample
from tests.ops.cases import DTYPES, torch_threads

SIZES = (48, 40, 2, 2, 32)  # hidden, intermediate, key-value heads, query heads of each, head dimension


@pytest.fixture(autouse=True)
def native_only() -> None:
    if not runs(torch.empty(1, 8)):
        pytest.skip("the native kernels are not in use here")


def runs(stream: Tensor) -> bool:
    with torch.no_grad():
        return ops.layer_kernel(stream, 32) is not None


def apart(sample: tuple) -> tuple[Tensor, ...]:
    """The same layer by the operators one after another: stream, addend, and the caches that it has written."""
    residual, x, cosine, sine, *rest = sample
    pages, weights = ops.Pages(*(y.clone() for y in rest[:6])), ops.LayerWeights(*rest[6:19])
    scale, window, eps = rest[19:]
    if x is None:
        x = ops.rms_norm(residual, weights.input_norm, eps)
    else:
        residual, x = ops.add_rms_norm(residual, x, weights.input_norm, eps)
    heads, dim = pages.key_cache.shape[2:]
    qkv = ops.linear(x, weights.qkv, weights.qkv_bias)
    query, key, value = ops.split_rotary(
        qkv, cosine, sine, heads, dim, weights.query_norm, weights.key_norm, eps
    )  # fmt: skip
    ops.write_cache(key, value, pages.key_cache, pages.value_cache, pages.slots)
    places = (pages.block_tables, pages.query_starts, pages.lengths)
    seen = ops.paged_attention(query, pages.key_cache, pages.value_cache, *places, scale, window, weights.sinks)
    added = ops.linear(seen.flatten(1), weights.output, weights.output_bias)
    residual, x = ops.add_rms_norm(residual, added, weights.post_norm, eps)
    hidden = ops.swiglu(ops.linear(x, weights.gate_up, weights.gate_up_bias))
    return residual, ops.linear(hidden, weights.down, weights.down_bias), pages.key_cache, pages.value_cache


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("with_extras", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_as_one_has_the_bits_of_its_parts(dtype: torch.dtype, with_extras: bool, threads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    cases = [([1], [1]), ([1], [300]), ([1] * 8, [*range(1, 9)]), ([1] * 33, [40] * 33), ([1, 70, 1], [9, 90, 64])]
    with torch_threads(threads):
        for queries, lengths in cases:
            sample = layer_sample(queries, lengths, SIZES, with_extras, dtype, generator)
            expected = apart(sample)
            found = (*ops.decoder_layer(*sample), *sample[4:6])
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (queries, lengths)


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
    ops.configure({"swiglu": "reference"})
    try:
        assert not runs(stream)
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
@pytest.mark.parametrize("family", FEATURES)
def test_a_model_gives_the_same_bits_with_layers_as_one(
    family: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liaoyuan.inference.cache import KeyValueCache, PagedContext

    config = ModelConfig(family, 64, 32, 48, 2, 4, 2, 16, dtype=dtype, **FEATURES[family])
    model = initialise(Decoder(config), 0).eval()
    calls = []
    counted = lambda *x: calls.append(1) or ops.decoder_layer(*x)  # noqa: E731
    monkeypatch.setattr("liaoyuan.models.decoder.layer_kernel", lambda *_: counted)

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
