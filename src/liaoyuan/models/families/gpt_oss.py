"""gpt-oss (arXiv 2508.10925): attention sinks, every other layer with a sliding window, clamped experts with biases."""

from typing import Any

from torch import Tensor

from liaoyuan.models.config import Experts, ModelConfig
from liaoyuan.models.families.family import Family, Values, layer_types, sliding_by_type
from liaoyuan.models.rotary import Rotary
from liaoyuan.models.stored import Part, common_parts, whole

YARN = Rotary(rope_theta=150000.0, rope_type="yarn", factor=32.0, original_max_position_embeddings=4096, truncate=False)


def _features(values: Values, config: ModelConfig) -> dict[str, Any]:
    layer = Experts(
        num_experts=values["num_local_experts"],
        num_experts_per_tok=values["num_experts_per_tok"],
        moe_intermediate_size=config.intermediate_size,
        bias=True,
        swiglu_limit=values.get("swiglu_limit", 7.0),
        swiglu_alpha=values.get("swiglu_alpha", 1.702),
    )
    bias = bool(values.get("attention_bias", True))
    kinds = ["full_attention" if n % 2 else "sliding_attention" for n in range(config.num_hidden_layers)]
    windows = sliding_by_type({"sliding_window": 128, **values}, config, kinds)
    return {"experts": layer, "attention_sinks": True, "qkv_bias": bias, "output_bias": bias, **windows}


def _words(config: ModelConfig) -> dict[str, Any]:
    e = config.experts
    assert e
    return {
        "num_local_experts": e.num_experts,
        "num_experts_per_tok": e.num_experts_per_tok,
        "swiglu_limit": e.swiglu_limit,
        "swiglu_alpha": e.swiglu_alpha,
        "attention_bias": config.qkv_bias,
        "sliding_window": config.sliding_window or 128,
        "layer_types": layer_types(config),
    }


def _parts(name: str, ours: Tensor, config: ModelConfig) -> list[Part]:
    theirs = f"model.{name}"
    if ".mlp.gate." in name:
        return [whole(theirs.replace(".gate.", ".router."), ours)]
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # stored as right factors of a product
        view = ours.transpose(1, 2)
        return [Part(theirs, view, view.shape)]
    return [whole(theirs, ours)] if ".experts." in name else common_parts(name, ours, config)


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", _features, _words, _parts, rotary=YARN, rms_norm_eps=1e-5)
