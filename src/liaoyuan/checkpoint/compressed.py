"""Folders whose weights have few bits, in the format `compressed-tensors` of transformers and vLLM.

Weights of 8 and 4 bits are "pack-quantized" (`weight_packed`, int32, the first in the lowest bits; `weight_scale`;
`weight_zero_point` packed along the outputs), fp8 is "float-quantized" (`weight`, `weight_scale`). What such a folder
says besides, of activations for instance, is refused rather than passed over.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from liaoyuan.checkpoint.weight_files import StoredTensor, WeightFiles
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, Quantisation
from liaoyuan.models.families import FAMILIES
from liaoyuan.models.quantised import HEAD
from liaoyuan.models.quantised_linear import QuantisedLinear
from liaoyuan.models.stored import Part
from liaoyuan.ops.quantised_linear import GROUPS, Kind, pack_nibbles, unpack_nibbles

KEY = "quantization_config"
LAYERS, HEADS = r"re:.*layers\.\d+\..*proj(_with_mqa)?$", r"re:.*lm_head$"
KINDS: dict[str, Kind] = {"int8": "int8", "int4": "int4", "float8": "fp8"}
BITS = {"int8": 8, "int4": 4, "fp8": 8}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
SUFFIXES = ("", "_packed", "_scale", "_shape", "_zero_point")  # of a weight's name
ROUTERS = ("gate", "router")


def quantisation_of(model: Decoder) -> Quantisation | None:
    """Return how a model's weights are quantised; None: they are whole."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    head = found.pop(HEAD, None)
    if not found:
        return None
    one = next(iter(found.values()))
    return Quantisation(one.kind, one.group, one.symmetric, None if head is None else head.kind)


def quantisation_words(how: Quantisation) -> dict[str, Any]:
    """Return the `quantization_config` of a `config.json`."""
    groups = {"group_0": _group(how, LAYERS)}
    if how.of_head is not None:
        groups["group_1"] = _group(how.of_head, HEADS)
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [] if how.head else [HEAD],
        "kv_cache_scheme": None,
    }


def read_quantisation(folder: Path) -> Quantisation | None:
    """Return how the weights in `folder` are quantised; None: they are whole.

    Raises:
        LiaoyuanError: they are in a way that is not known here.
    """
    values = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(KEY)
    if values is None:
        return None
    where = f"{folder / 'config.json'}: {KEY}"
    if not isinstance(values, dict) or values.get("quant_method") != "compressed-tensors":
        method = values.get("quant_method") if isinstance(values, dict) else values
        raise LiaoyuanError(f"{where}: weights quantised by {method!r} are not read; 'compressed-tensors' are.")
    groups = values.get("config_groups")
    found = {
        target: _read_group(group, where)
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict)
        for target in group.get("targets", [])
    }
    ignored = {name for name in values.get("ignore") or [] if str(name).rsplit(".", 1)[-1].strip("$") not in ROUTERS}
    is_known = bool(found) and set(found) <= {LAYERS, HEADS, "Linear"} and ignored <= {HEAD}
    if not is_known or values.get("kv_cache_scheme"):
        raise LiaoyuanError(f"{where}: some modules are quantised otherwise than others, which is not supported.")
    layers = found.get(LAYERS) or found.get("Linear")
    head = None if HEAD in ignored else found.get(HEADS) or found.get("Linear")
    if layers is None or (head is not None and head.group is not None):
        raise LiaoyuanError(f"{where}: layers are not quantised, or the output head has groups; neither is supported.")
    return Quantisation(layers.kind, layers.group, layers.symmetric, None if head is None else head.kind)


def save_quantised(model: Decoder, folder: Path) -> None:
    """Write config and weights of a quantised model into an existing folder."""
    how = quantisation_of(model)
    assert how is not None, "the model's weights are whole"
    words = model.config.to_dict() | {KEY: quantisation_words(how)}
    if how.head:
        words["tie_word_embeddings"] = False  # the head has weights of its own now
    (folder / "config.json").write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
    save_file(dict(_stored(model)), folder / "model.safetensors", {"format": "pt"})


