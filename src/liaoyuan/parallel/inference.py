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
from torch.distributed.tensor import Shard, distribute_tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig, Quantisation
from liaoyuan.models.experts import Dispatch, GroupedExperts, MixtureOfExperts
from liaoyuan.models.quantised import read_with, to_quantise
from liaoyuan.ops import combine_rows, permute_rows
from liaoyuan.parallel.collectives import add_in_order, ordered_scatter_sum
from liaoyuan.parallel.expert import expert_weights
from liaoyuan.parallel.layout import Layout, Shape, resolve
from liaoyuan.parallel.mesh import Mesh
from liaoyuan.parallel.placed_experts import EXPERT_TABLE, PlacedExperts
from liaoyuan.parallel.program import Program, compute_each_locally, give_memory
from liaoyuan.parallel.quantised import check_groups, quantise_parts
from liaoyuan.parallel.tensor import COLUMNS, ROWS, Table, cut_vocabulary, cut_weights, placement, with_local_parts
from liaoyuan.parallel.world import World

SPREAD_BYTES = 2**20  # of all parts of a sum; below it, one exchange takes less time than two
SHARED_TABLE: Table = (  # training leaves an expert that all tokens pass whole
    (r"shared_experts\.gate_up_proj\.weight$", ROWS),
    (r"shared_experts\.down_proj\.weight$", COLUMNS),
)


