"""Qwen2 and 2.5 (arXiv 2412.15115), Qwen3 and Qwen3-MoE (arXiv 2505.09388)."""

from typing import Any

from torch import Tensor

from liaoyuan.models.config import Experts, ModelConfig
from liaoyuan.models.families.family import Family, Values, layer_types, sliding_by_type
from liaoyuan.models.stored import Part, common_parts, experts


def _windows(values: Values, config: ModelConfig) -> dict[str, Any]:
    """Layers from `max_window_layers` on have the sliding window."""
    if not values.get("use_sliding_window"):
        return {}
    first = values.get("max_window_layers", 28)
    kinds = ["sliding_attention" if n >= first else "full_attention" for n in range(config.num_hidden_layers)]
    return sliding_by_type({"sliding_window": 4096, **values}, config, kinds)


def _window_words(config: ModelConfig) -> dict[str, Any]:
    if config.sliding_window is None:
        return {"use_sliding_window": False}
    words = {"use_sliding_window": True, "sliding_window": config.sliding_window, "layer_types": layer_types(config)}
    return words | {"max_window_layers": len(config.full_layers)}


def _qwen3(values: Values, config: ModelConfig) -> dict[str, Any]:
    bias = bool(values.get("attention_bias"))
    features = {"qk_norm": True, "qkv_bias": bias, "output_bias": bias}
    return features | _windows(values, config) | ({} if values.get("head_dim") else {"head_dim": 128})


def _qwen3_words(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, **_window_words(config)}


def _moe(values: Values, config: ModelConfig) -> dict[str, Any]:
    step = values.get("decoder_sparse_step", 1)
    dense = values.get("mlp_only_layers") or []
    layer = Experts(
        values.get("num_experts") or values["num_local_experts"],  # the latter since transformers 5
        values["num_experts_per_tok"],
        values["moe_intermediate_size"],
        norm_topk_prob=bool(values.get("norm_topk_prob")),
        dense_layers=tuple(n for n in range(config.num_hidden_layers) if n in dense or (n + 1) % step),
    )
    features = _qwen3({"head_dim": config.head_dim, **values, "use_sliding_window": False}, config)
    window = values.get("sliding_window") if values.get("use_sliding_window") else None
    return features | {"experts": layer, "sliding_window": window}


def _moe_words(config: ModelConfig) -> dict[str, Any]:
    e = config.experts
    assert e
    return {
        "attention_bias": config.qkv_bias,
        "num_experts": e.num_experts,
        "num_experts_per_tok": e.num_experts_per_tok,
        "moe_intermediate_size": e.moe_intermediate_size,
        "norm_topk_prob": e.norm_topk_prob,
        "mlp_only_layers": list(e.dense_layers),
        "decoder_sparse_step": 1,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
    }


def _moe_parts(name: str, ours: Tensor, config: ModelConfig) -> list[Part]:
    if ".experts." not in name:
        return common_parts(name, ours, config)
    prefix = f"model.{name.rsplit('.', 1)[0]}"
    return experts(prefix, ours, ("gate_proj", "up_proj") if "gate_up_proj" in name else ("down_proj",))


def _qwen2(values: Values, config: ModelConfig) -> dict[str, Any]:
    return {"qkv_bias": True, **_windows(values, config)}


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _qwen2, _window_words)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _qwen3, _qwen3_words)
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _moe, _moe_words, _moe_parts)
