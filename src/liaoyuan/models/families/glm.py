"""GLM-4 (arXiv 2406.12793) and GLM-4.5 (arXiv 2508.06471): half-rotated heads; the latter DeepSeek's experts."""

from typing import Any

from torch import Tensor

from liaoyuan.models.config import ModelConfig
from liaoyuan.models.families.deepseek import balanced_by_bias, expert_parts, expert_words
from liaoyuan.models.families.family import Family, Values
from liaoyuan.models.rotary import Rotary
from liaoyuan.models.stored import Part, common_parts, gate_above_up

HALF = Rotary(partial=0.5)
HALF_INTERLEAVED = Rotary(partial=0.5, interleaved=True)


def _features(values: Values, config: ModelConfig) -> dict[str, Any]:
    sandwiched = config.model_type == "glm4"
    return {"qkv_bias": bool(values.get("attention_bias", sandwiched)), "post_norms": sandwiched}


def _parts(name: str, ours: Tensor, config: ModelConfig) -> list[Part]:
    if ".gate_up_proj." in name:
        return gate_above_up(f"model.{name}", ours)
    return common_parts(name, ours, config)


def _moe(values: Values, config: ModelConfig) -> dict[str, Any]:
    return {
        "qkv_bias": bool(values.get("attention_bias")),
        "qk_norm": bool(values.get("use_qk_norm")),
        "experts": balanced_by_bias(values),
        "further_normed": True,
    }


def _moe_words(config: ModelConfig) -> dict[str, Any]:
    return expert_words(config) | {"attention_bias": config.qkv_bias, "use_qk_norm": config.qk_norm}


def _words(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias}


GLM = Family("glm", "GlmForCausalLM", _features, _words, _parts, rotary=HALF_INTERLEAVED)
GLM4 = Family("glm4", "Glm4ForCausalLM", _features, _words, _parts, rotary=HALF_INTERLEAVED)
GLM4_MOE = Family(
    *("glm4_moe", "Glm4MoeForCausalLM", _moe, _moe_words, expert_parts),
    predicts_further=True,
    rotary=HALF,
    rms_norm_eps=1e-5,
)
