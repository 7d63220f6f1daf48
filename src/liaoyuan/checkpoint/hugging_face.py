"""Hugging Face folders in and out: `config.json` and safetensors, nothing else is read and nothing is run.

Our decoder merges projections that read the same input; each family's file says which of its tensors fill which of
ours (`models/stored.py`). All is checked before the first byte of a weight is read. Loading reads straight into the
weights, and of a sharded model each process its own part; saving goes tensor by tensor.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from liaoyuan.checkpoint.compressed import (
    SUFFIXES,
    fill_quantised,
    is_quantised,
    quantisation_of,
    read_kept,
    read_quantisation,
    save_quantised,
)
from liaoyuan.checkpoint.counting import Count
from liaoyuan.checkpoint.filling import READABLE, Block, Filler
from liaoyuan.checkpoint.huge_pages import Together
from liaoyuan.checkpoint.shards import ShardWriter, Slot, plan_shards
from liaoyuan.checkpoint.weight_files import StoredTensor, WeightFiles
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig, Quantisation, read_config, with_dtype
from liaoyuan.models.families import FAMILIES
from liaoyuan.models.quantised import places_of, put, quantised_shell
from liaoyuan.models.stored import Part
from liaoyuan.parallel import Program, World, local, own_block, own_columns_of, own_rows_of, whole_rows
from liaoyuan.rundir import Report, atomic_folder, silent

MAX_SHARD_BYTES = 5 * 10**9  # transformers' own default, 5 GB
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)

Stored = dict[str, list[tuple[Part, StoredTensor]]]  # of each of our tensors


def load_model(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    report: Report = silent,
    quantisation: Quantisation | None = None,
    further: bool = False,
) -> Decoder:
    """Return the decoder of a Hugging Face folder, in `dtype` (the one that its config names if None).

    further: with its layers for predicting the token after the next, for an engine to guess with; they are left out
        otherwise, and a folder that has none is read as ever.

    quantisation: quantise each weight as it is read, so that the whole ones are never in memory together. A
        folder whose weights are quantised gives them as they are; see `compressed.py`.

    Raises:
        LiaoyuanError: a file is missing, torn or of an unsupported family, or a tensor is missing, unknown or
            of another shape than the config says.
    """
    config = read_config(folder, further)
    if dtype is not None:
        config = with_dtype(config, dtype)
    with torch.device("meta"):
        model = Decoder(config)
    few_bits = quantisation_for(folder, quantisation)
    if few_bits is not None:
        return _load_quantised(model, folder, few_bits, quantisation is None, device, report)
    model._apply(Together(device).empty)  # as `to_empty`
    for buffer in model.buffers():
        buffer.zero_()
    load_weights(model, folder, report)
    return model.eval()


def quantisation_for(folder: Path, asked: Quantisation | None) -> Quantisation | None:
    """Return how a model with the weights of `folder` keeps them: as that does, or else as it is asked to.

    Raises:
        LiaoyuanError: both say something.
    """
    kept = read_quantisation(folder)
    if kept is not None and asked is not None:
        raise LiaoyuanError(f"The weights in {folder} are quantised already, to {kept.kind}.")
    return kept or asked


def _load_quantised(
    model: Decoder, folder: Path, how: Quantisation, kept: bool, device: torch.device | str, report: Report = silent
) -> Decoder:
    """Fill `model`, which is on the meta device, with the weights of `folder`: quantised one after another, or, if the
    folder has `kept` them so, as they are.
    """
    whole = dict(model.state_dict())
    model = quantised_shell(model, how)
    family, filler = FAMILIES[model.config.model_type], Filler()
    count = Count(sum(value.nbytes for value in whole.values()), report)
    with WeightFiles(folder) as files, torch.no_grad():
        few = [name for name in whole if kept and is_quantised(model, name)]
        for name, parts in _in_order(find_parts(files, model.config, few, _kept_names(few, whole, model.config))):
            tensor = torch.empty_like(whole[name], device=device)
            fill_tensor(tensor, parts, filler)
            put(model, name, tensor)
            count.add(tensor.nbytes)
        for name in few:
            fill_quantised(model, name, family.stored(name, whole[name], model.config), files, whole[name])
            count.add(whole[name].nbytes)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device=device)
    return model.eval()


def load_weights(model: Decoder | Program, folder: Path, report: Report = silent) -> None:
    """Read the weights of `folder` into `model` (on any device, in any dtype); see `load_model`.

    Of a model that is laid out over processes each reads what it holds itself. No exchange takes place.
    """
    own = dict(named_tensors(model))
    if not isinstance(model, Program) or not model.few_bits:
        read_weights(own, model.config, folder, report)
        return
    for name, value in read_parts(model, folder, model.config, report):
        path, _, leaf = name.rpartition(".")
        if path in model.few_bits and leaf != "bias":
            setattr(model.models[0].get_submodule(path), leaf, value)
        else:
            local(own[name].detach()).copy_(value)


def read_parts(
    program: Program, folder: Path, config: ModelConfig, report: Report = silent
) -> Iterator[tuple[str, Tensor]]:
    """Yield this process's part of each tensor of `folder`, beside the program's own, by the names of its one model's
    state. What the model keeps in few bits is quantised by whole rows, of which some columns may be kept, or taken as
    the folder keeps it.

    config: says which tensors, all of the program's or some.

    Raises:
        LiaoyuanError: see `load_model`; or the folder keeps its weights in other few bits than the model does.
    """
    (model,), device = program.models, program.device
    own, whole, filler = dict(program.named_tensors()), dict(whole_tensors(config)), Filler()
    kept = read_quantisation(folder)
    if kept is not None and kept != quantisation_of(model):
        raise LiaoyuanError(f"The weights in {folder} are quantised to {kept.kind}, the model's are not, or not so.")
    few = [name for name in whole if kept is not None and is_quantised(model, name)]
    count = Count(sum(value.nbytes for value in whole.values()), report)
    with WeightFiles(folder) as files, torch.no_grad():
        for name, parts in _in_order(find_parts(files, config, few, _kept_names(few, whole, config))):
            is_own, places = places_of(model, name)
            if is_own:
                tensor = torch.empty_like(own[name].detach())
            else:
                tensor = whole_rows(program.few_bits[next(iter(places))], device)
            fill_tensor(tensor, parts, filler)
            if is_own:
                yield name, local(tensor)
            for path, module in places.items():
                rows = module.quantised(local(tensor))
                yield from _named(path, own_columns_of(rows, module, program.few_bits[path]))
            count.add(whole[name].nbytes)
        for name in few:
            ((path, module),) = places_of(model, name)[1].items()
            theirs = FAMILIES[config.model_type].stored(name, whole[name], config)
            rows = own_rows_of(read_kept(model, name, theirs, files, whole[name]), program.few_bits[path])
            found = own_columns_of(rows, module, program.few_bits[path])
            yield from _named(path, {leaf: value.to(device) for leaf, value in found.items()})
            count.add(whole[name].nbytes)


def _named(path: str, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((f"{path}.{leaf}", value) for leaf, value in parts.items())


def read_weights(own: Mapping[str, Tensor], config: ModelConfig, folder: Path, report: Report = silent) -> None:
    """Read those tensors of `folder` that `own` has, under our names, into them (whole, or DTensors)."""
    with WeightFiles(folder) as files, torch.no_grad():
        stored = {name: parts for name, parts in find_parts(files, config).items() if name in own}
        fill_tensors(own, stored, report)


def named_tensors(model: Decoder | Program) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the tensor of all that a model folder holds: weights and persistent buffers."""
    yield from model.named_tensors() if isinstance(model, Program) else model.state_dict().items()


