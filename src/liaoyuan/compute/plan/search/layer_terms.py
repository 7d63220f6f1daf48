"""What one layer of a model asks of a process in a layout, as formulas: its products, and the bytes it keeps.

The dry run is the truth; these are for choosing among thousands of layouts before one is run dry, and
`tests/compute/plan/test_bounds.py` holds the two together. Tokens are those of a microbatch that a process works on in
attention (those of cp already cut); between layers each process of tp has its part of them.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from liaoyuan.compute.plan.program.work import Work, stream
from liaoyuan.models import Decoder, ModelConfig
from liaoyuan.ops.attention import visible_pairs
from liaoyuan.parallel import Layout
from liaoyuan.parallel.tensor import COLUMNS, ROWS, placement

WIDE = 4  # bytes of what is summed or counted
EXPERT = ".experts."

Sizes = tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes of weights


@dataclass(frozen=True)
class Place:
    """Where a layer's formulas hold: how it is cut, tokens of a microbatch on a process, length of a document."""

    model: ModelConfig
    tp: int
    ulysses: int
    ring: int
    ep: int
    recompute: str
    tokens: int
    length: int

    @staticmethod
    def of(model: ModelConfig, layout: Layout, tokens: int, length: int) -> "Place":
        """Return the place of layers in a layout."""
        cp = layout.cp
        return Place(model, layout.tp, cp.ulysses, cp.ring, layout.ep, layout.recompute, tokens, length)

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return self.model.torch_dtype.itemsize

    @property
    def dtype(self) -> str:
        return str(self.model.torch_dtype).removeprefix("torch.")

    @property
    def own(self) -> int:
        """Tokens of the residual stream."""
        return self.tokens // self.tp

    @property
    def heads(self) -> int:
        """Query heads of a process."""
        return self.model.num_attention_heads // self.tp

    @property
    def widths(self) -> tuple[int, int, int]:
        """Elements of a token's queries, keys and values on a process."""
        model, tp = self.model, self.tp
        keys = model.num_attention_heads if model.latent else model.num_key_value_heads
        return (
            model.num_attention_heads * model.head_dim // tp,
            keys * model.head_dim // tp,
            keys * model.value_head_dim // tp,
        )

    @property
    def rows(self) -> int:
        """Rows that come to a process's experts, if all are chosen equally."""
        experts = self.model.experts
        return self.own * experts.num_experts_per_tok if experts else 0


@functools.cache
def weights_of(config: ModelConfig) -> dict[str, Sizes]:
    """Return the weights of "dense" and "sparse" layers, of the "embedding", the "norm" and the "head"."""
    with torch.device("meta"):
        model = Decoder(config)
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {"embedding": [], "norm": [], "head": []}
    for index, layer in enumerate(model.layers):
        kind = kind_of(config, index)
        if kind not in found:
            found[kind] = [(f"layers.0.{name}", tuple(weight.shape)) for name, weight in layer.named_parameters()]
    for name, weight in model.named_parameters():
        if not name.startswith("layers."):
            part = "embedding" if "embed_tokens" in name else "head" if "lm_head" in name else "norm"
            found[part].append((name, tuple(weight.shape)))
    return {part: tuple(sizes) for part, sizes in found.items()}


def kind_of(config: ModelConfig, layer: int) -> str:
    """Return the kind of a layer, by which its weights are known."""
    return "sparse" if config.is_sparse(layer) else "dense"


@functools.cache
def first_alike(config: ModelConfig) -> tuple[int, ...]:
    """Return for each layer the first one that asks the same: of the same kind, and seeing as far."""
    features = [(config.is_sparse(layer), config.window(layer)) for layer in range(config.num_hidden_layers)]
    return tuple(features.index(feature) for feature in features)


@functools.lru_cache(maxsize=65536)
def count(sizes: Sizes, tp: int, ep: int, shard: int, expert_shard: int) -> tuple[int, int]:
    """Return how many of these weights a process holds, and how many once they are gathered."""
    own = whole = 0
    for name, shape in sizes:
        first, *rest = shape
        if EXPERT in name:
            first, parts = first // ep, expert_shard
        else:
            placed, parts = placement(name), shard
            if placed == ROWS:
                first //= tp
            elif placed == COLUMNS:
                rest[0] //= tp
        own += math.ceil(first / parts) * math.prod(rest)
        whole += first * math.prod(rest)
    return own, whole


