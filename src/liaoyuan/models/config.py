"""What a decoder is made of. The model's config is the Hugging Face `config.json`; `families/` translates each
family's own words to and from these, so that the decoder itself knows features and no families.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models.rotary import PLAIN_ROTARY, Rotary

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, sec. 2.1).

    Keys and values come from a latent of `kv_lora_rank`, queries from one of `q_lora_rank` (None: directly). A head's
    key has `qk_nope_head_dim` dimensions of its own and `qk_rope_head_dim` rotated ones that all heads share.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    bias: bool = False  # of the projections to the latents


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the feed-forward layers, dropless.

    scoring: "softmax" over all experts, or "sigmoid" of each with a balancing bias that only takes part in the choice
    (DeepSeek-AI 2024, arXiv 2412.19437, sec. 2.1.2). With `n_group` > 1 the experts of the best `topk_group` groups
    alone can be chosen; a group's score is the sum of its best `group_best` experts.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = True
    scoring: str = "softmax"
    n_group: int = 1
    topk_group: int = 1
    group_best: int = 1
    routed_scaling_factor: float = 1.0
    shared_intermediate_size: int = 0  # of the expert that every token passes (0: none)
    dense_layers: tuple[int, ...] = ()  # that have an ordinary feed-forward layer instead
    bias: bool = False  # of router and experts
    swiglu_limit: float = 0.0  # gpt-oss: clamp of the gate and its shifted SwiGLU (0: plain SwiGLU)
    swiglu_alpha: float = 1.702


@dataclass(frozen=True)
class ModelConfig:
    """A decoder, under Hugging Face's names where they agree; `dtype` is a key of `DTYPES`.

    `head_dim` is that of queries and keys. `model_type` says in which words it is written; all else is features.
    """

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
    rotary: Rotary = PLAIN_ROTARY
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False  # a norm also after attention and feed-forward layer (GLM-4)
    sliding_window: int | None = None  # tokens that a token of a sliding layer sees, itself included
    full_layers: tuple[int, ...] = ()  # that see everything although there is a sliding window
    attention_sinks: bool = False  # a learned score per head that takes part in the softmax (gpt-oss)
    latent: Latent | None = None
    experts: Experts | None = None
    further_layers: int = 0  # for predicting the token after the next; only read where they are asked for
    further_normed: bool = False  # the norm before the head is also taken of what such a layer hands to the next
    initializer_range: float = 0.02
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def value_head_dim(self) -> int:
        return self.latent.v_head_dim if self.latent else self.head_dim

    def window(self, layer: int) -> int | None:
        """Return how many tokens a token of this layer sees, itself included (None: all before it)."""
        return None if layer in self.full_layers else self.sliding_window

    def is_sparse(self, layer: int) -> bool:
        """Return whether the layer's feed-forward part is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def num_parameters(self, embedding: bool = True) -> int:
        """Return the number of weights (without the token embedding and head if `embedding` is False; further layers,
        which take no part in the answers, are not counted).
        """
        layers = sum(self._attention() + self._feed_forward(n) + self._norms() for n in range(self.num_hidden_layers))
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return layers + self.hidden_size + (tables if embedding else 0)

    def flops_per_token(self, context: float) -> float:
        """Return the FLOPs of one token's forward pass that attends to `context` tokens on average.

        Two per weight and product (embedding look-up is free), and 2 * context * Hq * (D of keys + D of values) per
        layer of attention: the usual model-FLOPs count (Chowdhery et al. 2022, arXiv 2204.02311, app. B). Experts
        that a token does not reach are not counted. Training costs three times it.
        """
        layers = range(self.num_hidden_layers)
        weights = self.num_parameters(embedding=False) + self.vocab_size * self.hidden_size
        if self.experts:
            idle = self.experts.num_experts - self.experts.num_experts_per_tok
            weights -= sum(map(self.is_sparse, layers)) * idle * self._expert()
        seen = sum(min(context, self.window(layer) or context) for layer in layers)
        return 2.0 * weights + 2.0 * seen * self.num_attention_heads * (self.head_dim + self.value_head_dim)

    def layer_products(self, layer: int) -> float:
        """Return the FLOPs of one token's matrix products in one layer, without the scores of attention."""
        active = self._attention() + self._feed_forward(layer)
        if self.experts and self.is_sparse(layer):
            active -= (self.experts.num_experts - self.experts.num_experts_per_tok) * self._expert()
        return 2.0 * active

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `config.json` that transformers reads."""
        from liaoyuan.models.families import FAMILIES  # they are built of what this file defines

        return FAMILIES[self.model_type].write(self)

    def _attention(self) -> int:
        hidden, heads = self.hidden_size, self.num_attention_heads
        output = hidden * (heads * self.value_head_dim + self.output_bias)
        if self.latent:
            return self._latent_attention(self.latent) + output
        width = (heads + 2 * self.num_key_value_heads) * self.head_dim
        extra = (2 * self.head_dim if self.qk_norm else 0) + (heads if self.attention_sinks else 0)
        return width * (hidden + self.qkv_bias) + output + extra

    def _latent_attention(self, latent: Latent) -> int:
        heads, query, key = self.num_attention_heads, latent.q_lora_rank, latent.kv_lora_rank
        count = (self.hidden_size + latent.bias) * (key + latent.qk_rope_head_dim) + key
        count += key * heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        if query is None:
            return count + self.hidden_size * heads * self.head_dim
        return count + (self.hidden_size + latent.bias + 1) * query + query * heads * self.head_dim

    def _feed_forward(self, layer: int) -> int:
        if not self.is_sparse(layer) or self.experts is None:
            width = self.intermediate_size
            return 3 * self.hidden_size * width + (2 * width + self.hidden_size if self.mlp_bias else 0)
        e = self.experts
        router = e.num_experts * (self.hidden_size + e.bias)
        return router + e.num_experts * self._expert() + 3 * self.hidden_size * e.shared_intermediate_size

    def _expert(self) -> int:
        assert self.experts is not None
        width = self.experts.moe_intermediate_size
        return 3 * self.hidden_size * width + (2 * width + self.hidden_size if self.experts.bias else 0)

    def _norms(self) -> int:
        return (4 if self.post_norms else 2) * self.hidden_size


def read_config(folder: Path, further: bool = False) -> ModelConfig:
    """Read `folder/config.json`.

    further: with the layers for predicting the token after the next, if it has them.

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
    return config_from_dict(values, str(path), further)


def config_from_dict(values: Mapping[str, Any], where: str = "config.json", further: bool = False) -> ModelConfig:
    """Check the contents of a `config.json` and return them as a `ModelConfig`; see `read_config`."""
    from liaoyuan.models.families import family_of  # they are built of what this file defines

    return family_of(values, where).read(values, where, further)


def with_dtype(config: ModelConfig, dtype: torch.dtype) -> ModelConfig:
    """Return the config with another dtype of the weights."""
    return replace(config, dtype=next(name for name, value in DTYPES.items() if value == dtype))
