"""The model's config is the Hugging Face `config.json`: read it, check it, write it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from liaoyuan.errors import LiaoyuanError, nearest

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MOE_FAMILY = "liaoyuan_moe"  # a Qwen3 decoder whose feed-forward layers are experts; ours until its family comes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig:
    """What `config.json` says of a decoder, under Hugging Face's names; `dtype` is a key of `DTYPES`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True

    @property
    def qk_norm(self) -> bool:
        return self.model_type in ("qwen3", MOE_FAMILY)

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def output_bias(self) -> bool:
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def num_parameters(self, embedding: bool = True) -> int:
        """Return the number of weights (without the token embedding and head if `embedding` is False)."""
        head_width = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        attention = self.hidden_size * (head_width + self.num_attention_heads * self.head_dim)
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        if self.num_experts:
            feed_forward = self.hidden_size * self.num_experts * (3 * self.moe_intermediate_size + 1)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        biases = (head_width if self.qkv_bias else 0) + (self.hidden_size if self.output_bias else 0)
        layers = self.num_hidden_layers * (attention + feed_forward + norms + biases) + self.hidden_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return layers + (tables if embedding else 0)

    def flops_per_token(self, context: float) -> float:
        """Return the FLOPs of one token's forward pass that attends to `context` tokens on average.

        Two per weight and product (embedding look-up is free), and 4 * context * Hq * D per layer of attention:
        the usual model-FLOPs count (Chowdhery et al. 2022, arXiv 2204.02311, app. B). Training costs three times it.
        """
        weights = self.num_parameters(embedding=False) + self.vocab_size * self.hidden_size
        if self.num_experts:
            idle = self.num_experts - self.num_experts_per_tok
            weights -= self.num_hidden_layers * idle * 3 * self.hidden_size * self.moe_intermediate_size
        heads = self.num_attention_heads * self.head_dim
        return 2.0 * weights + 4.0 * context * heads * self.num_hidden_layers

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `config.json` that transformers reads."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["architectures"] = [FAMILIES.get(self.model_type, "LiaoyuanMoeForCausalLM")]
        values["hidden_act"] = "silu"
        if not self.num_experts:
            for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
                del values[name]
        return values


def read_config(folder: Path) -> ModelConfig:
    """Read `folder/config.json`.

    Raises:
        LiaoyuanError: the file is missing or torn, or the family or one of its features is not supported.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LiaoyuanError(f"{folder} is not a model folder: it has no config.json.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LiaoyuanError(f"{path} is not valid JSON: {error}.") from error
    return config_from_dict(values, str(path))


def config_from_dict(values: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Check the contents of a `config.json` and return them as a `ModelConfig`; see `read_config`."""
    family = values.get("model_type")
    known = [*FAMILIES, MOE_FAMILY]
    if family not in known:
        hint = nearest(str(family), known)
        raise LiaoyuanError(f"{where}: model_type '{family}' is not supported ({', '.join(known)} are){hint}")
    _refuse_unsupported(values, where)
    rope = values.get("rope_parameters") or {}
    chosen = {name: values[name] for name in ModelConfig.__dataclass_fields__ if values.get(name) is not None}
    heads = values["num_attention_heads"]
    chosen.setdefault("num_key_value_heads", heads)
    chosen.setdefault("head_dim", values["hidden_size"] // heads)
    chosen.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    chosen.setdefault("dtype", values.get("torch_dtype") or "float32")
    chosen["eos_token_id"] = _first(values.get("eos_token_id"))
    chosen["bos_token_id"] = _first(values.get("bos_token_id"))
    config = ModelConfig(**chosen)
    if config.dtype not in DTYPES:
        raise LiaoyuanError(f"{where}: dtype '{config.dtype}' is not one of {', '.join(DTYPES)}.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise LiaoyuanError(f"{where}: num_key_value_heads must divide num_attention_heads.")
    return config


def with_dtype(config: ModelConfig, dtype: torch.dtype) -> ModelConfig:
    """Return the config with another dtype of the weights."""
    return replace(config, dtype=next(name for name, value in DTYPES.items() if value == dtype))


def _refuse_unsupported(values: dict[str, Any], where: str) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        if not isinstance(values.get(name), int) or values[name] < 1:
            raise LiaoyuanError(f"{where}: '{name}' must be a whole number above 0 (it is {values.get(name)!r}).")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise LiaoyuanError(f"{where}: rotary scaling '{kind}' is not supported yet.")
    if values.get("use_sliding_window"):
        raise LiaoyuanError(f"{where}: sliding-window attention is not supported yet.")
    if values.get("hidden_act", "silu") != "silu":
        raise LiaoyuanError(f"{where}: hidden_act '{values['hidden_act']}' is not supported (silu is).")


def _first(value: int | list[int] | None) -> int | None:
    return value[0] if isinstance(value, list) else value