def kept(place: Place, kind: str) -> int:
    """Return the bytes of activations that a layer keeps of a microbatch from its forward to its backward pass."""
    hidden = place.model.hidden_size
    stream_in = 2 * place.own * hidden  # what the layer is given: the residual stream and the last addend
    if place.recompute == "full":
        return stream_in * place.element
    if place.recompute == "selective":
        return (stream_in + _saved_products(place, kind)) * place.element + _log_sums(place)
    norms = 2 * place.own * hidden if place.tp == 1 else 0  # with tp the gathered rows are kept in their place
    return (stream_in + norms + _attention_kept(place) + _feed_forward_kept(place, kind)) * place.element + _log_sums(
        place
    )


def _log_sums(place: Place) -> int:
    return place.tokens * place.heads * WIDE


def _attention_kept(place: Place) -> int:
    """Elements: the input, projections, what attention reads, and its output."""
    query, key, value = place.widths
    width = query + key + value
    gathered = place.tokens * place.model.hidden_size if place.tp > 1 else 0
    out = place.tokens * place.heads * place.model.value_head_dim
    latent = place.model.latent
    if latent:
        narrow = 2 * (latent.q_lora_rank or 0) + 3 * latent.kv_lora_rank + latent.qk_rope_head_dim
        expanded = place.heads * (latent.qk_nope_head_dim + latent.v_head_dim) + query
        return gathered + place.tokens * (narrow + expanded + width) + out
    return gathered + place.tokens * 2 * width + out


def _feed_forward_kept(place: Place, kind: str) -> int:
    model = place.model
    if kind == "dense":
        gathered = place.tokens * model.hidden_size if place.tp > 1 else 0
        return gathered + place.tokens * 3 * model.intermediate_size // place.tp
    experts = model.experts
    assert experts
    shared = place.own * 3 * experts.shared_intermediate_size
    wide = place.own * model.hidden_size * WIDE // place.element  # the router's input, in fp32
    trips = 3 if place.ep > 1 else 2  # rows as they are sorted or sent, received, and summed
    return shared + wide + place.rows * (trips * model.hidden_size + 3 * experts.moe_intermediate_size)


def _saved_products(place: Place, kind: str) -> int:
    """Elements that selective recomputation keeps: outputs of products and of attention."""
    model, hidden = place.model, place.model.hidden_size
    query, key, value = place.widths
    out = place.tokens * place.heads * model.value_head_dim
    summed = place.tokens * hidden if place.tp > 1 else place.own * hidden
    latent = model.latent
    if latent:
        narrow = (latent.q_lora_rank or 0) + latent.kv_lora_rank + latent.qk_rope_head_dim
        expanded = place.heads * (latent.qk_nope_head_dim + latent.v_head_dim) + query
        projected = place.tokens * (narrow + expanded)
    else:
        projected = place.tokens * (query + key + value)
    if kind == "dense":
        last = summed if place.tp > 1 else 0  # without tp it is the next layer's input, counted there
        return projected + out + summed + last + place.tokens * 2 * model.intermediate_size // place.tp
    experts = model.experts
    assert experts
    shared = place.own * (2 * experts.shared_intermediate_size + hidden) if experts.shared_intermediate_size else 0
    return projected + out + summed + shared + place.rows * (hidden + 2 * experts.moe_intermediate_size)


def passing(place: Place, kind: str) -> int:
    """Return the bytes that a layer's backward pass makes for a while, what it computes again included."""
    again = 0
    if place.recompute != "none":
        bare = replace(place, recompute="none")
        again = kept(bare, kind) - kept(place, kind) + 2 * place.own * place.model.hidden_size * place.element
    model = place.model
    if kind == "dense":  # at the gate: its gradients, of three halves one of which is kept no more
        inner = place.tokens * 2 * model.intermediate_size // place.tp
    else:
        assert model.experts
        inner = place.rows * (2 * model.experts.moe_intermediate_size + model.hidden_size)
    return max(0, again) + (inner + 2 * place.own * model.hidden_size) * place.element


@dataclass(frozen=True)
class LayerWork:
    """What a layer computes of a microbatch: its forward pass, the backward pass, and what that computes again."""

    forward: tuple[Work, ...]
    backward: tuple[Work, ...]
    again: tuple[Work, ...]

    @property
    def flops(self) -> float:
        return sum(work.flops for work in (*self.forward, *self.backward, *self.again))


