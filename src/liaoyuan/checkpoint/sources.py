"""What weights can be taken from: a model folder, or a training state. Either gives whole tensors one at a time."""

import json
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from liaoyuan.checkpoint.adapters import read_adapter
from liaoyuan.checkpoint.filling import Filler
from liaoyuan.checkpoint.hugging_face import fill_tensor, find_parts, stored_dtype, whole_tensors
from liaoyuan.checkpoint.reading import Damaged, is_whole, read_manifest, read_tensors
from liaoyuan.checkpoint.tensors import MODEL, OPTIMISER, TORCH_DTYPES
from liaoyuan.checkpoint.weight_files import PICKLES, WeightFiles
from liaoyuan.checkpoint.writer import MANIFEST, states, step_of
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig, config_from_dict, read_config
from liaoyuan.models.families import FAMILIES
from liaoyuan.models.lora import merged_weight

STATE, RUN_MODEL, RUN_FILE = "state", "model", "config.toml"  # in a run folder


class FolderSource:
    """A Hugging Face folder. Opening it checks all but the weights' values.

    words: its `config.json`; left_out: its tensors that the decoder does without, of layers for predicting further.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, read_config(folder)
        self.words: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.tokenizer_folder: Path | None = folder
        self._files = WeightFiles(folder)
        try:
            self._stored = find_parts(self._files, self.config)
        except BaseException:
            self._files.__exit__()
            raise
        family = FAMILIES[self.config.model_type]
        self.left_out = [name for name in self._files if family.is_unused(name, self.config)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()

    def __str__(self) -> str:
        return f"the model folder {self.folder}"

    def reader(self, config: ModelConfig) -> Callable[[str, torch.Size], Tensor]:
        """Return what reads one of our tensors whole, in the dtype that it has in a folder of `config`."""
        filler = Filler()

        def read(name: str, shape: torch.Size) -> Tensor:
            tensor = torch.empty(shape, dtype=stored_dtype(name, config))
            fill_tensor(tensor, self._stored[name], filler)
            return tensor

        return read


class StateSource:
    """A training state `step-<n>`. For a dtype other than the model's own the optimiser's fp32 masters are read."""

    def __init__(self, state: Path, tokenizer_folder: Path | None = None) -> None:
        """Read the manifest.

        Raises:
            Damaged: it is missing or torn.
            LiaoyuanError: it lacks a tensor of its model.
        """
        self.folder, self._manifest = state, read_manifest(state)
        self.config = config_from_dict(self._manifest["model"], f"the checkpoint {state}")
        self.step = int(self._manifest["step"])
        self.words: dict[str, Any] | None = None
        self.tokenizer_folder, self.left_out = tokenizer_folder, list[str]()
        for name, ours in whole_tensors(self.config):
            entry = self._manifest["tensors"].get(MODEL + name)
            if entry is None or tuple(entry["size"]) != tuple(ours.shape) or not is_whole(entry):
                raise LiaoyuanError(f"{state} does not hold the whole of '{name}' as its model has it.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __str__(self) -> str:
        return f"step {self.step} of the checkpoints in {self.folder.parent}"

    def reader(self, config: ModelConfig) -> Callable[[str, torch.Size], Tensor]:
        """As `FolderSource.reader`.

        Raises (when it is called):
            Damaged: a block is missing or not what its checksum says.
        """

        def read(name: str, shape: torch.Size) -> Tensor:
            key = self._key(name, stored_dtype(name, config))
            tensor = torch.empty(shape, dtype=stored_dtype(name, config))
            alone = {**self._manifest, "tensors": {key: self._manifest["tensors"][key]}}
            read_tensors(self.folder, alone, {key: tensor})
            return tensor

        return read

    def _key(self, name: str, dtype: torch.dtype) -> str:
        saved, master = self._manifest["tensors"], f"{OPTIMISER}{name}.master"
        own = TORCH_DTYPES[saved[MODEL + name]["dtype"]]
        return master if dtype != own and master in saved else MODEL + name


class MergedSource:
    """A Hugging Face folder into whose weights an adapter is merged, in fp32, and rounded once."""

    def __init__(self, base: FolderSource, adapter_folder: Path) -> None:
        """Read the adapter.

        Raises:
            LiaoyuanError: it is torn or of another model; see `read_adapter`.
        """
        self._base, self.adapter_folder = base, adapter_folder
        self.folder, self.config, self.words = base.folder, base.config, base.words
        self.tokenizer_folder, self.left_out = base.tokenizer_folder, base.left_out
        with torch.device("meta"):
            model = Decoder(base.config)
        self._adapter = read_adapter(adapter_folder, model, torch.device("cpu"), merging=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._base.__exit__()

    def __str__(self) -> str:
        return f"the model folder {self.folder} with the adapter {self.adapter_folder}"

    def reader(self, config: ModelConfig) -> Callable[[str, torch.Size], Tensor]:
        """As `FolderSource.reader`."""
        plain, wide = self._base.reader(config), self._base.reader(replace(config, dtype="float32"))

        def read(name: str, shape: torch.Size) -> Tensor:
            pair = self._adapter.weights.get(name.removesuffix(".weight"))
            if pair is None or not name.endswith(".weight"):
                return plain(name, shape)
            magnitudes = self._adapter.magnitudes.get(name.removesuffix(".weight"))
            return merged_weight(wide(name, shape), pair, magnitudes).to(stored_dtype(name, config))

        return read


Source = FolderSource | StateSource | MergedSource


def read_all(source: Source, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight and persistent buffer whole, one at a time, in the dtype of `config`.

    Raises:
        LiaoyuanError: a value is too large for float16.
        Damaged: a part of a training state is not what it was.
    """
    read = source.reader(config)
    for name, ours in whole_tensors(source.config):
        tensor = read(name, ours.shape)
        if tensor.dtype == torch.float16 and config.dtype != source.config.dtype and tensor.isinf().any():
            raise LiaoyuanError(
                f"'{name}' has values beyond 65,504, which float16 cannot hold: choose bfloat16 or float32."
            )
        yield name, tensor
        del tensor  # before the next one is made


