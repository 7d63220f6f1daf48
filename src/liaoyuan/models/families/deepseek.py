"""DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437): latent attention, shared and group-limited experts."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models.config import Experts, Latent, ModelConfig
from liaoyuan.models.families.family import Family, Values
from liaoyuan.models.rotary import Rotary, head_order
from liaoyuan.models.stored import Part, common_parts, experts


def _latent(values: Values) -> Latent:
    return Latent(
        kv_lora_rank=values["kv_lora_rank"],
        qk_nope_head_dim=values["qk_nope_head_dim"],
        qk_rope_head_dim=values["qk_rope_head_dim"],
        v_head_dim=values["v_head_dim"],
        q_lora_rank=values.get("q_lora_rank"),
        bias=bool(values.get("attention_bias")),
    )


def _features(values: Values, config: ModelConfig) -> dict[str, Any]:
    latent = _latent(values)
    return {
        "latent": latent,
        "head_dim": latent.qk_nope_head_dim + latent.qk_rope_head_dim,
        "num_key_value_heads": config.num_attention_heads,
        "output_bias": latent.bias,
    }


def shared_and_routed(values: Values) -> dict[str, Any]:
    """Return the arguments of `Experts` that DeepSeek's words give, for its heirs too."""
    width = values["moe_intermediate_size"]
    return {
        "num_experts": values["n_routed_experts"],
        "num_experts_per_tok": values["num_experts_per_tok"],
        "moe_intermediate_size": width,
        "routed_scaling_factor": values.get("routed_scaling_factor", 1.0),
        "shared_intermediate_size": width * (values.get("n_shared_experts") or 0),
        "dense_layers": tuple(range(values.get("first_k_dense_replace") or 0)),
    }


def balanced_by_bias(values: Values) -> Experts:
    """Return DeepSeek-V3's experts: sigmoid scores, balancing bias, groups scored by their best two."""
    return Experts(
        **shared_and_routed(values),
        norm_topk_prob=bool(values.get("norm_topk_prob", True)),
        scoring="sigmoid",
        n_group=values.get("n_group") or 1,
        topk_group=values.get("topk_group") or 1,
        group_best=2,
    )


def _v2(values: Values, config: ModelConfig) -> dict[str, Any]:
    if values.get("norm_topk_prob"):
        raise LiaoyuanError("deepseek_v2 with norm_topk_prob is not supported: its implementations disagree on it.")
    limited = values.get("topk_method") == "group_limited_greedy"
    layer = Experts(
        **shared_and_routed(values),
        norm_topk_prob=False,
        n_group=values["n_group"] if limited else 1,
        topk_group=values["topk_group"] if limited else 1,
    )
    return {**_features(values, config), "experts": layer}


def _v3(values: Values, config: ModelConfig) -> dict[str, Any]:
    rotary = replace(config.rotary, interleaved=bool(values.get("rope_interleave", True)))
    return {**_features(values, config), "experts": balanced_by_bias(values), "rotary": rotary}


def expert_words(config: ModelConfig) -> dict[str, Any]:
    """Return the words for `shared_and_routed`."""
    e = config.experts
    assert e
    return {
        "n_routed_experts": e.num_experts,
        "num_experts_per_tok": e.num_experts_per_tok,
        "moe_intermediate_size": e.moe_intermediate_size,
        "n_shared_experts": e.shared_intermediate_size // e.moe_intermediate_size,
        "first_k_dense_replace": len(e.dense_layers),
        "routed_scaling_factor": e.routed_scaling_factor,
        "norm_topk_prob": e.norm_topk_prob,
        "n_group": e.n_group,
        "topk_group": e.topk_group,
    }


def _words(config: ModelConfig) -> dict[str, Any]:
    latent, e = config.latent, config.experts
    assert latent and e
    words = expert_words(config) | {
        "kv_lora_rank": latent.kv_lora_rank,
        "q_lora_rank": latent.q_lora_rank,
        "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "head_dim": latent.qk_rope_head_dim,
        "attention_bias": latent.bias,
    }
    if config.model_type == "deepseek_v3":
        return words | {"rope_interleave": config.rotary.interleaved}
    return words | {"topk_method": "group_limited_greedy" if e.n_group > 1 else "greedy"}


def expert_parts(name: str, ours: Tensor, config: ModelConfig) -> list[Part]:
    """Return the parts of experts stored one by one, and of all else as usual."""
    if ".experts." not in name:
        return common_parts(name, ours, config)
    names = ("gate_proj", "up_proj") if "gate_up_proj" in name else ("down_proj",)
    return experts(f"model.{name.rsplit('.', 1)[0]}", ours, names)


def _parts(name: str, ours: Tensor, config: ModelConfig) -> list[Part]:
    latent = config.latent
    assert latent
    rotated = head_order(config.rotary, latent.qk_rope_head_dim)
    if rotated is None or not any(part in name for part in (".q_proj.", ".q_b_proj.", ".kv_a_proj_with_mqa.")):
        return expert_parts(name, ours, config)
    own = latent.kv_lora_rank if "kv_a" in name else latent.qk_nope_head_dim
    order = [*range(own), *(own + place for place in rotated)]
    heads = ours.view(-1, len(order), *ours.shape[1:])
    return [Part(f"model.{name}", heads, ours.shape, order, 1)]


DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", _v2, _words, _parts, rotary=Rotary(interleaved=True))
DEEPSEEK_V3 = Family(
    "deepseek_v3", "DeepseekV3ForCausalLM", _v3, _words, _parts, predicts_further=True, rotary=Rotary(interleaved=True)
)
