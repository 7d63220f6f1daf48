"""Tensor and expert parallelism for inference: every process has all tokens of a step, its heads and its experts.

Weights are cut as training cuts them. A step of decoding has too few tokens to spread them between the layers, so here
all processes keep the whole residual stream, and each layer's partial outputs are gathered and added in the order of
ranks. No part of a row's sum depends on which other rows there are: one layout gives the same bits in every batch.

Training keeps each expert whole and sends tokens to it. Where the layout is exact, whole experts are spread over all
processes here too, and their rows are brought together before a token's are added: the sums are those of training.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig, Quantisation
from liaoyuan.models.experts import Dispatch, GroupedExperts, MixtureOfExperts
from liaoyuan.models.quantised import read_with, to_quantise
from liaoyuan.ops import combine_rows, permute_rows
from liaoyuan.parallel.collectives import add_in_order
from liaoyuan.parallel.expert import expert_weights
from liaoyuan.parallel.layout import Layout, Shape, resolve
from liaoyuan.parallel.mesh import Mesh
from liaoyuan.parallel.program import Program, compute_each_locally, give_memory
from liaoyuan.parallel.quantised import check_groups, quantise_parts
from liaoyuan.parallel.tensor import COLUMNS, ROWS, Table, cut_vocabulary, cut_weights, placement, with_local_parts
from liaoyuan.parallel.world import World

SPREAD_BYTES = 2**20  # of all parts of a sum; below it, one exchange takes less time than two
SHARED_TABLE: Table = (  # training leaves an expert that all tokens pass whole
    (r"shared_experts\.gate_up_proj\.weight$", ROWS),
    (r"shared_experts\.down_proj\.weight$", COLUMNS),
)
# Of the weights of all experts, [experts, ...]: over the processes that hold the same experts, and over ep.
EXPERT_TABLE: dict[str, tuple[Placement, Placement]] = {
    "gate_up_proj": (Shard(1), Shard(0)),
    "gate_up_proj_bias": (Shard(1), Shard(0)),
    "down_proj": (Shard(2), Shard(0)),
    "down_proj_bias": (Replicate(), Shard(0)),
}


def check_inference(layout: Layout, config: ModelConfig, few_bits: Quantisation | None = None) -> Layout:
    """Return the layout of a replica, resolved.

    few_bits: how its weights are quantised.

    Raises:
        LiaoyuanError: it has other axes than tp and ep, or does not fit the model.
    """
    if layout.pp * layout.dp * layout.context > 1 or layout.fsdp > 1 or layout.compile:
        raise LiaoyuanError(
            "Inference knows the axes tp and ep of a layout; to use more processes, start more replicas."
        )
    resolved = resolve(layout, layout.tp, Shape(config, layout.tp, 1))
    experts = config.experts
    if experts and layout.exact and experts.num_experts % layout.tp:
        raise LiaoyuanError(
            f"An exact layout spreads whole experts over its processes, but {layout.tp} do not divide the "
            f"{experts.num_experts} experts."
        )
    widths = []
    if experts and not layout.exact:
        widths = [
            ("moe_intermediate_size", experts.moe_intermediate_size, layout.tp // layout.ep),
            ("the width of the shared experts", experts.shared_intermediate_size, layout.tp),
        ]
    for name, width, parts in widths:
        if width % parts:
            raise LiaoyuanError(f"The layout {layout.describe()} does not fit: {parts} does not divide {name} {width}.")
    if few_bits is not None:
        check_groups(_cut_inputs(resolved, config, few_bits), few_bits)
    return resolved


def _cut_inputs(layout: Layout, config: ModelConfig, few_bits: Quantisation) -> Iterator[tuple[str, int, int]]:
    """Yield the name, the inputs, and the number of processes of each weight whose inputs are cut."""
    with torch.device("meta"):
        model = Decoder(config)
    for path in to_quantise(model, few_bits):
        for name, weight in model.get_submodule(path).named_parameters(path):
            _, experts, key = name.rpartition(".experts.")
            if layout.exact:  # experts are whole there
                placed = Shard(0) if experts else placement(name)
            else:
                placed = EXPERT_TABLE[key][0] if experts else placement(name, SHARED_TABLE)
            if weight.ndim > 1 and placed == Shard(weight.ndim - 1):
                yield name, weight.shape[-1], layout.tp // layout.ep if experts else layout.tp


def lay_out_inference(model: Decoder, layout: Layout, world: World, few_bits: Quantisation | None = None) -> Program:
    """Lay out `model`, on the meta device, over the processes of `world` (which must know the layout): each gets memory
    for its part, to be filled by `checkpoint.load_weights`. `models[0]` of the program is then called as the whole
    model would be, in all processes with the same inputs, and gives all of them the same output.

    few_bits: keep its weights so.
    """
    mesh = world.mesh
    assert mesh, "a model of one process needs no layout"
    group = mesh.group("tp")
    exact = mesh.layout.exact
    cut_weights(model, mesh, () if exact else SHARED_TABLE)
    model.key_value_heads = model.config.num_key_value_heads // layout.tp
    further = [one.layer for one in model.further] if model.config.further_layers else []
    for layer in (*model.layers, *further):
        _add_up(layer.self_attn, group)
        if exact and isinstance(layer.mlp, MixtureOfExperts):
            _spread_experts(layer.mlp, mesh.dense["tp"])
            continue
        _add_up(layer.mlp, group)
        if isinstance(layer.mlp, MixtureOfExperts):
            _cut_experts(layer.mlp, mesh)
    forms = {} if few_bits is None else quantise_parts(model, few_bits)
    cut_vocabulary(model.embed_tokens, group, ordered_sum)
    # As sampling reads them, so that scoring a token gives the same bits.
    model.read_logits = read_with(lambda rows: gather_columns(model.logits(rows), group))
    _join_logits(model, group)
    program = Program([model], mesh)
    program.few_bits = forms
    compute_each_locally(model, model)
    if further:
        _guess_locally(model, group)
    give_memory(program, world.device.torch)
    return program


def ordered_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum over the processes, added in the order of ranks, in fp32 (fp64 for fp64), rounded once.

    x: [N, ...]. Where all parts together are large, each process adds up some of the rows for all: the same bits, and
    less to send.
    """
    size = group.size()
    if size == 2 or x.nbytes * size < SPREAD_BYTES:
        return add_in_order(_gather(x, group).unflatten(0, (size, -1)))
    missing = -len(x) % size
    padded = torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x
    parts = torch.empty_like(padded, memory_format=torch.contiguous_format)
    dist.all_to_all_single(parts, padded.contiguous(), group=group)
    return _gather(add_in_order(parts.unflatten(0, (size, -1))), group)[: len(x)]


