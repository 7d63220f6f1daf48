"""A layer runs as one operator only while it is what that operator computes, whatever happens to it meanwhile."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from liaoyuan.models import Decoder, ModelConfig, Quantisation, initialise, quantise_model
from liaoyuan.models.config import Experts, Latent
from liaoyuan.models.decoder import Layer
from liaoyuan.models.layers import Linear
from liaoyuan.models.plain import Plain, PlainLayer
from liaoyuan.models.quantised_linear import QuantisedLinear
from liaoyuan.models.rotary import TABLE, Rotary, _angles, rotary_angles
from liaoyuan.ops import FewBits, LayerWeights


def layer(**features: object) -> Layer:
    config = ModelConfig("qwen3", 64, 32, 48, 1, 4, 2, 16, **features)  # type: ignore[arg-type]
    return initialise(Decoder(config), 0).layers[0]  # type: ignore[return-value]


def plain(one: Layer) -> object:
    return one.plain.of(one)


def weights(found: Plain) -> LayerWeights:
    return LayerWeights(*found.arguments[:13])


def bits(found: Plain) -> FewBits:
    return FewBits(*found.arguments[13:-3])


def test_its_weights_are_the_layers_own() -> None:
    one = layer(qk_norm=True, qkv_bias=True)
    found = one.plain.of(one)
    assert found is not None and found is plain(one)
    assert weights(found).qkv is one.self_attn.qkv_proj.weight and weights(found).down is one.mlp.down_proj.weight
    assert weights(found).qkv_bias is one.self_attn.qkv_proj.bias and weights(found).down_bias is None
    assert {id(x) for x in weights(found) if x is not None} == {id(x) for x in one.parameters()}
    assert found.arguments[13:] == (one.self_attn.scale, None, 1e-6)


class Other(Linear):
    pass


CHANGES: dict[str, Callable[[Layer], object]] = {
    "an adapter": lambda one: setattr(one.mlp.down_proj, "adapter", print),
    "another projection": lambda one: setattr(one.self_attn, "o_proj", Other(64, 32, bias=False)),
    "another feed-forward layer": lambda one: setattr(one, "mlp", nn.Identity()),
    "a tensor that is no parameter": lambda one: one.mlp.down_proj._parameters.update(weight=torch.zeros(32, 48)),
    "another dtype of one weight": lambda one: setattr(
        one.mlp.down_proj, "weight", nn.Parameter(torch.zeros(32, 48, dtype=torch.float64))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_becomes_more_than_the_operator_is_noticed_at_once(change: str) -> None:
    one = layer(qk_norm=True)
    assert plain(one)
    CHANGES[change](one)
    assert plain(one) is None and plain(one) is None


def test_an_adapter_that_goes_again_leaves_a_plain_layer() -> None:
    one = layer()
    one.self_attn.qkv_proj.adapter = print
    assert plain(one) is None
    one.self_attn.qkv_proj.adapter = None
    assert plain(one)


def test_new_weights_are_taken() -> None:
    one = layer()
    assert plain(one)
    one.mlp.down_proj.weight = nn.Parameter(torch.zeros(32, 48))
    found = one.plain.of(one)
    assert found and weights(found).down is one.mlp.down_proj.weight
    one.self_attn.o_proj = Linear(64, 32, bias=False)
    found = one.plain.of(one)
    assert found and weights(found).output is one.self_attn.o_proj.weight


INT4 = Quantisation("int4", symmetric=False)


def of_few_bits(how: Quantisation = INT4, **features: object) -> Layer:
    config = ModelConfig("qwen3", 64, 32, 48, 1, 4, 2, 16, **features)  # type: ignore[arg-type]
    return quantise_model(initialise(Decoder(config), 0), how).layers[0]  # type: ignore[return-value]


@pytest.mark.parametrize("how", [INT4, Quantisation("int4"), Quantisation("int8"), Quantisation("fp8")], ids=str)
def test_of_few_bits_its_weights_are_the_layers_own_too(how: Quantisation) -> None:
    one = of_few_bits(how, qk_norm=True, qkv_bias=True)
    found = one.plain.of(one)
    assert found is not None and found is plain(one) and found.has_few_bits
    kept = [*weights(found), *bits(found).scales, *bits(found).zeros]
    assert {id(x) for x in kept if x is not None} == {id(x) for x in (*one.parameters(), *one.buffers())}
    assert weights(found).down is one.mlp.down_proj.data and bits(found).scales[3] is one.mlp.down_proj.scales
    assert (bits(found).kind, bits(found).group) == (how.kind, how.group_size or 0)


FEW_BITS_CHANGES: dict[str, Callable[[Layer], object]] = {
    "an adapter": lambda one: setattr(one.mlp.down_proj, "adapter", print),
    "an adapter that is a module": lambda one: setattr(one.mlp.down_proj, "adapter", nn.Identity()),
    "a whole projection": lambda one: setattr(one.self_attn, "o_proj", Linear(64, 32, bias=False)),
    "a projection of another kind": lambda one: setattr(
        one.mlp, "down_proj", of_few_bits(Quantisation("int8")).mlp.down_proj
    ),
    "a projection of other groups": lambda one: setattr(
        one.mlp, "down_proj", of_few_bits(Quantisation("int4", 64, False)).mlp.down_proj
    ),
    "a projection without zeros": lambda one: setattr(one.mlp.down_proj, "zeros", None),
    "weights that are away": lambda one: setattr(one.mlp.down_proj, "data", None),
    "weights that lie apart": lambda one: setattr(one.mlp.down_proj, "data", one.mlp.down_proj.data.mT.contiguous().mT),
    "a bias of another dtype": lambda one: setattr(
        one.mlp.down_proj, "bias", nn.Parameter(torch.zeros(32, dtype=torch.float64))
    ),
}


@pytest.mark.parametrize("change", FEW_BITS_CHANGES)
def test_so_is_one_of_few_bits(change: str) -> None:
    one = of_few_bits(qk_norm=True)
    assert plain(one)
    FEW_BITS_CHANGES[change](one)
    assert plain(one) is None and plain(one) is None


@pytest.mark.parametrize("name", ["data", "scales", "zeros"])
def test_new_weights_of_few_bits_are_taken(name: str) -> None:
    one = of_few_bits()
    before = one.plain.of(one)
    projection = one.mlp.gate_up_proj
    assert before and isinstance(projection, QuantisedLinear)
    new = getattr(projection, name).clone()
    setattr(projection, name, new)
    found = one.plain.of(one)
    assert found and found is not before
    taken = {"data": weights(found).gate_up, "scales": bits(found).scales[2], "zeros": bits(found).zeros[2]}
    assert taken[name] is new


def test_a_copy_has_its_own_weights_and_a_layer_is_freed_when_nobody_holds_it() -> None:
    one = layer()
    assert plain(one)
    other = copy.deepcopy(one)
    found = other.plain.of(other)
    assert found and weights(found).qkv is other.self_attn.qkv_proj.weight is not one.self_attn.qkv_proj.weight
    gc.disable()
    try:
        gone = weakref.ref(one.mlp.down_proj)
        del one, found
        assert gone() is None
    finally:
        gc.enable()


def test_layers_that_are_more_are_never_plain() -> None:
    experts = Experts(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    latent = Latent(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    for features in ({"experts": experts}, {"latent": latent}, {"post_norms": True}):
        assert plain(layer(**features)) is None


ROTARIES = {
    "plain": Rotary(),
    "in part": Rotary(partial=0.5),
    "yarn": Rotary(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
}


@pytest.mark.parametrize("kind", ROTARIES)
def test_angles_from_the_table_have_the_bits_of_those_computed(kind: str) -> None:
    rotary = ROTARIES[kind]
    for positions in ([0], [7], [TABLE - 1], [TABLE], [3, TABLE + 5, 1], [*range(300)]):
        place = torch.tensor(positions)
        with torch.no_grad():
            found = rotary_angles(place, rotary, 48)
        for a, b in zip(found, _angles(place, rotary, 48), strict=True):
            assert torch.equal(a, b), positions


def test_where_no_kernel_can_be_a_step_looks_for_no_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Paged:
        pages = print

        def attend(self, layer: int, query: torch.Tensor, *_: object) -> torch.Tensor:
            return query

    looked: list[object] = []
    monkeypatch.setattr(PlainLayer, "of", lambda _, layer: looked.append(layer))
    config = ModelConfig("qwen3", 64, 32, 48, 2, 4, 2, 16)
    for device in ("cpu", "meta"):
        looked.clear()
        model = Decoder(config).to(device)
        model.run_layers(torch.zeros(3, 32, device=device), torch.arange(3, device=device), Paged())  # type: ignore[arg-type]
        assert len(looked) == (2 if device == "cpu" else 0)


def test_on_a_device_frequencies_are_brought_once_and_none_of_a_dry_run_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    brought: list[int] = []
    rotary = Rotary(rope_theta=12345.0)  # its own, so that nobody brought them before
    plain = Rotary.frequencies
    monkeypatch.setattr(Rotary, "frequencies", lambda self, width: brought.append(width) or plain(self, width))
    with FakeTensorMode():
        rotary_angles(torch.zeros(3, dtype=torch.int64, device="meta"), rotary, 16)
    for _ in range(2):
        found = rotary_angles(torch.zeros(3, dtype=torch.int64, device="meta"), rotary, 16)
        assert type(found[0]) is torch.Tensor
    assert brought == [16, 16]  # the dry run's, and those that are kept
