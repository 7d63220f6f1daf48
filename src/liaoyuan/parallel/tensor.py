"""Tensor and sequence parallelism (Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al. 2022, arXiv 2205.05198).

Within a layer, projections are cut by heads or by columns; between layers, tokens are spread over the same processes.
`TABLE` says how each weight is cut; the rest is a gather before, and a sum after, each attention and feed-forward
layer, hung on the model from outside. Weights are DTensors; a layer computes with their local parts.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from liaoyuan.models import Decoder
from liaoyuan.models.experts import MixtureOfExperts
from liaoyuan.ops import LogitStatistics, ReadLogits, logit_statistics, merge_statistics, pack, unpack, wide
from liaoyuan.parallel.chunked import gather_linear, linear_scatter
from liaoyuan.parallel.collectives import (
    gather_rows,
    ordered_scatter_sum,
    replicated_rows,
    replicated_sum,
    scatter_sum,
)
from liaoyuan.parallel.fsdp import copies
from liaoyuan.parallel.mesh import Mesh

ROWS, COLUMNS = Shard(0), Shard(1)
AddUp = Callable[[Tensor, ProcessGroup], Tensor]
Table = tuple[tuple[str, Placement], ...]  # pattern of a weight's name, how it is cut
TABLE: Table = (
    (r"(embed_tokens|lm_head)\.weight$", ROWS),
    (r"self_attn\.(qkv_proj|q_proj|q_b_proj|kv_b_proj)\.(weight|bias)$", ROWS),
    (r"self_attn\.sinks$", ROWS),
    (r"self_attn\.o_proj\.weight$", COLUMNS),
    (r"layer(s\.\d+)?\.mlp\.gate_up_proj\.(weight|bias)$", ROWS),
    (r"layer(s\.\d+)?\.mlp\.down_proj\.weight$", COLUMNS),
    (r"", Replicate()),
)
ADDED_ONCE = re.compile(  # though the products are summed
    r"layer(s\.\d+)?\.(self_attn\.o_proj|mlp\.down_proj)\.bias$|^experts\.down_proj_bias$"
)


def placement(name: str, more: Table = ()) -> Placement:
    """Return how tensor parallelism cuts the weight `name`; the rows of `more` come before those of `TABLE`."""
    return next(placed for pattern, placed in (*more, *TABLE) if re.search(pattern, name))


def apply_tensor_parallel(model: Decoder, mesh: Mesh) -> None:
    """Cut the weights of `model` over the axis tp and put the exchanges around its layers, in place.

    Where the layout is exact, sums are added as inference adds them, of products whose rows do not depend on each
    other, and each process reads the logits of its own tokens with the whole head.
    """
    group, exact = mesh.group("tp"), mesh.layout.exact
    cut_weights(model, mesh)
    add_up = ordered_scatter_sum if exact else scatter_sum
    for layer in model.layers:
        parts = [layer.self_attn]
        if not isinstance(layer.mlp, MixtureOfExperts):  # experts take their tokens where they are
            parts.append(layer.mlp)
        for part in parts:
            if mesh.layout.overlap and not exact:
                _chunked(part, group)
            else:
                _surround(part, group, add_up)
    if hasattr(model, "embed_tokens"):
        cut_vocabulary(model.embed_tokens, group, scatter_sum)
    model.read_logits = _whole_head(group) if exact else _cut_head(group)


def cut_weights(model: Decoder, mesh: Mesh, more: Table = ()) -> None:
    """Cut the weights of `model`, but for its experts, over the axis tp, in place."""
    for module, key, name in weights_of(model):
        if ".experts." not in name:
            weight = module._parameters[key]
            assert weight is not None
            cut = distribute_tensor(weight.detach(), mesh.dense["tp"], [placement(name, more)], src_data_rank=None)
            module._parameters[key] = nn.Parameter(cut, requires_grad=weight.requires_grad)


def weights_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield the module of each weight, its key in it, and its whole name."""
    for path, module in model.named_modules():
        for key in module._parameters:
            if module._parameters[key] is not None:
                yield module, key, f"{path}.{key}" if path else key


