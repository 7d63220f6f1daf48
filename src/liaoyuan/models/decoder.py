"""The decoder: one model code for training, scoring, prefill and decode (Llama, Qwen2, Qwen3 and a mixture of experts).

A batch is flat: `tokens[N]`, `positions[N]` and an attention context that says which tokens see which.
Projections that read the same input are one matrix: `qkv_proj` holds for each key-value head its query heads,
its key and its value; `gate_up_proj` alternates gate and up rows. So a contiguous cut of the rows is a legal
shard of either.
"""

import math

import torch
from torch import Tensor, nn

from liaoyuan.models.config import ModelConfig
from liaoyuan.models.context import AttentionContext
from liaoyuan.models.experts import MixtureOfExperts
from liaoyuan.ops import add_rms_norm, linear, rms_norm, split_rotary, swiglu, token_log_prob


class RMSNorm(nn.Module):
    """The weight of a normalisation; the layers pass it to the operator that they need."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(residual + x, norm(residual + x))`."""
        return add_rms_norm(residual, x, self.weight, self.eps)


class Linear(nn.Linear):
    """A projection by the operator of this package."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding and optional QK-norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.eps = layer, config.head_dim, config.rms_norm_eps
        self.num_key_value_heads = config.num_key_value_heads
        self.scale = 1.0 / math.sqrt(config.head_dim)
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.qkv_proj = Linear(config.hidden_size, heads * config.head_dim, bias=config.qkv_bias)
        width = config.num_attention_heads * config.head_dim
        self.o_proj = Linear(width, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, context: AttentionContext) -> Tensor:
        """x [N, H], cosine and sine [N, D / 2] -> [N, H]."""
        query_norm = self.q_norm.weight if self.qk_norm else None
        key_norm = self.k_norm.weight if self.qk_norm else None
        query, key, value = split_rotary(
            self.qkv_proj(x),
            cosine,
            sine,
            self.num_key_value_heads,
            self.head_dim,
            query_norm,
            key_norm,
            self.eps,
        )
        return self.o_proj(context.attend(self.layer, query, key, value, self.scale).flatten(1))


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, H] -> [N, H]."""
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Layer(nn.Module):
    """One pre-norm decoder layer. The residual stream is handed on apart, so that adding and norming are one pass."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module = MixtureOfExperts(config) if config.num_experts else FeedForward(config)

    def forward(
        self, residual: Tensor, x: Tensor | None, cosine: Tensor, sine: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream and this layer's last addend to it, both [N, H]; x is the previous addend."""
        norm = self.input_layernorm
        residual, x = norm.add(residual, x) if x is not None else (residual, norm(residual))
        x = self.self_attn(x, cosine, sine, context)
        residual, x = self.post_attention_layernorm.add(residual, x)
        return residual, self.mlp(x)


class Decoder(nn.Module):
    """A decoder-only language model; weights are uninitialised until `initialise` or a load."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.to(config.torch_dtype)

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, H] (the embedding itself if the two are tied)."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        context: AttentionContext,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return the log-probability of `targets`, or logits if there are none.

        Args:
            tokens: int64 [N]; positions: int64 [N], each token's place in its own document.
            context: says which tokens see which.
            targets: int64 [N], the token to score after each token; gives fp32 [N].
            rows: int64 [R], the rows whose logits are wanted (all if None); gives [R, V] in the model's dtype.
        """
        cosine, sine = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        residual, x = self.embed_tokens(tokens), None
        for layer in self.layers:
            residual, x = layer(residual, x, cosine, sine, context)
        assert x is not None
        if targets is None and rows is not None:
            residual, x = residual[rows], x[rows]
        _, hidden = self.norm.add(residual, x)
        if targets is not None:
            return token_log_prob(hidden, self.head_weight, targets)
        return linear(hidden, self.head_weight)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, fp32 [N, D / 2], of the rotary angles of positions [N]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponent)
    return angles.cos(), angles.sin()


def initialise(model: Decoder, seed: int) -> Decoder:
    """Fill the weights: normal with `initializer_range`, smaller by 1 / sqrt(2 L) where a layer writes to the
    residual stream (Radford et al. 2019, sec. 2.3); norms one, biases zero. Drawn in fp32 on the CPU, so any device
    gets the same.
    """
    generator = torch.Generator().manual_seed(seed)
    deviation = model.config.initializer_range
    residual_scale = 1.0 / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                scale = residual_scale if "o_proj" in name or "down_proj" in name else 1.0
                noise = torch.randn(parameter.shape, generator=generator) * deviation * scale
                parameter.copy_(noise)
    return model
