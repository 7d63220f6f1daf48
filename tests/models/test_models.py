"""The decoder's own promises: experts, counts, initialisation, and that it knows nothing of distribution."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from liaoyuan import ops
from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig, config_from_dict, initialise, packed_context, read_config
from liaoyuan.models.config import Experts, Latent
from tests.conftest import randomised


@pytest.fixture
def expert_config(tiny_config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(tiny_config, model_type="qwen3_moe", experts=Experts(5, 2, 24))


def dense_mixture(layer: nn.Module, x: Tensor) -> Tensor:
    """Every expert on every token, weighted by the router: the definition, without any dispatch."""
    scores = (x @ layer.gate.weight.t()).softmax(-1)
    kept = torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0) * scores
    kept = kept / kept.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in range(5):
        gate, up = (x @ layer.experts.gate_up_proj[expert].t()).unflatten(-1, (-1, 2)).unbind(-1)
        out += kept[:, expert, None] * ((nn.functional.silu(gate) * up) @ layer.experts.down_proj[expert].t())
    return out


def test_experts_are_the_weighted_sum_and_drop_no_token(expert_config: ModelConfig) -> None:
    layer = randomised(expert_config, 3).layers[0].mlp
    x = torch.randn(40, 32, requires_grad=True)
    x[1:30].data.copy_(x[0].data)  # thirty equal tokens crowd two experts
    out = layer(x)
    assert torch.allclose(out, dense_mixture(layer, x), atol=1e-5)
    gradient = torch.autograd.grad(out.square().sum(), x)[0]
    expected = torch.autograd.grad(dense_mixture(layer, x).square().sum(), x)[0]
    assert torch.allclose(gradient, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_experts_make_of_a_token_does_not_depend_on_the_tokens_beside_it(
    expert_config: ModelConfig, dtype: torch.dtype
) -> None:
    if any(row.kernel != "native" for row in ops.status() if row.operator in ("route", "grouped_linear", "swiglu")):
        pytest.skip("torch's own products make no such promise")
    layer = initialise(Decoder(expert_config), 0).layers[0].mlp.to(dtype)
    x = torch.randn(70, expert_config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = layer(x)
    for first, last in ((0, 1), (3, 5), (20, 69)):
        assert torch.equal(layer(x[first:last]), whole[first:last])


def test_experts_survive_a_round_trip(expert_config: ModelConfig, tmp_path: Path) -> None:
    model = randomised(expert_config, 4)
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"qk_norm": False, "qkv_bias": True, "tie_word_embeddings": False},
        {"output_bias": True, "mlp_bias": True, "post_norms": True, "attention_sinks": True},
        {"experts": Experts(5, 2, 24, bias=True, shared_intermediate_size=16, dense_layers=(1,))},
        {"latent": Latent(12, 10, 6, 14, q_lora_rank=20, bias=True), "num_key_value_heads": 4},
        {"latent": Latent(12, 10, 6, 14), "num_key_value_heads": 4},
    ],
)
def test_parameters_are_counted_right(tiny_config: ModelConfig, features: dict) -> None:
    config = dataclasses.replace(tiny_config, **features)
    assert config.num_parameters() == sum(p.numel() for p in Decoder(config).parameters())


def test_flops_count_what_torch_counts(tiny_config: ModelConfig) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = initialise(Decoder(tiny_config), 0)
    positions, context = packed_context([64])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(64, dtype=torch.long), positions, context)
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    weights_only = tiny_config.flops_per_token(0) * 64
    assert abs(products - weights_only) / weights_only < 0.02  # the count includes the norms' few weights


def test_same_seed_same_weights_whatever_the_dtype(tiny_config: ModelConfig) -> None:
    wide = initialise(Decoder(tiny_config), 7)
    narrow = initialise(Decoder(dataclasses.replace(tiny_config, dtype="bfloat16")), 7)
    for a, b in zip(wide.parameters(), narrow.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_distribution_never_appears_in_the_model() -> None:
    source = Path(__file__).parents[2] / "src" / "liaoyuan" / "models"
    assert not [path for path in source.glob("*.py") if "torch.distributed" in path.read_text()]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "qwen33"}, "did you mean 'qwen3'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4}}, "rotary scaling 'longrope'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, "must divide"),
        ({"hidden_size": "big"}, "'hidden_size' must be a whole number"),
        ({"dtype": "int3"}, "dtype 'int3'"),
    ],
)
def test_a_config_that_we_cannot_honour_is_refused(tiny_config: ModelConfig, change: dict, said: str) -> None:
    with pytest.raises(LiaoyuanError, match=said):
        config_from_dict(tiny_config.to_dict() | change)


def test_torn_config_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(LiaoyuanError, match="not a model folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qw')
    with pytest.raises(LiaoyuanError, match="not valid JSON"):
        read_config(tmp_path)


def test_weights_that_are_torn_missing_or_foreign_are_refused(tiny_model: Decoder, tmp_path: Path) -> None:
    save_model(tiny_model, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    whole = weights.read_bytes()
    for torn in (whole[: len(whole) // 2], whole[:7], b"", b"garbage" * 100):
        weights.write_bytes(torn)
        with pytest.raises(LiaoyuanError, match="truncated or corrupt"):
            load_model(tmp_path / "m")
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for change, said in [
        ({"num_hidden_layers": 3}, "lack 'model.layers.2"),
        ({"num_hidden_layers": 1}, "which a qwen3 model"),
        ({"intermediate_size": 64}, "shape"),
    ]:
        (tmp_path / "m" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(LiaoyuanError, match=said):
            load_model(tmp_path / "m")
    weights.unlink()
    with pytest.raises(LiaoyuanError, match="has no weights"):
        load_model(tmp_path / "m")


def test_sharded_weights_load(tiny_model: Decoder, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_model(tiny_model, tmp_path / "one")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for name, value in load_model(tmp_path / "many").state_dict().items():
        assert torch.equal(value, tiny_model.state_dict()[name])
