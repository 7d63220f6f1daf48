"""From one folder of weights to another: other dtype, other shards, a training state to a model folder or back.

Everything that can be refused is refused before anything is written; the target appears whole or not at all.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from liaoyuan.checkpoint.hugging_face import (
    MAX_SHARD_BYTES,
    TOKENIZER_FILES,
    copy_files,
    stored_dtype,
    whole_tensors,
    write_weights,
)
from liaoyuan.checkpoint.reading import Damaged
from liaoyuan.checkpoint.sources import Source, damaged, read_all
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import ModelConfig
from liaoyuan.rundir import Report, atomic_folder, silent

FURTHER_FILES = (  # of tokenizers that have several files, and what must go wherever the weights go
    *("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "chat_template.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md", "liaoyuan.json", "trained_on.bin"),
    "liaoyuan_reward.json",
)


@dataclass(frozen=True)
class Converted:
    """What was written: weight bytes, weight files, other files, and the tensors that were left out."""

    dtype: str
    bytes: int
    shards: int
    files: list[str]
    left_out: list[str]


def convert_to_folder(
    source: Source,
    target: Path,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer_folder: Path | None = None,
    report: Report = silent,
) -> Converted:
    """Write the model of `source` as a Hugging Face folder, in `dtype` (its own if None). One tensor is held at a time.

    A folder's `config.json` keeps its own words, but for the dtype.

    Raises:
        LiaoyuanError: the source is damaged, the disk full, or a value too large for the dtype; nothing is written.
    """
    config = replace(source.config, dtype=dtype or source.config.dtype)
    refuse_without_room(target, weight_bytes(config))
    try:
        with atomic_folder(target) as part:
            (part / "config.json").write_text(json.dumps(_words(source, config), indent=2) + "\n", encoding="utf-8")
            write_weights(part, config, read_all(source, config), max_shard_bytes, report)
            beside = tokenizer_folder or source.tokenizer_folder
            files = copy_files(beside, part, (*TOKENIZER_FILES, *FURTHER_FILES)) if beside else []
            shards = sorted(part.glob("*.safetensors"))
            size = sum(path.stat().st_size for path in shards)
    except Damaged as error:
        raise damaged(source.folder, error) from error
    return Converted(config.dtype, size, len(shards), files, source.left_out)


def weight_bytes(config: ModelConfig) -> int:
    """Return the bytes of the weights in a folder."""
    return sum(ours.numel() * stored_dtype(name, config).itemsize for name, ours in whole_tensors(config))


def refuse_without_room(target: Path, needed: int) -> None:
    """Raise LiaoyuanError if the disk of `target` has fewer than `needed` bytes."""
    place = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise LiaoyuanError(f"{target} needs {needed / 1e9:,.1f} GB, but its disk has only {free / 1e9:,.1f} GB free.")


def refuse_target(target: Path, source: Path, force: bool, mark: str) -> None:
    """Check that nothing is lost when `target` is written.

    Raises:
        LiaoyuanError: it is a file, holds something (without `force`, or what `force` does not replace: a folder
            without `mark`, a file or folder that every target has), or the source lies in it.
    """
    if target.is_file():
        raise LiaoyuanError(f"{target} is a file: name a folder to write to.")
    if not target.exists() or not any(target.iterdir()):
        return
    if source.resolve().is_relative_to(target.resolve()):
        raise LiaoyuanError(f"The source lies in {target}: write to another folder.")
    if not force:
        raise LiaoyuanError(f"{target} exists and is not empty: choose another folder, or replace it with --force.")
    if not (target / mark).exists():
        raise LiaoyuanError(f"{target} has no {mark}, so it is not what --force may replace: delete it yourself.")


def _words(source: Source, config: ModelConfig) -> dict[str, Any]:
    if source.words is None:
        return config.to_dict()
    key = "dtype" if "dtype" in source.words else "torch_dtype"
    words = {**source.words, key: config.dtype}
    if source.left_out:
        words.pop("num_nextn_predict_layers", None)  # the layers that are not there any more
    return words
