"""Hugging Face folders in and out: `config.json` and safetensors, nothing else is read and nothing is run.

Our decoder merges projections that read the same input; each family's file says which of its tensors fill which of
ours (`models/stored.py`). Loading goes tensor by tensor, so no second copy of the weights is ever held.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig, read_config, with_dtype
from liaoyuan.models.families import FAMILIES
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
    for buffer in model.buffers():
        buffer.zero_()
    load_weights(model, folder)
    return model.eval()


def load_weights(model: Decoder, folder: Path) -> None:
    """Copy the weights of `folder` into `model` (on any device, in any dtype); see `load_model`."""
    family = FAMILIES[model.config.model_type]
    with _Weights(folder) as weights, torch.no_grad():
        _refuse_unknown(model, weights, folder)
        for name, ours in named_tensors(model):
            for part in family.stored(name, ours, model.config):
                theirs = weights.read(part.name)
                if theirs.shape != part.shape:
                    raise LiaoyuanError(
                        f"{folder}: {part.name} has shape {tuple(theirs.shape)}, "
                        f"but config.json asks for {tuple(part.shape)}."
                    )
                part.read(theirs)


def named_tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the tensor of all that a model folder holds: weights and persistent buffers."""
    yield from model.state_dict().items()


def save_model(
    model: Decoder | ModelConfig,
    folder: Path,
    tokenizer_folder: Path | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the folder that `load_model` and transformers read, atomically: config, weights, tokenizer files.

    `state` gives the whole weights and buffers by name where the model itself is not at hand.
    """
    config = model.config if isinstance(model, Decoder) else model
    if state is None:
        assert isinstance(model, Decoder)
        state = dict(named_tensors(model))
    family = FAMILIES[config.model_type]
    stored = {
        part.name: part.write().to(_stored_dtype(name, config)).contiguous()
        for name, ours in state.items()
        for part in family.stored(name, ours.detach().cpu(), config)
    }
    with atomic_folder(folder) as target:
        (target / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        save_file(stored, target / WEIGHTS, metadata={"format": "pt"})
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


def _refuse_unknown(model: Decoder, weights: _Weights, folder: Path) -> None:
    config = model.config
    family = FAMILIES[config.model_type]
    expected = {part.name for name, ours in named_tensors(model) for part in family.stored(name, ours, config)}
    if config.tie_word_embeddings:
        expected.add("lm_head.weight")  # some writers repeat the tied table
    unknown = [name for name in weights if name not in expected and not family.is_unused(name, config)]
    if unknown:
        raise LiaoyuanError(
            f"{folder}: the weights hold '{unknown[0]}'{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}, "
            f"which a {config.model_type} model of this config.json does not have."
        )


def _stored_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """Return the dtype of a tensor in a folder: a router's balancing bias stays fp32, as transformers keeps it."""
    return torch.float32 if name.endswith("e_score_correction_bias") else config.torch_dtype
