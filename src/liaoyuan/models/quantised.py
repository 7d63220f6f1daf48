"""A model whose weights have few bits, for inference: projections, experts and, if asked, the output head.

Embedding, norms, routers and sinks stay as they are: they are small, or read one row a token. A tied head gets a
quantised copy of its own. A row's bits depend on that row alone, as `ops.quantised_linear` promises, so what is exact
with whole weights is exact with these.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.models.decoder import Decoder
from liaoyuan.models.experts import ExpertWeights
from liaoyuan.models.layers import Linear
from liaoyuan.models.quantised_linear import Quantisation, QuantisedLinear
from liaoyuan.ops import (
    LogitStatistics,
    ReadLogits,
    clamped_swiglu,
    log_sum_exp,
    quantised_linear,
    swiglu,
    wide,
)
from liaoyuan.ops.quantised_linear import GROUPS, Kind

HEAD, EMBEDDING = "lm_head", "embed_tokens.weight"
SCORED_ROWS = 512  # whose logits are in memory at once when given tokens are scored


def quantisation_named(word: str | None, head: Kind | None = "int8") -> Quantisation | None:
    """Return the quantisation that the command line calls `word`, and of the head; None for None.

    Raises:
        LiaoyuanError: there is no such one.
    """
    if word is None:
        return None
    if word not in GROUPS:
        hint = nearest(word, GROUPS) or f": {', '.join(GROUPS)}."
        raise LiaoyuanError(f"Weights cannot be quantised to '{word}'{hint}")
    return Quantisation(cast(Kind, word), head=head)


Held = Callable[[Tensor], Sequence[int]]  # the shape of what is held here of a weight; distribution supplies its own


def _all_of_it(weight: Tensor) -> Sequence[int]:
    return weight.shape


class QuantisedExperts(nn.Module):
    """`ExpertWeights` with few bits: a product for each expert that has rows, all experts' outputs in one weight."""

    def __init__(self, whole: ExpertWeights, how: Quantisation, held: "Held") -> None:
        super().__init__()
        self.limit, self.alpha, self.count = whole.limit, whole.alpha, held(whole.down_proj)[0]
        for name in ("gate_up_proj", "down_proj"):
            count, out, depth = held(getattr(whole, name))
            self.register_module(name, QuantisedLinear(count * out, depth, how))
            self.register_parameter(f"{name}_bias", getattr(whole, f"{name}_bias") if whole.has_bias else None)

    def forward(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """Pass rows [R, H], sorted by expert, `sizes[e]` of them for expert e -> [R, H]."""
        out = torch.empty_like(rows)
        start = 0
        for expert, size in enumerate(sizes.tolist()):
            if size:
                mine = slice(start, start + size)
                gate_up = self._product("gate_up_proj", expert, rows[mine])
                hidden = clamped_swiglu(gate_up, self.limit, self.alpha) if self.limit else swiglu(gate_up)
                out[mine] = self._product("down_proj", expert, hidden)
                start += size
        return out

    def _product(self, name: str, expert: int, x: Tensor) -> Tensor:
        projection, bias = getattr(self, name), getattr(self, f"{name}_bias")
        out = projection.shape[0] // self.count
        return quantised_linear(x, projection.rows(expert * out, out), None if bias is None else bias[expert])


def quantise_model(model: Decoder, how: Quantisation) -> Decoder:
    """Quantise the weights of `model` in place, one after another, and return it; it can no longer be trained.

    Raises:
        LiaoyuanError: a weight is not finite, or the kind has no such groups.
    """
    for path in to_quantise(model, how):
        whole = model.get_submodule(path)
        weights = {name: value for name, value in whole.named_parameters(path) if "bias" not in name}
        model.set_submodule(path, _shell(whole, how.of_head or how if path == HEAD else how))
        del whole
        for name in list(weights):
            put(model, name, weights.pop(name))
    if how.head and model.config.tie_word_embeddings:
        _add_head(model, how.of_head or how)
        put(model, EMBEDDING, model.embed_tokens.weight)
    return _read_with_head(model)


def quantised_shell(model: Decoder, how: Quantisation, held: Held = _all_of_it) -> Decoder:
    """Give `model`, on the meta device, the modules of a quantised one; `put` then fills it, tensor by tensor."""
    for path in to_quantise(model, how):
        kind = how.of_head or how if path == HEAD else how
        model.set_submodule(path, _shell(model.get_submodule(path), kind, held))
    if how.head and model.config.tie_word_embeddings:
        _add_head(model, how.of_head or how, held)
    return _read_with_head(model)


def put(model: Decoder, name: str, whole: Tensor) -> None:
    """Take the tensor `name` of a model with whole weights, and quantise it if that is its place."""
    for own, value in as_kept(model, name, whole).items():
        path, _, leaf = own.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = nn.Parameter(value.detach(), requires_grad=False)


def as_kept(model: Decoder, name: str, whole: Tensor) -> dict[str, Tensor]:
    """Return what `model` keeps of the tensor `name` of a model with whole weights, by the names of its own state.

    Raises:
        LiaoyuanError: a weight that is to be quantised has another size, or values that are not numbers.
    """
    own, places = places_of(model, name)
    kept = {name: whole} if own else {}
    for place, module in places.items():
        shape = module.shape
        if whole.shape[-1:] != shape[1:] or whole.numel() != shape[0] * shape[1]:
            raise LiaoyuanError(f"The weight '{name}' is {list(whole.shape)}, but the model's is {list(shape)}.")
        kept |= {f"{place}.{part}": value for part, value in module.quantised(whole).items()}
    return kept


def places_of(model: Decoder, name: str) -> tuple[bool, dict[str, QuantisedLinear]]:
    """Return where the tensor `name` of a model with whole weights is kept: whether as it is, and, by their names, the
    projections that keep it in few bits.
    """
    quantised = {path: module for path, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    path = name if name in quantised else name.removesuffix(".weight")
    places = {path: quantised[path]} if path in quantised else {}
    if name == EMBEDDING and model.config.tie_word_embeddings and HEAD in quantised:
        places[HEAD] = quantised[HEAD]
    return path not in quantised, places


def to_quantise(model: Decoder, how: Quantisation) -> list[str]:
    """Return the names of the modules whose weights are quantised."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, Linear | ExpertWeights) and (path != HEAD or how.head)
    ]


def _shell(whole: nn.Module, how: Quantisation, held: Held = _all_of_it) -> nn.Module:
    if isinstance(whole, ExpertWeights):
        return QuantisedExperts(whole, how, held)
    assert isinstance(whole, Linear)
    out, depth = held(whole.weight)
    return QuantisedLinear(out, depth, how, whole.bias)


def _add_head(model: Decoder, how: Quantisation, held: Held = _all_of_it) -> None:
    tokens, hidden = held(model.embed_tokens.weight)
    model.add_module(HEAD, QuantisedLinear(tokens, hidden, how))


def _read_with_head(model: Decoder) -> Decoder:
    """Let scoring read the logits of a quantised head."""
    head = model._modules.get(HEAD)
    if isinstance(head, QuantisedLinear):
        model.read_logits = read_with(head)
    return model


def read_with(head: Callable[[Tensor], Tensor]) -> ReadLogits:
    """Return `ops.logit_statistics` for a head that gives logits, instead of a weight."""
    return lambda hidden, _, targets, moments: _statistics(head, hidden, targets, moments)


def _statistics(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, moments: bool) -> LogitStatistics:
    """Return what `ops.logit_statistics` does, of a head that gives logits: hidden [N, H], targets [N]."""
    parts = []
    for rows, wanted in zip(hidden.split(SCORED_ROWS), targets.split(SCORED_ROWS), strict=True):
        logits = head(rows)
        total = log_sum_exp(logits)
        logits = wide(logits)
        log_probs = logits - total[:, None] if moments else logits[:, :0]
        more = (-(log_probs.exp() * log_probs).sum(-1), logits.mean(-1)) if moments else (total[:0], total[:0])
        parts.append((logits.gather(-1, wanted[:, None])[:, 0], total, *more))
    return LogitStatistics(*(torch.cat(values) for values in zip(*parts, strict=True)))
