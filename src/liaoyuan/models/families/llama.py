"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783) and Mistral (arXiv 2310.06825)."""

from typing import Any

from liaoyuan.models.config import ModelConfig
from liaoyuan.models.families.family import Family, Values, sliding


def _features(values: Values, config: ModelConfig) -> dict[str, Any]:
    bias = bool(values.get("attention_bias"))
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(values.get("mlp_bias"))}


def _words(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family("llama", "LlamaForCausalLM", _features, _words)

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    features=lambda values, config: sliding(values, default=4096),
    words=lambda config: {"sliding_window": config.sliding_window},
)
