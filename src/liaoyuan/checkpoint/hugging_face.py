"""Hugging Face folders in and out: `config.json` and safetensors, nothing else is read and nothing is run.

Our decoder merges projections that read the same input; `_Layout` says, for each of our tensors, which of
theirs it is made of. Loading goes tensor by tensor, so no second copy of the weights is ever held.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig, read_config, with_dtype
from liaoyuan.models.config import MOE_FAMILY
from liaoyuan.rundir import atomic_folder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class _Layout:
    """Their tensors that make up one of ours, and how: `join(theirs) -> ours`, `split(ours) -> theirs`."""

    names: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]


def load_model(folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Decoder:
    """Return the decoder of a Hugging Face folder, in `dtype` (the one that its config names if None).

    Raises:
        LiaoyuanError: a file is missing, torn or of an unsupported family, or a tensor is missing, unknown or
            of another shape than the config says.
    """
    config = read_config(folder)
    if dtype is not None:
        config = with_dtype(config, dtype)
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device=device)
    load_weights(model, folder)
    return model.eval()


def load_weights(model: Decoder, folder: Path) -> None:
    """Copy the weights of `folder` into `model` (on any device, in any dtype); see `load_model`."""
    with _Weights(folder) as weights:
        _refuse_unknown(model.config, weights, folder)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                layout = _layout(name, model.config)
                theirs = [weights.read(part) for part in layout.names]
                ours = _joined(layout, theirs, name, folder)
                if ours.shape != parameter.shape:
                    raise LiaoyuanError(
                        f"{folder}: {' + '.join(layout.names)} has shape {tuple(ours.shape)}, "
                        f"but config.json asks for {tuple(parameter.shape)}."
                    )
                parameter.copy_(ours)


def save_model(
    model: Decoder,
    folder: Path,
    tokenizer_folder: Path | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the folder that `load_model` and transformers read, atomically: config, weights, tokenizer files.

    `state` gives the whole weights by name where those of `model` are sharded.
    """
    tensors: dict[str, Tensor] = {}
    for name, ours in state.items() if state is not None else model.named_parameters():
        layout = _layout(name, model.config)
        for part, value in zip(layout.names, layout.split(ours.detach().cpu()), strict=True):
            tensors[part] = value.to(model.config.torch_dtype).contiguous()
    with atomic_folder(folder) as target:
        (target / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        (target / WEIGHTS).chmod(0o644)
        for file in TOKENIZER_FILES if tokenizer_folder else ():
            if (tokenizer_folder / file).exists():  # type: ignore[operator]
                shutil.copyfile(tokenizer_folder / file, target / file)  # type: ignore[operator]


class _Weights:
    """The tensors of a folder by name, from one safetensors file or from the shards of an index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {file: _open(folder / file) for file in _shard_names(folder)}
        self._where = {name: file for file, opened in self._files.items() for name in opened.keys()}  # noqa: SIM118

    def __enter__(self) -> "_Weights":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def read(self, name: str) -> Tensor:
        if name not in self._where:
            raise LiaoyuanError(f"{self._folder}: the weights lack '{name}', which config.json asks for.")
        return self._files[self._where[name]].get_tensor(name)


def _shard_names(folder: Path) -> list[str]:
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        raise LiaoyuanError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX} is there.")
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise LiaoyuanError(f"{folder / INDEX} is not a valid weight index.") from error
    for name in names:
        if Path(name).name != name:
            raise LiaoyuanError(f"{folder / INDEX} points outside its folder ('{name}').")
    return names


def _open(path: Path):  # type: ignore[no-untyped-def]  # safe_open has no public type
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise LiaoyuanError(f"The weight file {path} is missing.") from None
    except (SafetensorError, OSError) as error:
        raise LiaoyuanError(f"The weight file {path} is truncated or corrupt ({error}); copy it again.") from error


def _joined(layout: _Layout, theirs: list[Tensor], name: str, folder: Path) -> Tensor:
    try:
        return layout.join(theirs)
    except RuntimeError as error:
        shapes = ", ".join(f"{part} {tuple(x.shape)}" for part, x in zip(layout.names, theirs, strict=True))
        raise LiaoyuanError(f"{folder}: the weights do not fit config.json at {name}: {shapes}.") from error


def _refuse_unknown(config: ModelConfig, weights: _Weights, folder: Path) -> None:
    with torch.device("meta"):
        expected = {part for name, _ in Decoder(config).named_parameters() for part in _layout(name, config).names}
    if config.tie_word_embeddings:
        expected.add("lm_head.weight")  # some writers repeat the tied table
    unknown = [name for name in weights if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise LiaoyuanError(
            f"{folder}: the weights hold '{unknown[0]}'{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}, "
            f"which a {config.model_type} model of this config.json does not have."
        )


def _layout(name: str, config: ModelConfig) -> _Layout:
    """Return where our tensor `name` lives in a Hugging Face folder."""
    if name.startswith("lm_head."):
        return _same(name)
    theirs = f"model.{name}"
    if ".qkv_proj." in name:
        return _merged_attention(theirs, config)
    if ".gate_up_proj" in name and config.model_type == MOE_FAMILY:
        return _same(theirs)
    if ".gate_up_proj." in name:
        parts = tuple(theirs.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj"))
        return _Layout(parts, lambda pair: torch.stack(pair, 1).flatten(0, 1), lambda x: [x[0::2], x[1::2]])
    return _same(theirs)


def _same(name: str) -> _Layout:
    return _Layout((name,), lambda one: one[0], lambda x: [x])


def _merged_attention(theirs: str, config: ModelConfig) -> _Layout:
    heads, width = config.num_key_value_heads, config.head_dim
    groups = config.num_attention_heads // heads
    names = tuple(theirs.replace("qkv_proj", f"{part}_proj") for part in "qkv")

    def join(parts: list[Tensor]) -> Tensor:
        rest = parts[0].shape[1:]
        sizes = (groups, 1, 1)
        blocks = [x.reshape(heads, n * width, *rest) for x, n in zip(parts, sizes, strict=True)]
        return torch.cat(blocks, 1).flatten(0, 1)

    def split(x: Tensor) -> list[Tensor]:
        blocks = x.unflatten(0, (heads, -1)).split([groups * width, width, width], 1)
        return [block.flatten(0, 1) for block in blocks]

    return _Layout(names, join, split)
