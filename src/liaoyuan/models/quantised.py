"""A model whose weights have few bits, for inference: projections, experts and, if asked, the output head.

Embedding, norms, routers and sinks stay as they are: they are small, or read one row a token. A tied head gets a
quantised copy of its own. A row's bits depend on that row alone, as `ops.quantised_linear` promises, so what is exact
with whole weights is exact with these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.models.decoder import Decoder
from liaoyuan.models.experts import ExpertWeights
from liaoyuan.models.layers import Adapter, Linear
from liaoyuan.ops import (
    LogitStatistics,
    QuantisedWeight,
    ReadLogits,
    clamped_swiglu,
    log_sum_exp,
    quantise,
    quantised_linear,
    swiglu,
    wide,
)
from liaoyuan.ops.quantised_linear import GROUPS, Kind

HEAD, EMBEDDING = "lm_head", "embed_tokens.weight"
CUT_ROWS = 8192  # of a weight that are quantised at once: the work needs several fp32 copies of them
SCORED_ROWS = 512  # whose logits are in memory at once when given tokens are scored


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a model are quantised; see `ops.quantise`.

    group: weights that share a scale; None: 32 for int4, a whole output for int8 and fp8.
    head: the kind of the output head, with a scale for each token; None: it stays as it is.
    """

    kind: Kind
    group: int | None = None
    symmetric: bool = True
    head: Kind | None = "int8"

    @property
    def group_size(self) -> int | None:
        """How many weights share a scale; None: a whole output."""
        return 32 if self.group is None and self.kind == "int4" else self.group

    @property
    def of_head(self) -> "Quantisation | None":
        return None if self.head is None else replace(self, kind=self.head, group=None, symmetric=True)


def quantisation_named(word: str | None) -> Quantisation | None:
    """Return the quantisation that the command line calls `word`; None for None.

    Raises:
        LiaoyuanError: there is no such one.
    """
    if word is None:
        return None
    if word not in GROUPS:
        hint = nearest(word, GROUPS) or f": {', '.join(GROUPS)}."
        raise LiaoyuanError(f"Weights cannot be quantised to '{word}'{hint}")
    return Quantisation(cast(Kind, word))


Held = Callable[[Tensor], Sequence[int]]  # the shape of what is held here of a weight; distribution supplies its own


def _all_of_it(weight: Tensor) -> Sequence[int]:
    return weight.shape


class QuantisedLinear(nn.Module):
    """A projection whose weight has few bits; its parts are buffers, so that it moves and is stored like any other."""

    data: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, out: int, depth: int, how: Quantisation, bias: nn.Parameter | None = None) -> None:
        """A shell: `fill` gives it a weight [out, depth]."""
        super().__init__()
        self.kind, self.symmetric, self.shape, self.bias = how.kind, how.symmetric, (out, depth), bias
        self.group = how.group_size
        for name in ("data", "scales", "zeros"):
            self.register_buffer(name, None)
        self.adapter: Adapter | None = None

    def fill(self, whole: Tensor) -> None:
        """Quantise `whole` [..., depth], whose other dimensions are the outputs."""
        for name, part in self.quantised(whole).items():
            setattr(self, name, part)

    def quantised(self, whole: Tensor) -> dict[str, Tensor]:
        """Return the parts that `fill` makes of `whole`, by name."""
        rows = whole.detach().reshape(-1, whole.shape[-1]).split(CUT_ROWS)
        parts = [quantise(cut, self.kind, self.group, self.symmetric) for cut in rows]
        names = ("data", "scales") if self.symmetric else ("data", "scales", "zeros")
        return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}

    @property
    def weight(self) -> QuantisedWeight:
        return self.rows(0, self.shape[0])

    def rows(self, first: int, count: int) -> QuantisedWeight:
        """Return the weight of so many outputs."""
        data, scales, zeros = (
            None if part is None else part[first : first + count] for part in (self.data, self.scales, self.zeros)
        )
        assert data is not None and scales is not None
        return QuantisedWeight(data, scales, zeros, self.kind, self.group, (count, self.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        y = quantised_linear(x, self.weight, self.bias)
        return y if self.adapter is None else self.adapter(x, y)


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