def find_parts(
    files: WeightFiles, config: ModelConfig, apart: Collection[str] = (), known: Collection[str] = ()
) -> Stored:
    """Return where in the files the parts of each of our tensors are, and check that they are what `config` asks for.

    apart: our tensors that somebody else reads, from the tensors `known` of the files.

    Raises:
        LiaoyuanError: a tensor is missing, unknown, of another shape, or of a dtype that is not read.
    """
    family = FAMILIES[config.model_type]
    stored: Stored = {}
    for name, ours in whole_tensors(config):
        if name in apart:
            continue
        stored[name] = [(part, files[part.name]) for part in family.stored(name, ours, config)]
    for part, theirs in (pair for pairs in stored.values() for pair in pairs):
        if theirs.shape != tuple(part.shape):
            raise LiaoyuanError(
                f"{files.folder}: {part.name} has shape {theirs.shape}, but config.json asks for {tuple(part.shape)}."
            )
        if theirs.dtype not in READABLE:
            raise LiaoyuanError(
                f"{files.folder}: {part.name} is stored as {theirs.dtype}; weights are read from {', '.join(READABLE)}."
            )
    _refuse_unknown(files, {part.name for pairs in stored.values() for part, _ in pairs} | set(known), config)
    return stored


def whole_tensors(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the form (on the meta device) of all that a model of this config holds, in its order."""
    with torch.device("meta"):
        model = Decoder(config)
    yield from model.state_dict().items()  # outside: whoever iterates goes on on the device of his own


def fill_tensors(own: Mapping[str, Tensor], stored: Stored, report: Report = silent) -> None:
    """Read the tensors `own` (whole, or DTensors) from their parts, in the order in which those lie in the files."""
    filler = Filler()
    count = Count(sum(local(tensor).nbytes for tensor in own.values()), report)
    for name, parts in _in_order(stored):
        fill_tensor(own[name], parts, filler)
        count.add(local(own[name]).nbytes)


def fill_tensor(tensor: Tensor, parts: list[tuple[Part, StoredTensor]], filler: Filler) -> None:
    """Read one tensor from its parts; of a DTensor only what this process holds of it."""
    offsets, sizes = own_block(tensor)
    mine = local(tensor.detach())
    if not mine.numel():
        return
    row = tensor.shape[1:].numel()
    is_direct = sizes[1:] == tuple(tensor.shape[1:]) and mine.is_contiguous()
    rows = mine if is_direct else torch.empty(sizes[0], *tensor.shape[1:], dtype=mine.dtype)
    block = Block(rows.view(-1), offsets[0] * row if offsets else 0)
    for part, theirs in parts:
        filler.fill(block, part, theirs)
    if not is_direct:
        for dim, (start, size) in enumerate(zip(offsets[1:], sizes[1:], strict=True), 1):
            rows = rows.narrow(dim, start, size)
        mine.copy_(rows)


def _kept_names(few: Iterable[str], whole: Mapping[str, Tensor], config: ModelConfig) -> set[str]:
    """Return the names that the tensors of quantised weights may have in the files."""
    family = FAMILIES[config.model_type]
    parts = [part for name in few for part in family.stored(name, whole[name], config)]
    return {f"{part.name}{suffix}" for part in parts for suffix in SUFFIXES}


def _in_order(stored: Stored) -> list[tuple[str, list[tuple[Part, StoredTensor]]]]:
    return sorted(stored.items(), key=lambda item: _place(item[1]))


def _place(parts: list[tuple[Part, StoredTensor]]) -> tuple[Path, int]:
    return min((stored.path, stored.start) for _, stored in parts)


def save_model(
    model: Decoder | ModelConfig,
    folder: Path,
    tokenizer_folder: Path | None = None,
    state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the folder that `load_model` and transformers read, atomically: config, weights, tokenizer files.

    `state` gives the whole weights and buffers by name where the model itself is not at hand. As an iterator it is
    written as it comes, in any order, so that one tensor at a time need be in memory. Weights of more than
    `max_shard_bytes` are spread over several files with an index.

    Raises:
        LiaoyuanError: the disk is full, or `state` lacks a tensor; the folder is as it was.
    """
    config = model.config if isinstance(model, Decoder) else model
    if isinstance(model, Decoder) and quantisation_of(model) is not None:
        with atomic_folder(folder) as target:
            save_quantised(model, target)
            if tokenizer_folder:
                copy_files(tokenizer_folder, target, TOKENIZER_FILES)
        return
    if state is None:
        assert isinstance(model, Decoder)
        state = named_tensors(model)
    with atomic_folder(folder) as target:
        (target / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        write_weights(target, config, state.items() if isinstance(state, Mapping) else state, max_shard_bytes)
        if tokenizer_folder:
            copy_files(tokenizer_folder, target, TOKENIZER_FILES)


def save_program(program: Program, folder: Path, tokenizer_folder: Path | None, world: World) -> None:
    """Write a model that is laid out over processes as `save_model` does. Every process makes the call and holds one
    whole tensor at a time; the first one writes.
    """
    weights = program.whole_tensors()
    try:
        if world.is_first:
            save_model(program.config, folder, tokenizer_folder, weights)
    finally:
        for _ in weights:  # the others gather too, and do not wait for ever if the first one could not write
            pass
    world.barrier()


def write_weights(
    target: Path,
    config: ModelConfig,
    state: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    report: Report = silent,
) -> None:
    """Write the weight files of a model into an existing folder, in the dtype of `config`; see `save_model`."""
    family = FAMILIES[config.model_type]
    slots = [
        Slot(part.name, stored_dtype(name, config), tuple(part.shape))
        for name, ours in whole_tensors(config)
        for part in family.written(name, ours, config)
    ]
    with ShardWriter(target, plan_shards(slots, max_shard_bytes), report) as writer:
        for name, ours in state:
            dtype = stored_dtype(name, config)
            for part in family.written(name, ours.detach().cpu(), config):
                writer.write(part.name, part.write().to(dtype).contiguous())
            del ours, part  # before the next one is made: two may not fit
        if writer.missing:
            raise LiaoyuanError(f"The weights to write lack '{writer.missing[0]}': nothing was written.")


def copy_files(source: Path, target: Path, names: Iterable[str]) -> list[str]:
    """Copy the files of these names that are in `source`; return which they are."""
    found = [name for name in names if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def _refuse_unknown(files: WeightFiles, expected: set[str], config: ModelConfig) -> None:
    family = FAMILIES[config.model_type]
    if config.tie_word_embeddings:
        expected = expected | {"lm_head.weight"}  # some writers repeat the tied table
    unknown = [name for name in files if name not in expected and not family.is_unused(name, config)]
    if unknown:
        raise LiaoyuanError(
            f"{files.folder}: the weights hold '{unknown[0]}'"
            f"{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}, "
            f"which a {config.model_type} model of this config.json does not have."
        )


def stored_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """Return the dtype of a tensor in a folder: a router's balancing bias stays fp32, as transformers keeps it."""
    return torch.float32 if name.endswith("e_score_correction_bias") else config.torch_dtype
