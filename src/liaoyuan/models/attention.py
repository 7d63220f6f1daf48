"""Attention layers: grouped-query and latent. Both ask the attention context which tokens see which."""

import math

import torch
from torch import Tensor, nn

from liaoyuan.models.config import Latent, ModelConfig
from liaoyuan.models.context import AttentionContext, Pattern
from liaoyuan.models.layers import Linear, RMSNorm
from liaoyuan.ops import latent_rotary, split_rotary


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding, optional QK-norm and optional sinks.

    `qkv_proj` holds for each key-value head its query heads, its key and its value.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.eps = layer, config.head_dim, config.rms_norm_eps
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.scale = config.rotary.score_scale / math.sqrt(config.head_dim)
        self.window = config.window(layer)
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.qkv_proj = Linear(config.hidden_size, heads * config.head_dim, bias=config.qkv_bias)
        width = config.num_attention_heads * config.head_dim
        self.o_proj = Linear(width, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads)) if config.attention_sinks else None

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, context: AttentionContext) -> Tensor:
        """x [N, H], cosine and sine [N, D / 2] -> [N, H]."""
        qkv = self.qkv_proj(x)
        query, key, value = split_rotary(
            qkv,
            cosine,
            sine,
            qkv.shape[1] // ((self.groups + 2) * self.head_dim),
            self.head_dim,
            self.q_norm.weight if self.qk_norm else None,
            self.k_norm.weight if self.qk_norm else None,
            self.eps,
        )
        pattern = Pattern(self.scale, self.window, self.sinks)
        return self.o_proj(context.attend(self.layer, query, key, value, pattern).flatten(1))


class LatentAttention(nn.Module):
    """Multi-head latent attention, keys and values expanded to heads; see `Latent`."""

    def __init__(self, config: ModelConfig, latent: Latent, layer: int) -> None:
        super().__init__()
        self.layer, self.latent, self.eps = layer, latent, config.rms_norm_eps
        self.scale = config.rotary.score_scale / math.sqrt(config.head_dim)
        self.window = config.window(layer)
        hidden, heads, query = config.hidden_size, config.num_attention_heads, latent.q_lora_rank
        key, value = latent.kv_lora_rank, latent.v_head_dim
        if query is None:
            self.q_proj = Linear(hidden, heads * config.head_dim, bias=False)
        else:
            self.q_a_proj = Linear(hidden, query, bias=latent.bias)
            self.q_a_layernorm = RMSNorm(query, LATENT_EPS)
            self.q_b_proj = Linear(query, heads * config.head_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden, key + latent.qk_rope_head_dim, bias=latent.bias)
        self.kv_a_layernorm = RMSNorm(key, LATENT_EPS)
        self.kv_b_proj = Linear(key, heads * (latent.qk_nope_head_dim + value), bias=False)
        self.o_proj = Linear(heads * value, hidden, bias=config.output_bias)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, context: AttentionContext) -> Tensor:
        """x [N, H], cosine and sine [N, qk_rope_head_dim / 2] -> [N, H]."""
        latent = self.latent
        query = self._query(x)
        compressed, shared = self.kv_a_proj_with_mqa(x).split([latent.kv_lora_rank, latent.qk_rope_head_dim], 1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(compressed.contiguous()))
        heads = query.shape[1] // (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
        query, key, value = latent_rotary(query, expanded, shared, cosine, sine, heads)
        pattern = Pattern(self.scale, self.window)
        return self.o_proj(context.attend(self.layer, query, key, value, pattern).flatten(1))

    def _query(self, x: Tensor) -> Tensor:
        """x [N, H] -> [N, Hq * D]."""
        if self.latent.q_lora_rank is None:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))


LATENT_EPS = 1e-6  # DeepSeek's models use it whatever their rms_norm_eps says


def attention_layer(config: ModelConfig, layer: int) -> nn.Module:
    """Return the attention layer that `config` describes."""
    return LatentAttention(config, config.latent, layer) if config.latent else Attention(config, layer)
