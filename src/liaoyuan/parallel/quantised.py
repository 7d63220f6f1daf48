"""Weights of few bits over processes: each holds of a weight the rows, or the columns, that it would hold of the whole.

Whole rows are quantised before columns are cut, so the numbers are those of one process. A group of weights that share
a scale therefore has to lie in one process.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, Quantisation
from liaoyuan.models.quantised import HEAD, quantised_shell, to_quantise
from liaoyuan.models.quantised_linear import QuantisedLinear
from liaoyuan.ops.quantised_linear import pack_nibbles, unpack_nibbles
from liaoyuan.parallel.fsdp import own_block

Forms = dict[str, DTensor]  # of each projection of few bits its whole weight, on the meta device, and how it is cut


def quantise_parts(model: Decoder, how: Quantisation) -> Forms:
    """Give `model`, on the meta device and cut over processes, the modules of a quantised one, to be filled with
    `own_parts`; return the forms that its weights had.
    """
    forms: Forms = {}
    for path in to_quantise(model, how):
        for name, weight in model.get_submodule(path).named_parameters(path):
            if "bias" not in name:
                forms[name.removesuffix(".weight")] = _form(weight)
    if how.head and model.config.tie_word_embeddings:
        forms[HEAD] = _form(model.embed_tokens.weight)
    quantised_shell(model, how, lambda weight: own_block(weight)[1])
    return forms


def check_groups(cuts: Iterable[tuple[str, int, int]], how: Quantisation) -> None:
    """Check that a cut leaves groups whole; cuts: of each weight its name, its inputs, over how many processes.

    Raises:
        LiaoyuanError: it splits a group.
    """
    for name, inputs, processes in cuts:
        if how.group_size and inputs // processes % how.group_size:
            raise LiaoyuanError(
                f"Weights in {how.kind} do not fit these processes: {processes} of them share the {inputs} inputs of "
                f"{name}, {inputs // processes} each, which splits a group of {how.group_size} that has one scale. "
                "Take fewer processes, or int8 without groups, which fits any number."
            )


def whole_rows(form: DTensor, device: torch.device) -> DTensor:
    """Return memory for the rows of a weight of which this process holds a part, at their whole length."""
    rows = own_block(form)[1][:-1]
    memory = torch.empty(*rows, form.shape[-1], dtype=form.dtype, device=device)
    return DTensor.from_local(memory, form.device_mesh, _but_columns(form), run_check=False)


def own_rows_of(parts: dict[str, Tensor], form: DTensor) -> dict[str, Tensor]:
    """Return of the parts of a whole `QuantisedLinear` the rows that this process holds, at their whole length."""
    rows = tuple(slice(start, start + size) for start, size in zip(*own_block(form), strict=True))[:-1]
    return {name: part.view(*form.shape[:-1], -1)[rows].flatten(0, -2) for name, part in parts.items()}


def own_columns_of(parts: dict[str, Tensor], module: QuantisedLinear, form: DTensor) -> dict[str, Tensor]:
    """Return of the parts of this process's rows, at their whole length, the columns that `module` holds."""
    (*_, first), (*_, count) = own_block(form)
    if count == form.shape[-1]:
        return parts
    data = unpack_nibbles(parts["data"]) if module.kind == "int4" else parts["data"]
    cut = {"data": data[:, first : first + count].contiguous()}
    if module.kind == "int4":
        cut["data"] = pack_nibbles(cut["data"])
    groups = slice(first // module.group, (first + count) // module.group) if module.group else slice(None)
    return cut | {name: parts[name][:, groups].contiguous() for name in parts.keys() - {"data"}}


def whole_part(module: nn.Module, form: DTensor, name: str) -> Tensor:
    """Return the part `name` of the whole weight of a `QuantisedLinear`, as one process would hold it; all processes
    must ask.
    """
    assert isinstance(module, QuantisedLinear)
    part, placements = getattr(module, name), form.placements
    is_packed = module.kind == "int4" and name == "data"
    if is_packed:
        part = unpack_nibbles(part)[:, : module.shape[1]]
    if name != "data" and module.group is None:  # a scale is that of all columns
        placements = _but_columns(form)
    sizes = own_block(form)[1][:-1]
    own = part.reshape(*sizes, -1).contiguous()
    whole = DTensor.from_local(own, form.device_mesh, placements, run_check=False).full_tensor().flatten(0, -2)
    return pack_nibbles(whole) if is_packed else whole


def _form(weight: Tensor) -> DTensor:
    form = weight.detach()
    assert isinstance(form, DTensor)
    return form


def _but_columns(form: DTensor) -> tuple[Placement, ...]:
    """Return how a weight is cut, its columns left whole."""
    return tuple(Replicate() if placed == Shard(form.ndim - 1) else placed for placed in form.placements)