def check_inference(
    layout: Layout, config: ModelConfig, few_bits: Quantisation | None = None, expert_copies: int = 0
) -> Layout:
    """Return the layout of a replica, resolved; expert_copies: as in `lay_out_inference`.

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
    if expert_copies:
        _check_copies(expert_copies, layout, config)
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


def _check_copies(copies: int, layout: Layout, config: ModelConfig) -> None:
    if config.experts is None:
        raise LiaoyuanError("There are no copies of experts in a model that has none: leave out --expert-copies.")
    if layout.ep == 1:
        raise LiaoyuanError("Copies of experts are for experts that are spread over processes: give --ep too.")
    count = config.experts.num_experts
    most = count - count // layout.ep
    if not 0 < copies <= most:
        raise LiaoyuanError(
            f"{copies} copies are more than the {most} experts of a layer that a process has not: of {count} experts "
            f"over {layout.ep} processes each has {count // layout.ep}."
            if copies > 0
            else f"The number of copies of experts must not be negative (it is {copies})."
        )


def lay_out_inference(
    model: Decoder, layout: Layout, world: World, few_bits: Quantisation | None = None, expert_copies: int = 0
) -> Program:
    """Lay out `model`, on the meta device, over the processes of `world` (which must know the layout): each gets memory
    for its part, to be filled by `checkpoint.load_weights`. `models[0]` of the program is then called as the whole
    model would be, in all processes with the same inputs, and gives all of them the same output.

    few_bits: keep its weights so.
    expert_copies: further slots for experts in each process and layer, empty at first; see `placed_experts`.
    """
    mesh = world.mesh
    assert mesh, "a model of one process needs no layout"
    group = mesh.group("tp")
    exact = mesh.layout.exact
    cut_weights(model, mesh, () if exact else SHARED_TABLE)
    model.key_value_heads = model.config.num_key_value_heads // layout.tp
    placed = _place_experts(model, mesh, expert_copies)
    further = [one.layer for one in model.further] if model.config.further_layers else []
    for layer in (*model.layers, *further):
        _add_up(layer.self_attn, group)
        if not isinstance(layer.mlp, MixtureOfExperts):
            _add_up(layer.mlp, group)
        elif exact:
            _spread_experts(layer.mlp, mesh.dense["tp"])
        elif placed is None:
            _cut_experts(layer.mlp, mesh)
            _add_up(layer.mlp, group)
        elif layer.mlp.shared_experts is not None:  # the others' rows come whole
            _add_up(layer.mlp.shared_experts, group)
    forms = {} if few_bits is None else quantise_parts(model, few_bits)
    cut_vocabulary(model.embed_tokens, group, ordered_sum)
    # As sampling reads them, so that scoring a token gives the same bits.
    model.read_logits = read_with(lambda rows: gather_columns(model.logits(rows), group))
    _join_logits(model, group)
    program = Program([model], mesh)
    program.few_bits, program.placed = forms, placed
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
    return _gather(ordered_scatter_sum(padded, group), group)[: len(x)]


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
    """Put the logits of all processes together; log-probabilities of targets and hidden states are whole already.

    It is a part of `forward`, not a hook behind it: whoever takes turns at that call, or answers for its failure, does
    so for this exchange too.
    """
    compute = model.forward

    def forward(*inputs: Any, **options: Any) -> Tensor:
        out = compute(*inputs, **options)
        targets = inputs[3] if len(inputs) > 3 else options.get("targets")
        return out if targets is not None or options.get("hidden") else gather_columns(out, group)

    model.forward = forward  # type: ignore[method-assign]


def _guess_locally(model: Decoder, group: ProcessGroup) -> None:
    """Let the calls of a further layer compute with local parts of weights, and put their logits together."""
    within = (*model.layers, *expert_weights(model))
    logits = with_local_parts(model.further_logits, model, "", within)
    model.further_logits = lambda stream: gather_columns(logits(stream), group)  # type: ignore[method-assign]
    model.further_stream = with_local_parts(model.further_stream, model, "", within)  # type: ignore[method-assign]


def _cut_experts(layer: MixtureOfExperts, mesh: Mesh) -> None:
    """Cut each expert over all processes."""
    for key, weight in list(layer.experts.named_parameters(recurse=False)):
        cut = distribute_tensor(weight.detach(), mesh.dense["tp"], [EXPERT_TABLE[key][0]], src_data_rank=None)
        layer.experts._parameters[key] = nn.Parameter(cut, requires_grad=weight.requires_grad)


def _place_experts(model: Decoder, mesh: Mesh, copies: int) -> PlacedExperts | None:
    """Give the experts of all layers their slots, where they are spread over processes and need not lie as training
    has them.
    """
    if mesh.layout.ep == 1 or mesh.layout.exact:
        return None
    placed = PlacedExperts(model, mesh, copies)
    for number, layer in enumerate(placed.layers):
        layer.dispatch = _to_slots(placed, number, mesh)
    return placed


def _to_slots(placed: PlacedExperts, number: int, mesh: Mesh) -> Dispatch:
    """Return a dispatch that computes the rows of this process's slots, and adds up the results of all choices in the
    order of the choices: where an expert lies does not change a bit.
    """
    group = mesh.group("tp")

    def dispatch(x: Tensor, chosen: Tensor, weights: Tensor, experts: GroupedExperts, count: int) -> Tensor:
        rows, order, sizes = permute_rows(x, placed.slots_of(number, x, chosen), placed.ranks * placed.slots)
        counts = placed.count(number, sizes)
        own = rows.split(counts)[placed.place]
        out = experts(own, sizes.view(placed.ranks, -1)[placed.place])
        if rows.nbytes >= SPREAD_BYTES:
            return _combine_at_owners(out, counts, order, weights, placed.place, group)
        return combine_rows(_join_rows(out, counts, group), order, weights)

    return dispatch


def _join_rows(own: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    """Return the rows of all ranks that share the experts, `counts` of each, one after another; own: this process's
    part of its rank's.

    The parts that several processes have of the same rows are added in their order.
    """
    most = max(counts)
    padded = nn.functional.pad(own, (0, 0, 0, most - len(own)))
    parts = _gather(padded, group).unflatten(0, (group.size() // len(counts), len(counts), most))
    whole = add_in_order(parts) if len(parts) > 1 else parts[0]
    return torch.cat([rows[:count] for rows, count in zip(whole, counts, strict=True)])


def _combine_at_owners(
    own: Tensor, counts: list[int], order: Tensor, weights: Tensor, place: int, group: ProcessGroup
) -> Tensor:
    """Return what `combine_rows` makes of the rows of all: each process gets those of some tokens, adds them up, and
    hands the sums to all. Less is sent than if all got all rows.

    own, counts: as in `_join_rows`, of the rank `place` of ep.
    """
    size, me, (tokens, choices) = group.size(), group.rank(), weights.shape
    share = -(-tokens // size)
    owners = order // choices // share  # of each row
    of_ranks = owners.split(counts)
    going = torch.bincount(of_ranks[place], minlength=size).tolist()
    coming = torch.stack([(rows == me).sum() for rows in of_ranks]).tolist() * (size // len(counts))
    arrived = own.new_empty(sum(coming), own.shape[1])
    dist.all_to_all_single(arrived, own[of_ranks[place].argsort(stable=True)], coming, going, group=group)
    parts = arrived.unflatten(0, (size // len(counts), -1))
    rows = add_in_order(parts) if len(parts) > 1 else parts[0]
    mine = combine_rows(rows, order[owners == me] - me * share * choices, weights[me * share : (me + 1) * share])
    return _gather(nn.functional.pad(mine, (0, 0, 0, share - len(mine))), group)[:tokens]


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
        out = experts(rows.split(counts)[place], of_each[place])
        return combine_rows(_join_rows(out, counts, group), order, weights)

    return dispatch