def _surround(module: Any, group: ProcessGroup, add_up: AddUp) -> None:
    """Let `module` see all tokens and hand back its own part of the sum of all outputs."""

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return gather_rows(inputs[0], group), *inputs[1:]

    def after(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return add_up(out, group)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _chunked(module: Any, group: ProcessGroup) -> None:
    """Do what `_surround` does within the first and last projection, which compute while chunks of tokens travel.

    Where several projections read the input (latent attention), it is gathered as a whole.
    """
    first = getattr(module, "qkv_proj", None) or getattr(module, "gate_up_proj", None)
    last = getattr(module, "o_proj", None) or module.down_proj
    if first is not None:
        first.forward = lambda x: gather_linear(x, first.weight, first.bias, group)
    else:
        module.register_forward_pre_hook(lambda _, inputs: (gather_rows(inputs[0], group), *inputs[1:]))
    last.forward = lambda x: linear_scatter(x, last.weight, last.bias, group)


def cut_vocabulary(embedding: nn.Module, group: ProcessGroup, add_up: AddUp) -> None:
    """Look tokens up where their row is; `add_up` puts the processes' rows together, all but one of them zeros."""

    def forward(tokens: Tensor) -> Tensor:
        table = embedding.weight
        assert isinstance(table, Tensor)
        local = tokens - _first_row(len(table), group)
        here = (local >= 0) & (local < len(table))
        rows = nn.functional.embedding(local.where(here, torch.zeros_like(local)), table)
        return add_up(rows * here[:, None].to(rows.dtype), group)

    embedding.forward = forward


def _whole_head(group: ProcessGroup) -> ReadLogits:
    """Return `logit_statistics` for a head whose rows are spread over the processes, each of which gathers them all to
    read its own tokens: no sum over the vocabulary is merged from parts.
    """

    def read(hidden: Tensor, head: Tensor, targets: Tensor, moments: bool = False) -> LogitStatistics:
        own = targets.unflatten(0, (group.size(), -1))[group.rank()]
        found = logit_statistics(hidden, gather_rows(head, group), own, moments)
        return LogitStatistics(*(replicated_rows(values, group) if len(values) else values for values in found))

    return read


def _cut_head(group: ProcessGroup) -> ReadLogits:
    """Return `logit_statistics` for a head whose rows are spread over the processes, each of which reads its own."""

    def highest(x: Tensor) -> Tensor:
        found = x.clone()
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        return found

    def read(hidden: Tensor, head: Tensor, targets: Tensor, moments: bool = False) -> LogitStatistics:
        first, vocabulary = _first_row(len(head), group), len(head) * group.size()
        own = logit_statistics(gather_rows(hidden, group), head, targets, moments, first, vocabulary)
        return merge_statistics(own, highest, lambda x: replicated_sum(x, group))

    return read


def _first_row(rows: int, group: ProcessGroup) -> int:
    return rows * group.rank()


def compute_locally(module: nn.Module, root: str, inner: tuple[nn.Module, ...] = ()) -> None:
    """Let `module.forward` and all within it, except `inner`, see the local part of each weight that is a DTensor.

    A weight that is not cut sees only this process's tokens or heads: its gradient is a summand until `sum_uncut`.
    """
    module.forward = with_local_parts(module.forward, module, root, inner)


def with_local_parts(
    function: Callable[..., Any], module: nn.Module, root: str, inner: tuple[nn.Module, ...] = ()
) -> Callable[..., Any]:
    """Return `function`, which calls parts of `module`, with local parts of weights: see `compute_locally`."""
    apart = {id(part) for whole in inner for part in whole.modules()}
    weights = [(owner, key, f"{root}{name}") for owner, key, name in weights_of(module) if id(owner) not in apart]

    def locally(*inputs: Any, **options: Any) -> Any:
        for owner, key, name in weights:
            owner.__dict__[key] = _local(owner._parameters[key], name)  # hides the parameter of the same name
        try:
            return function(*inputs, **options)
        finally:
            for owner, key, _ in weights:
                owner.__dict__.pop(key, None)

    return locally


def is_uncut(name: str) -> bool:
    """Return whether all processes of tp hold the weight `name` alike."""
    return placement(name).is_replicate() and ".experts." not in name


def sum_uncut(named: Iterable[tuple[str, nn.Parameter]], group: ProcessGroup) -> None:
    """Add up over the processes of tp the gradients of weights that it does not cut, all at once, after a backward
    pass; in fp32 at least.
    """
    whole = [weight.grad for name, weight in named if weight.grad is not None and is_uncut(name)]
    grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in whole]
    total = pack([wide(grad) for grad in grads])
    dist.all_reduce(total, group=group)
    torch._foreach_copy_(grads, unpack(total, [grad.shape for grad in grads]))


def _local(weight: nn.Parameter | None, name: str) -> Tensor | None:
    if not isinstance(weight, DTensor):
        return weight
    local: Tensor = weight.to_local(grad_placements=weight.placements)
    return local / copies(weight) if ADDED_ONCE.search(name) else local
