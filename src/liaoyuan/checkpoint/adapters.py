"""Low-rank adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

An adapter is taken whole or refused: every tensor must fit a projection of the model, every projection that the config
names must have its two tensors, and nothing in the config may ask for what is not done here. `save_adapter` writes the
same two files.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder
from liaoyuan.models.lora import LowRank, Magnitudes, Pair, Part, magnitudes_of, merge, parts_of, projections
from liaoyuan.rundir import atomic_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What of the config is read, and what says nothing of the result.
READ = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern"}
READ |= {"layers_to_transform", "exclude_modules", "init_lora_weights", "bias"}
SILENT = {"base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout", "auto_mapping"}
SILENT |= {"layers_pattern", "megatron_core", "peft_version", "eva_config", "runtime_config"}
SILENT |= {"qalora_group_size"}  # of use_qalora, which is refused
REFUSED = {  # with a value other than none
    "use_dora": "it is a DoRA, whose magnitudes need the norms of the whole weights; merge it into the model first",
    "modules_to_save": "it replaces whole modules, which cannot differ from row to row; merge it into the model",
    "target_parameters": "adapters of stacked parameters (experts) are not supported",
    "fan_in_fan_out": "weights stored as [in, out] belong to other families",
    "layer_replication": "it repeats layers, so it belongs to another model; merge it into one",
    "trainable_token_indices": "it changes the embedding; merge it into the model instead",
    "lora_bias": "biases of adapters are not supported; train it with lora_bias=False",
}
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the base weights too


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """An adapter as the model's projections take it: A [R, K] and B [O, R] of each, the scale in B.

    rank: the highest of a part. digest: 32 hexadecimal digits, of equal adapters alone the same, in any process.
    magnitudes: of a DoRA that is read to be merged.
    """

    weights: dict[str, Pair]
    rank: int
    digest: str
    magnitudes: dict[str, Magnitudes] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[tuple[str, int], ...]:
        """What two adapters must have in common to be stacked: which projections, with how many dimensions."""
        return tuple(sorted((name, len(a)) for name, (a, _) in self.weights.items()))


def read_adapter(
    folder: Path, model: Decoder, device: torch.device | None = None, merging: bool = False
) -> AdapterWeights:
    """Return the adapter in `folder` for `model`, in its dtype and on its device, or on another one.

    merging: in fp32, and a DoRA is read too.

    Raises:
        LiaoyuanError: a file is missing, torn, or made for another model, or asks for what is not supported.
    """
    read = _read(folder, model, {"use_dora"} if merging else set())
    place = model.embed_tokens.weight
    dtype, where = (torch.float32 if merging else place.dtype), device or place.device
    merged, magnitudes = {}, {}
    for name, of in read.parts.items():
        if any(part.name in read.pairs for part in of):
            a, b = merge(of, read.pairs, projections(model)[name].weight.shape[0])
            merged[name] = (a.to(where, dtype), b.to(where, dtype))
        found = magnitudes_of(of, read.norms)
        if found is not None:
            magnitudes[name] = found
    return AdapterWeights(merged, max(len(a) for a, _ in read.pairs.values()), _digest(merged), magnitudes)


def put_adapter(folder: Path, model: Decoder) -> None:
    """Put the adapter in `folder` on the projections of `model` as training has it; a DoRA too.

    Raises:
        LiaoyuanError: see `read_adapter`.
    """
    read, modules, place = _read(folder, model, {"use_dora"}), projections(model), model.embed_tokens.weight.device
    for name, of in read.parts.items():
        module = modules[name]
        pairs = {part.name: read.pairs[part.name] for part in of if part.name in read.pairs}
        if not pairs:
            continue
        adapter = LowRank(of, pairs, 1.0, module.weight.shape[0])
        if read.norms:
            adapter.with_magnitudes(module)
            for part, vector in zip(adapter.parts, adapter.lora_magnitude_vector, strict=True):
                vector.data.copy_(read.norms[part.name])
        module.adapter = adapter.requires_grad_(False).to(place).eval()


@dataclass(frozen=True, eq=False)
class _Read:
    """An adapter by the names of the family's files, in fp32: pairs with the scale in B, and a DoRA's norms.

    parts: of each of our projections.
    """

    parts: dict[str, list[Part]]
    pairs: dict[str, Pair]
    norms: dict[str, Tensor]


def _read(folder: Path, model: Decoder, taken: Collection[str]) -> _Read:
    """Read and check an adapter; taken: words of the config that are not refused."""
    config, tensors = _read_config(folder, taken), _read_tensors(folder)
    modules = projections(model)
    parts = {name: parts_of(name, module, model.config) for name, module in modules.items()}
    norms = _take_magnitudes(folder, tensors, bool(config.get("use_dora")))
    pairs = _pairs(folder, tensors)
    depths = {part.name: (len(part.rows), modules[name].weight.shape[1]) for name, of in parts.items() for part in of}
    _check_shapes(folder, pairs, depths, config)
    _check_complete(folder, pairs, depths, config)
    _check_magnitudes(folder, norms, pairs, bool(config.get("use_dora")))
    scaled = {name: (a.float(), b.float() * _scale(config, name, len(a))) for name, (a, b) in pairs.items()}
    return _Read(parts, scaled, norms)


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
    """Write an adapter as PEFT does, whole or not at all.

    Args:
        tensors: of each part's name of the family's files and half, as "model.layers.0.self_attn.q_proj.lora_A".
        words: of the config, beside what every adapter of ours has.
    """
    suffixes = {"lora_A": ".weight", "lora_B": ".weight", "lora_magnitude_vector": ""}
    named = {
        f"{PREFIX}{name}{suffixes[name.rpartition('.')[2]]}": tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    common = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
    with atomic_folder(folder) as part:
        save_file(named, part / WEIGHTS, {"format": "pt"})
        text = json.dumps({**common, **words}, indent=2, sort_keys=True)
        (part / CONFIG).write_text(text + "\n", encoding="utf-8")


def base_of(folder: Path) -> Path:
    """Return the model folder that an adapter names as the one it belongs to.

    Raises:
        LiaoyuanError: it is no adapter, or names no folder that is here.
    """
    name = _read_config(folder, REFUSED).get("base_model_name_or_path")
    if not isinstance(name, str) or not Path(name).is_dir():
        raise LiaoyuanError(
            f"The adapter {folder} was trained on {name!r}, which is no folder here: name its model's with --model."
        )
    return Path(name)


def _read_config(folder: Path, taken: Collection[str] = ()) -> dict[str, Any]:
    path = folder / CONFIG
    if not folder.is_dir():
        raise LiaoyuanError(f"The adapter folder {folder} does not exist.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LiaoyuanError(f"{folder} is no adapter: it has no {CONFIG}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise LiaoyuanError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise LiaoyuanError(f"{path}: peft_type is {kind!r}; adapters of the type 'LORA' are read.")
    _refuse_unsupported({name: value for name, value in config.items() if name not in taken}, path)
    for name, good in (("r", _is_rank(config.get("r"))), ("lora_alpha", _is_number(config.get("lora_alpha")))):
        if not good:
            raise LiaoyuanError(f"{path}: '{name}' must be a number above 0 (it is {config.get(name)!r}).")
    for name, is_good in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        table = config.get(name) or {}
        if not isinstance(table, dict) or not all(_is_plain(key) and is_good(value) for key, value in table.items()):
            raise LiaoyuanError(f"{path}: '{name}' must give a number to each name of a module, and no patterns.")
    return config


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    for name, value in config.items():
        if name in REFUSED and value not in (None, False, [], {}):
            raise LiaoyuanError(f"{path}: '{name}' is not supported: {REFUSED[name]}.")
        if name not in READ | SILENT | REFUSED.keys() and value not in (None, False, [], {}):
            raise LiaoyuanError(f"{path}: '{name}' is {value!r}, which is not known here: only plain LoRA is read.")
    if config.get("bias", "none") != "none":
        raise LiaoyuanError(f"{path}: bias is {config['bias']!r}: biases are not trained per adapter; only 'none' is.")
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        start = config["init_lora_weights"]
        raise LiaoyuanError(f"{path}: init_lora_weights is {start!r}, which changes the base weights too: convert it.")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.exists():
        pickle = (
            " adapter_model.bin is a pickle, which is never opened." if (folder / "adapter_model.bin").exists() else ""
        )
        raise LiaoyuanError(f"{folder} is no adapter: it has no {WEIGHTS}.{pickle}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise LiaoyuanError(f"The adapter file {path} is truncated or corrupt ({error}); copy it again.") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise LiaoyuanError(f"The adapter file {path} has numbers in '{name}' that are infinite or none at all.")
    return tensors


def _take_magnitudes(folder: Path, tensors: dict[str, Tensor], is_dora: bool) -> dict[str, Tensor]:
    """Take the magnitudes of a DoRA, by projection of the family's files, out of `tensors`."""
    ending = ".lora_magnitude_vector"
    found = {name: tensors.pop(name).float() for name in list(tensors) if name.endswith(ending)}
    if found and not is_dora:
        raise LiaoyuanError(f"{folder}: the adapter has magnitudes, but its config does not say 'use_dora'.")
    return {name.removeprefix(PREFIX).removesuffix(ending): value for name, value in found.items()}