@functools.lru_cache(maxsize=65536)
def layer_work(place: Place, layer: int, recomputed: bool) -> LayerWork:
    """Return the work of a layer; `recomputed`: it is one of those whose activations are computed again."""
    forward = tuple(_products(place, layer))
    attention = _attention(place, layer)
    streams = stream(float(_streamed(place, layer)), place.dtype)
    backward = tuple(back for work in forward for back in gradients(work))
    twice = replace(
        attention, flops=attention.flops * _attention_again(place), traffic=attention.traffic * 2, backward=True
    )
    again: tuple[Work, ...] = ()
    if recomputed and place.recompute == "full":
        again = (*forward, attention, streams)
    elif recomputed and place.recompute == "selective":
        again = (attention, streams) if place.ring > 1 else (streams,)  # the ring's is none that is kept
    return LayerWork(
        (*forward, attention, streams), (*backward, twice, replace(streams, traffic=2 * streams.traffic)), again
    )


def _attention_again(place: Place) -> float:
    """FLOPs of attention's backward pass over those of its forward pass: five products to two."""
    query, value = place.model.head_dim, place.model.value_head_dim
    return (3 * query + 2 * value) / (query + value)


def _products(place: Place, layer: int) -> Iterator[Work]:
    """Yield the matrix products of a forward pass, in order."""
    model, tp, tokens = place.model, place.tp, place.tokens
    hidden, query = model.hidden_size, model.num_attention_heads * model.head_dim // tp
    if latent := model.latent:
        if latent.q_lora_rank:
            yield product_of(place, tokens, latent.q_lora_rank, hidden)
        yield product_of(place, tokens, query, latent.q_lora_rank or hidden)
        yield product_of(place, tokens, latent.kv_lora_rank + latent.qk_rope_head_dim, hidden)
        expanded = place.heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        yield product_of(place, tokens, expanded, latent.kv_lora_rank)
    else:
        yield product_of(place, tokens, sum(place.widths), hidden)
    yield product_of(place, tokens, hidden, place.heads * model.value_head_dim)
    if not model.is_sparse(layer):
        yield product_of(place, tokens, 2 * model.intermediate_size // tp, hidden)
        yield product_of(place, tokens, hidden, model.intermediate_size // tp)
        return
    experts = model.experts
    assert experts
    yield replace(product_of(place, place.own, experts.num_experts, hidden), dtype="float32")
    here = max(1, experts.num_experts // place.ep)
    width, rows = experts.moe_intermediate_size, math.ceil(place.rows / here)
    for n, k in ((2 * width, hidden), (hidden, width)):
        one = product_of(place, rows, n, k)
        yield replace(one, flops=2.0 * place.rows * n * k, traffic=one.traffic * here, batch=here)
    if shared := experts.shared_intermediate_size:
        yield product_of(place, place.own, 2 * shared, hidden)
        yield product_of(place, place.own, hidden, shared)


def product_of(place: Place, m: int, n: int, k: int) -> Work:
    traffic = place.element * (m * k + k * n + m * n)
    return Work("product", place.dtype, 2.0 * m * n * k, float(traffic), m, n, k)


def gradients(work: Work) -> tuple[Work, Work]:
    """Return the two products of a product's backward pass: of its input, and of its weight."""
    first = replace(work, n=work.k, k=work.n, backward=True)
    return first, replace(work, m=work.n, n=work.k, k=work.m, backward=True)


def _attention(place: Place, layer: int) -> Work:
    model = place.model
    documents = place.tokens * place.ulysses * place.ring / place.length  # of the sequence's processes together
    pairs = documents * visible_pairs(place.length, model.window(layer)) / place.ring * place.heads / place.ulysses
    traffic = place.element * place.tokens * (2 * sum(place.widths[:1]) + sum(place.widths[1:]))
    return Work("attention", place.dtype, 2.0 * pairs * (model.head_dim + model.value_head_dim), float(traffic))


def _streamed(place: Place, layer: int) -> int:
    """Return the bytes that a forward pass reads and writes outside of products: norms, rotations, gates."""
    model, element = place.model, place.element
    norms = 8 * place.own * model.hidden_size
    rotated = 2 * place.tokens * sum(place.widths)
    if not model.is_sparse(layer):
        gates = 3 * place.tokens * model.intermediate_size // place.tp
    else:
        assert model.experts
        gates = place.rows * (3 * model.experts.moe_intermediate_size + 4 * model.hidden_size)
    return (norms + rotated + gates) * element