def read_kept(model: Decoder, name: str, parts: list[Part], files: WeightFiles, whole: Tensor) -> dict[str, Tensor]:
    """Return the quantised weight `name` of `model` from its parts in the files, as a `QuantisedLinear` names and lays
    out its own, on the CPU; `whole`: the form of the whole weight, on any device.
    """
    target = _target(model, name)
    assert target is not None
    depth = whole.shape[-1]
    group = target.group or max(depth, 1)
    steps = torch.empty(*whole.shape[:-1], depth, dtype=torch.uint8)
    scales = torch.empty(*whole.shape[:-1], -(-depth // group), dtype=torch.bfloat16)
    zeros = None if target.symmetric else torch.empty(scales.shape, dtype=torch.uint8)
    family = FAMILIES[model.config.model_type]
    places = [family.stored(name, ours, model.config) for ours in (steps, scales, zeros) if ours is not None]
    for number, part in enumerate(parts):
        theirs = _read_part(files, part, target, depth, scales.shape[-1])
        for place, values in zip(places, theirs, strict=True):
            _put(place[number], values)
    flat = steps.view(-1, depth)
    kept = pack_nibbles(flat) if target.kind == "int4" else flat
    found = {"data": kept.view(torch.int8) ^ -128 if target.kind == "int8" else kept, "scales": scales.flatten(0, -2)}
    return found if zeros is None else found | {"zeros": zeros.flatten(0, -2)}


def fill_quantised(model: Decoder, name: str, parts: list[Part], files: WeightFiles, whole: Tensor) -> None:
    """Fill the quantised weight `name` of `model` from its parts in the files; see `read_kept`."""
    target, device = _target(model, name), model.embed_tokens.weight.device
    for leaf, value in read_kept(model, name, parts, files, whole).items():
        setattr(target, leaf, value.to(device))


def is_quantised(model: Decoder, name: str) -> bool:
    """Return whether the model keeps the tensor `name` of a whole model in few bits."""
    return _target(model, name) is not None


def _target(model: Decoder, name: str) -> QuantisedLinear | None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    found = module if leaf == "weight" else getattr(module, leaf, None)
    return found if isinstance(found, QuantisedLinear) else None


def _group(how: Quantisation, target: str) -> dict[str, Any]:
    group = how.group_size
    weights = {
        "num_bits": BITS[how.kind],
        "type": "float" if how.kind == "fp8" else "int",
        "symmetric": how.symmetric,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
    }
    form = "float-quantized" if how.kind == "fp8" else "pack-quantized"
    none = {"input_activations": None, "output_activations": None}
    return {"targets": [target], "weights": weights, "format": form, **none}


def _read_group(group: Mapping[str, Any], where: str) -> Quantisation:
    weights = group.get("weights") or {}
    kind = KINDS.get(f"{weights.get('type')}{weights.get('num_bits')}")
    size = weights.get("group_size") if weights.get("strategy") == "group" else None
    symmetric = bool(weights.get("symmetric", True))
    if kind is None or weights.get("strategy") not in ("group", "channel") or weights.get("actorder"):
        raise LiaoyuanError(f"{where}: weights of this kind are not supported: {json.dumps(weights)[:300]}.")
    if size not in GROUPS[kind] or (not symmetric and kind != "int4"):
        raise LiaoyuanError(
            f"{where}: {kind} weights with groups of {size} are not supported, or not with zero points."
        )
    if group.get("input_activations") or group.get("output_activations"):
        raise LiaoyuanError(f"{where}: it asks for activations of few bits; only weights are quantised here.")
    return Quantisation(kind, size, symmetric)


def _stored(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the folder."""
    config, family = model.config, FAMILIES[model.config.model_type]
    with torch.device("meta"):
        forms = dict(Decoder(config).state_dict())
    if isinstance(model._modules.get(HEAD), QuantisedLinear):
        forms[f"{HEAD}.weight"] = forms["embed_tokens.weight"]
    own = model.state_dict()
    for name, form in forms.items():
        target = _target(model, name)
        if target is None:
            for part in family.stored(name, own[name].cpu(), config):
                yield part.name, part.write().contiguous().clone()
            continue
        kinds = [values.view(*form.shape[:-1], values.shape[-1]) for values in _unpacked(target)]
        for pieces in zip(*(family.stored(name, values, config) for values in kinds), strict=True):
            yield from _written(pieces, target)


def _written(pieces: tuple[Part, ...], target: QuantisedLinear) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one projection of the family's files; pieces: its steps, scales and perhaps zeros."""
    stem, rows = pieces[0].name.removesuffix(".weight"), pieces[0].shape[0]
    steps, scales, *zeros = (piece.write().reshape(rows, -1) for piece in pieces)
    yield f"{stem}.weight_scale", scales.contiguous()
    if target.kind == "fp8":
        yield f"{stem}.weight", steps.contiguous().view(torch.float8_e4m3fn)
        return
    bits = BITS[target.kind]
    yield f"{stem}.weight_packed", _words(steps, bits)
    yield f"{stem}.weight_shape", torch.tensor(steps.shape)
    if zeros:
        yield f"{stem}.weight_zero_point", _words(zeros[0].t(), bits).t().contiguous()


def _unpacked(target: QuantisedLinear) -> list[Tensor]:
    """Return a weight's steps uint8 [O, K] (of int8, raised by 128; of fp8, its bits), scales and zeros."""
    data = target.data.cpu()
    if target.kind == "int4":
        steps = unpack_nibbles(data)[:, : target.shape[1]].contiguous()
    else:
        steps = (data ^ -128).view(torch.uint8) if target.kind == "int8" else data
    return [steps, target.scales.cpu(), *([] if target.zeros is None else [target.zeros.cpu()])]


def _words(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 [R, C] of so many bits each into int32, along the columns."""
    filled = F.pad(values, (0, -values.shape[1] % (32 // bits))).contiguous()
    packed = filled if bits == 8 else filled[:, 0::2] | filled[:, 1::2] << 4
    return packed.flatten().view(torch.int32).view(len(values), -1)


def _bytes(words: Tensor, bits: int, count: int) -> Tensor:
    """The way back of `_words`: uint8 [R, count]."""
    packed = words.flatten().view(torch.uint8).view(len(words), -1)
    values = packed if bits == 8 else torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    return values[:, :count]


def _read_part(files: WeightFiles, part: Part, target: QuantisedLinear, depth: int, groups: int) -> list[Tensor]:
    stem, rows = part.name.removesuffix(".weight"), part.shape[0]
    bits = BITS[target.kind]
    scales = _tensor(files[f"{stem}.weight_scale"], (rows, groups)).to(torch.bfloat16)
    if target.kind == "fp8":
        return [_tensor(files[f"{stem}.weight"], (rows, depth)).view(torch.uint8), scales]
    words = _tensor(files[f"{stem}.weight_packed"], (rows, -(-depth * bits // 32)))
    found = [_bytes(words, bits, depth), scales]
    if not target.symmetric:
        zeros = _tensor(files[f"{stem}.weight_zero_point"], (-(-rows * bits // 32), groups))
        found.append(_bytes(zeros.t(), bits, rows).t())
    return found


def _tensor(stored: StoredTensor, shape: tuple[int, ...]) -> Tensor:
    if stored.shape != shape or stored.dtype not in DTYPES:
        raise LiaoyuanError(f"{stored.path}: a quantised weight is {stored.dtype} {stored.shape}, and not {shape}.")
    found = torch.empty(shape, dtype=DTYPES[stored.dtype])
    stored.read([memoryview(found.view(torch.uint8).view(-1).numpy())], 0)  # type: ignore[arg-type]
    return found


def _put(part: Part, values: Tensor) -> None:
    """Fill a part's view with the file's rows: the way back of `Part.write`."""
    theirs = values.reshape(part.view.shape)
    if part.order is not None:
        theirs = theirs.index_select(part.dim, torch.tensor(part.order))
    part.view.copy_(theirs)