def _gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows of all processes, one after another."""
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_single(out, x.contiguous(), group=group)
    return out


def gather_columns(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the columns of all processes side by side: [N, C] -> [N, size * C]."""
    parts = _gather(x, group).view(group.size(), *x.shape)
    return parts.transpose(0, 1).reshape(x.shape[0], group.size() * x.shape[1])


def _add_up(module: Any, group: ProcessGroup) -> None:
    module.register_forward_hook(lambda _, __, out: ordered_sum(out, group))


def _join_logits(model: Decoder, group: ProcessGroup) -> None:
    """Put the logits of all processes together; log-probabilities of targets and hidden states are whole already."""

    def after(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], out: Tensor) -> Tensor:
        targets = inputs[3] if len(inputs) > 3 else options.get("targets")
        return out if targets is not None or options.get("hidden") else gather_columns(out, group)

    model.register_forward_hook(after, with_kwargs=True)


def _guess_locally(model: Decoder, group: ProcessGroup) -> None:
    """Let the calls of a further layer compute with local parts of weights, and put their logits together."""
    within = (*model.layers, *expert_weights(model))
    logits = with_local_parts(model.further_logits, model, "", within)
    model.further_logits = lambda stream: gather_columns(logits(stream), group)  # type: ignore[method-assign]
    model.further_stream = with_local_parts(model.further_stream, model, "", within)  # type: ignore[method-assign]


def _cut_experts(layer: MixtureOfExperts, mesh: Mesh) -> None:
    """Spread the experts over ep, and cut each over the processes that hold the same ones."""
    over = mesh.experts["expert_shard", "ep"]
    for key, weight in list(layer.experts.named_parameters(recurse=False)):
        cut = distribute_tensor(weight.detach(), over, EXPERT_TABLE[key], src_data_rank=None)
        layer.experts._parameters[key] = nn.Parameter(cut, requires_grad=weight.requires_grad)
    layer.dispatch = _own_experts(mesh.place("ep"), mesh.layout.ep)


def _own_experts(place: int, size: int) -> Dispatch:
    """Return a dispatch that computes for all tokens what this process's experts add to them."""

    def dispatch(x: Tensor, chosen: Tensor, weights: Tensor, experts: GroupedExperts, count: int) -> Tensor:
        rows, order, sizes = permute_rows(x, chosen, count)
        own = slice(count // size * place, count // size * (place + 1))
        before, here = int(sizes[: own.start].sum()), int(sizes[own].sum())
        out = torch.zeros_like(rows)
        out[before : before + here] = experts(rows[before : before + here], sizes[own])
        return combine_rows(out, order, weights)

    return dispatch


def _spread_experts(layer: MixtureOfExperts, over: DeviceMesh) -> None:
    """Spread whole experts over all processes."""
    for key, weight in list(layer.experts.named_parameters(recurse=False)):
        cut = distribute_tensor(weight.detach(), over, [Shard(0)], src_data_rank=None)
        layer.experts._parameters[key] = nn.Parameter(cut, requires_grad=weight.requires_grad)
    layer.dispatch = _whole_experts(over.get_group())


def _whole_experts(group: ProcessGroup) -> Dispatch:
    """Return a dispatch that computes the rows of this process's experts, and adds up every token's from all."""
    size, place = group.size(), group.rank()

    def dispatch(x: Tensor, chosen: Tensor, weights: Tensor, experts: GroupedExperts, count: int) -> Tensor:
        rows, order, sizes = permute_rows(x, chosen, count)
        of_each = sizes.view(size, -1)
        counts = of_each.sum(1).tolist()
        before = sum(counts[:place])
        own = rows.new_zeros(max(counts), rows.shape[1])
        own[: counts[place]] = experts(rows[before : before + counts[place]], of_each[place])
        parts = _gather(own, group).unflatten(0, (size, -1))
        whole = torch.cat([part[:number] for part, number in zip(parts, counts, strict=True)])
        return combine_rows(whole, order, weights)

    return dispatch
