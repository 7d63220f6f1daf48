"""Mixtral (arXiv 2401.04088): Mistral with eight experts per layer, two of them for each token."""

from typing import Any

from torch import Tensor

from liaoyuan.models.config import Experts, ModelConfig
from liaoyuan.models.families.family import Family, Values, sliding
from liaoyuan.models.rotary import Rotary
from liaoyuan.models.stored import Part, common_parts, experts, whole


def _features(values: Values, config: ModelConfig) -> dict[str, Any]:
    count = values.get("num_local_experts", 8)
    layer = Experts(count, values.get("num_experts_per_tok", 2), config.intermediate_size)
    return {"experts": layer, **sliding(values)}


def _words(config: ModelConfig) -> dict[str, Any]:
    assert config.experts
    return {
        "num_local_experts": config.experts.num_experts,
        "num_experts_per_tok": config.experts.num_experts_per_tok,
        "sliding_window": config.sliding_window,
    }


def _parts(name: str, ours: Tensor, config: ModelConfig) -> list[Part]:
    if ".mlp." not in name:
        return common_parts(name, ours, config)
    block = f"model.{name.split('.mlp.')[0]}.block_sparse_moe"
    if name.endswith(".gate.weight"):
        return [whole(f"{block}.gate.weight", ours)]
    return experts(f"{block}.experts", ours, ("w1", "w3") if "gate_up_proj" in name else ("w2",))


MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM", _features, _words, _parts, rotary=Rotary(rope_theta=1e6), rms_norm_eps=1e-5
)
