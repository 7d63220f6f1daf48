"""The decoder: one model code for training, scoring, prefill and decode, for every family.

A batch is flat: `tokens[N]`, `positions[N]` and an attention context that says which tokens see which.
Projections that read the same input are one matrix: `qkv_proj` holds for each key-value head its query heads,
its key and its value; `gate_up_proj` alternates gate and up rows. So a contiguous cut of the rows is a legal
shard of either.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from liaoyuan.models.attention import attention_layer
from liaoyuan.models.config import ModelConfig
from liaoyuan.models.context import AttentionContext
from liaoyuan.models.experts import MixtureOfExperts
from liaoyuan.models.layers import FeedForward, Linear, RMSNorm
from liaoyuan.models.plain import PlainLayer
from liaoyuan.models.rotary import rotary_angles
from liaoyuan.ops import Penalties, ReadLogits, layer_kernel, linear, logit_statistics


class Layer(nn.Module):
    """One pre-norm decoder layer. The residual stream is handed on apart, so that adding and norming are one pass."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = attention_layer(config, index)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp: nn.Module = FeedForward(hidden, config.intermediate_size, config.mlp_bias)
        if config.experts and config.is_sparse(index):
            self.mlp = MixtureOfExperts(config, config.experts)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.post_self_attn_layernorm = RMSNorm(hidden, eps)
            self.post_mlp_layernorm = RMSNorm(hidden, eps)
        self.plain = PlainLayer()

    def forward(
        self, residual: Tensor, x: Tensor | None, cosine: Tensor, sine: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream and this layer's last addend to it, both [N, H]; x is the previous addend."""
        norm = self.input_layernorm
        residual, x = norm.add(residual, x) if x is not None else (residual, norm(residual))
        x = self.self_attn(x, cosine, sine, context)
        if self.post_norms:
            x = self.post_self_attn_layernorm(x)
        residual, x = self.post_attention_layernorm.add(residual, x)
        x = self.mlp(x)
        return residual, self.post_mlp_layernorm(x) if self.post_norms else x


class FurtherLayer(nn.Module):
    """Predicts the token after the next, from the last layer's residual stream and the next token: a module of
    DeepSeek-AI 2024, arXiv 2412.19437, sec. 2.2. Embedding and output head are the decoder's own.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        """index: of its layer, counted on from the decoder's."""
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.eh_proj = Linear(2 * hidden, hidden, bias=False)
        self.layer = Layer(config, index)
        self.norm = RMSNorm(hidden, eps)

    def forward(
        self, stream: Tensor, embedded: Tensor, angles: tuple[Tensor, Tensor], context: AttentionContext
    ) -> Tensor:
        """Return the residual stream [N, H] behind this layer, whose `norm` the output head reads.

        Args:
            stream: [N, H], before the decoder's last norm, or what this returned; for a guess further on.
            embedded: [N, H], the embedding of the token after each of these.
            angles: of the positions of `stream`, see `Decoder.angles`.
        """
        # The files' order; the paper has the two the other way round.
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(stream)), 1))
        residual, x = self.layer(x, None, *angles, context)
        return residual + x