def open_source(path: Path, step: int | None = None) -> Source:
    """Return what is at `path`: a model folder, a run folder, its folder of states, or one state.

    Of a run the newest state is taken (or that of `step`), and its model if there is no state.

    Raises:
        LiaoyuanError: there is nothing, or it is damaged.
    """
    if not path.exists():
        raise LiaoyuanError(f"{path} does not exist.")
    if path.is_file():
        raise LiaoyuanError(f"{path} is a file: name the folder of a model or a run.")
    found = states(path) or states(path / STATE)
    if (path / MANIFEST).exists() or path.name.startswith("step-"):
        return _open_state(path)
    if found:
        return _open_state(_chosen(found, step))
    if step is not None:
        raise LiaoyuanError(f"--step {step}: {path} holds no checkpoints.")
    for folder in (path, path / RUN_MODEL):
        if (folder / "config.json").exists():
            return FolderSource(folder)
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    hint = f" ({pickles[0]} is a pickle, which is never opened)" if pickles else ""
    raise LiaoyuanError(
        f"{path} is neither a model folder (with config.json), nor a run, nor a checkpoint (step-...){hint}."
    )


def _chosen(found: list[Path], step: int | None) -> Path:
    chosen = found[0] if step is None else next((state for state in found if step_of(state) == step), None)
    if chosen is None:
        there = ", ".join(str(step_of(state)) for state in reversed(found))
        raise LiaoyuanError(f"{found[0].parent} has no checkpoint of step {step}; it has those of {there}.")
    return chosen


def _open_state(state: Path) -> StateSource:
    run = state.absolute().parent
    try:
        return StateSource(state, tokenizer_of(run.parent if run.name == STATE else run))
    except Damaged as error:
        raise damaged(state, error) from error


def damaged(state: Path, error: Damaged) -> LiaoyuanError:
    """Say that a training state cannot be read, and which others there are."""
    others = [step_of(other) for other in states(state.absolute().parent) if other.name != state.name]
    hint = f" --step {others[0]} is there too." if others else ""
    return LiaoyuanError(f"The checkpoint {state} is truncated or corrupt ({error}).{hint}")


def tokenizer_of(run: Path) -> Path | None:
    """Return the folder of the tokenizer that a run was trained with, if it is still there."""
    candidates = [run / RUN_MODEL]
    try:
        words = tomllib.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        words = {}
    if isinstance(words.get("corpus"), str):
        candidates.append(Path(words["corpus"]) / "tokenizer")
    if isinstance(words.get("model"), str):
        candidates.append(Path(words["model"]))
    return next((folder for folder in candidates if (folder / "tokenizer.json").exists()), None)