def _check_magnitudes(folder: Path, norms: Mapping[str, Tensor], pairs: Mapping[str, Pair], is_dora: bool) -> None:
    for name, (_, b) in pairs.items():
        if is_dora and (name not in norms or norms[name].shape != b.shape[:1]):
            raise LiaoyuanError(f"{folder}: the DoRA lacks magnitudes of '{name}' for its {len(b)} outputs.")


def _pairs(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Pair]:
    """Return A and B of each projection of the family's files."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stem = name.removeprefix(PREFIX).removesuffix(".weight")
        module, _, half = stem.rpartition(".")
        if half not in ("lora_A", "lora_B") or not name.startswith(PREFIX) or not name.endswith(".weight"):
            raise LiaoyuanError(f"{folder}: the adapter has '{name}', which is not a low-rank part of a projection.")
        halves.setdefault(module, {})[half] = tensor
    if not halves:
        raise LiaoyuanError(f"{folder}: the adapter has no tensors.")
    alone = next((module for module, both in halves.items() if len(both) < 2), None)
    if alone is not None:
        raise LiaoyuanError(f"{folder}: of '{alone}' the adapter has only {next(iter(halves[alone]))}; copy it again.")
    return {module: (both["lora_A"], both["lora_B"]) for module, both in halves.items()}


def _check_shapes(
    folder: Path, pairs: Mapping[str, Pair], sizes: Mapping[str, tuple[int, int]], config: Mapping[str, Any]
) -> None:
    for name, (a, b) in pairs.items():
        if name not in sizes:
            raise LiaoyuanError(
                f"{folder}: the adapter changes '{name}', which is no projection of this model's layers."
            )
        rank, (out, depth) = _of(config, "rank_pattern", name, config["r"]), sizes[name]
        if a.shape != (rank, depth) or b.shape != (out, rank):
            raise LiaoyuanError(
                f"{folder}: of '{name}' the adapter has A {list(a.shape)} and B {list(b.shape)}; this model and rank "
                f"{rank} need [{rank}, {depth}] and [{out}, {rank}]."
            )


def _check_complete(folder: Path, pairs: Mapping[str, Pair], known: Iterable[str], config: Mapping[str, Any]) -> None:
    """Refuse an adapter that lacks a projection which its config names: half of one would answer, and wrongly."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not isinstance(targets, list) or config.get("exclude_modules"):
        return  # a pattern: what it means for this model is not worked out
    chosen = [layers] if isinstance(layers, int) else layers
    for name in known:
        layer = int(name.split(".layers.")[1].split(".")[0])
        if chosen is not None and layer not in chosen:
            continue
        if any(_is_within(name, target) for target in targets) and name not in pairs:
            raise LiaoyuanError(f"{folder}: the adapter lacks '{name}', which its target_modules name; copy it again.")


def _digest(weights: Mapping[str, Pair]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        for tensor in weights[name]:
            state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            state.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Return lora_alpha / r, or over its root as rank-stabilised LoRA has it (Kalajdzievski 2023, arXiv 2312.03732)."""
    alpha: float = _of(config, "alpha_pattern", name, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _of(config: Mapping[str, Any], pattern: str, name: str, otherwise: Any) -> Any:
    table = config.get(pattern) or {}
    return next((value for key, value in table.items() if _is_within(name, key)), otherwise)


def _is_within(name: str, ending: Any) -> bool:
    """Return whether a module's name is `ending`, or ends with it after a dot."""
    return name == ending or name.endswith(f".{ending}")


def _is_plain(key: Any) -> bool:
    return isinstance(key, str) and key.replace(".", "").replace("_", "").isalnum()


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