class Decoder(nn.Module):
    """A decoder-only language model, or the `layers` of one stage of it; weights are uninitialised until
    `initialise` or a load.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Its own initial values on the meta device would import torch's whole compiler: a second at every start.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.further_layers:  # the last, so that the first values of all others are what they are without it
            first = config.num_hidden_layers
            self.further = nn.ModuleList(FurtherLayer(config, first + n) for n in range(config.further_layers))
        self.read_logits: ReadLogits = logit_statistics  # tensor parallelism supplies another one
        self.key_value_heads = config.num_key_value_heads  # that are computed here: tensor parallelism takes a part
        for parameter in self.parameters():  # not the buffers: routers count and balance in fp32
            parameter.data = parameter.data.to(config.torch_dtype)

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, H] (the embedding itself if the two are tied and both are here)."""
        return self.lm_head.weight if "lm_head" in self._modules else self.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        context: AttentionContext,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
        penalties: Penalties | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """Return the log-probability of `targets`, or logits if there are none.

        Args:
            tokens: int64 [N]; positions: int64 [N], each token's place in its own document.
            context: says which tokens see which.
            targets: int64 [R], the token to score after each row; gives fp32 [R].
            rows: int64 [R], the rows that are asked for, N of them if None; without targets gives their logits [R, V]
                in the model's dtype.
            penalties: what a loss adds for each token; with targets gives fp32 [2, R], log-probabilities and these.
            hidden: give what the head would read instead of logits, [R, H].
        """
        residual, x = self.run_layers(self.embed_tokens(tokens), positions, context)
        if rows is not None:
            residual, x = residual.index_select(0, rows), x.index_select(0, rows)
        _, read = self.norm.add(residual, x)
        if targets is not None:
            return self.score(read, targets, penalties)
        return read if hidden else self.logits(read)

    def logits_and_stream(
        self, tokens: Tensor, positions: Tensor, context: AttentionContext, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the logits [R, V] of `forward` for `rows`, and the stream [N, H] that a further layer reads."""
        residual, x = self.run_layers(self.embed_tokens(tokens), positions, context)
        _, read = self.norm.add(residual[rows], x[rows])
        return self.logits(read), residual + x

    def further_stream(
        self, stream: Tensor, tokens: Tensor, positions: Tensor, context: AttentionContext, again: bool = False
    ) -> Tensor:
        """Return the stream [N, H] behind the first further layer; see `FurtherLayer`.

        Args:
            stream: [N, H], the decoder's, or what this returned (then this is done `again`).
            tokens: int64 [N], the next ones. positions: int64 [N], of `stream`.
        """
        layer = self.further[0]
        if again and self.config.further_normed:
            stream = layer.norm(stream)  # type: ignore[operator]
        further: Tensor = layer(stream, self.embed_tokens(tokens), self.angles(positions), context)
        return further

    def further_logits(self, stream: Tensor) -> Tensor:
        """Return the logits [R, V] of the first further layer's stream [R, H]."""
        return self.logits(self.further[0].norm(stream))  # type: ignore[operator]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [R, V] of the last norm's output [R, H], whatever the head is."""
        return self.lm_head(hidden) if "lm_head" in self._modules else linear(hidden, self.embed_tokens.weight)

    def score(self, hidden: Tensor, targets: Tensor, penalties: Penalties | None = None) -> Tensor:
        """Return log-probabilities of targets given the last norm's output, and penalties; see `forward`."""
        found = self.read_logits(hidden, self.head_weight, targets, penalties is not None and penalties.moments)
        return found.log_prob if penalties is None else torch.stack((found.log_prob, penalties.of(found)))

    def run_layers(self, residual: Tensor, positions: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Pass the layers of this stage: residual stream [N, H] -> the stream and the last addend to it."""
        angles, x = self.angles(positions), None
        # Of contexts over a paged cache: a whole layer is one operator there, on a CPU.
        pages = getattr(context, "pages", None) if residual.is_cpu else None
        kernel, has_few_bits = None, None
        for layer in self.layers:
            plain = layer.plain.of(layer) if pages and isinstance(layer, Layer) else None
            if plain and plain.has_few_bits is not has_few_bits:  # as a rule once: layers are alike
                has_few_bits = plain.has_few_bits
                kernel = layer_kernel(residual, self.config.head_dim, has_few_bits)
            if kernel and plain and pages:
                residual, x = kernel(residual, x, *angles, *pages(plain.layer), *plain.arguments)
            else:
                residual, x = layer(residual, x, *angles, context)
        assert x is not None
        return residual, x

    def plain_parts(self) -> tuple[object, ...] | None:
        """Return what the operators of whole layers take, of all layers, and all other weights; None if some layer is
        none. While these are the same objects, a step on a CPU is made of the same calls.
        """
        plain = [layer.plain.of(layer) if isinstance(layer, Layer) else None for layer in self.layers]
        if any(one is None for one in plain):
            return None
        others = [getattr(self, name) for name in ("embed_tokens", "norm", "lm_head") if name in self._modules]
        weights = [value for one in others for value in (*one._parameters.values(), *one._buffers.values())]
        return (*plain, *others, *weights)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, fp32 [N, D / 2], of the rotated dimensions at these positions."""
        latent = self.config.latent
        return rotary_angles(positions, self.config.rotary, latent.qk_rope_head_dim if latent else self.config.head_dim)

    def routers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the name and the router of each mixture of experts."""
        for name, module in self.named_modules():
            if isinstance(module, MixtureOfExperts):
                yield f"{name}.gate", module.gate


def initialise(model: Decoder, seed: int) -> Decoder:
    """Fill the weights of `model` with `initial_weights`, and its buffers with zeros."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in initial_weights(model.config, seed):
            weights[name].copy_(value)
        for buffer in model.buffers():
            buffer.zero_()
    return model


def initial_weights(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the first value of each weight, fp32 on the CPU: normal with `initializer_range`, smaller by
    1 / sqrt(2 L) where a layer writes to the residual stream (Radford et al. 2019, sec. 2.3); norms one, biases zero.
    Drawn one after the other whatever the device and layout, so that all get the same.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_scale = 1.0 / math.sqrt(2 * config.num_hidden_layers)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Decoder(config).named_parameters()}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape)
        elif name.endswith(("bias", "sinks")):
            yield name, torch.zeros(shape)
        else:
            scale = residual_scale if "o_proj" in name or "down_proj" in name else 1.0
            yield name, torch.randn(shape, generator=generator) * config.initializer_range * scale
