"""What `ops compare` and `ops profile` work on: a model from any folder that has one, and tokens to pass through it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from liaoyuan.checkpoint import load_model, quantisation_for
from liaoyuan.checkpoint.sources import open_source, read_all
from liaoyuan.data import Batch, TokenBatches, Tokenizer, TokenStream
from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.models import Decoder, read_config
from liaoyuan.models.config import DTYPES

DOCUMENTS = 3  # in each row of random tokens, so that attention has boundaries to mind


def open_model(
    path: Path, device: torch.device, dtype: str | None = None, gradients: bool = True
) -> tuple[Decoder, Path | None]:
    """Return the model in a model folder, run folder (its newest state) or state, and its tokenizer's folder.

    gradients: of its weights will be asked for. Otherwise a folder that keeps them in few bits is opened too.

    Raises:
        LiaoyuanError: there is none, it is damaged, has no gradients, or there is no such dtype.
    """
    if (path / "config.json").is_file() and read_config(path) and quantisation_for(path, None) is not None:
        if gradients:
            raise LiaoyuanError(
                f"{path} keeps its weights in few bits, which have no gradients: name the model that it was made of."
            )
        return load_model(path, DTYPES[check_dtype(dtype)] if dtype else None, device).train(), path
    with open_source(path) as source:
        config = replace(source.config, dtype=check_dtype(dtype)) if dtype else source.config
        with torch.device("meta"):
            model = Decoder(config)
        model.to_empty(device=device)
        own = model.state_dict()
        for buffer in model.buffers():
            buffer.zero_()
        for name, tensor in read_all(source, source.config):
            own[name].copy_(tensor)
        return model, source.tokenizer_folder


def check_dtype(name: str) -> str:
    """Return the name of a dtype; raises LiaoyuanError if there is none."""
    if name not in DTYPES:
        raise LiaoyuanError(f"There is no dtype '{name}': {', '.join(DTYPES)}{nearest(name, DTYPES) or '.'}")
    return name


def some_batches(
    stream: TokenStream, rows: int, length: int, microbatches: int = 1, rank: int = 0, size: int = 1
) -> list[Batch]:
    """Return this process's microbatches of a global batch of `rows` rows of `length` tokens of the stream."""
    return TokenBatches(stream, 0, rows * length, length, microbatches, rank, size)(0)


def random_stream(vocabulary: int, rows: int, length: int) -> TokenStream:
    """Return a stream that is long enough, of the same random tokens every time."""
    generator = np.random.default_rng(0)
    count = (rows + 1) * length + 1
    starts = np.unique(np.append(generator.integers(0, count - 1, DOCUMENTS * (rows + 1)), 0))
    return TokenStream(generator.integers(0, vocabulary, count).astype(np.uint32), starts)


def text_stream(path: Path, tokenizer_folder: Path | None, rows: int, length: int) -> TokenStream:
    """Return the tokens of a text file as a stream of one document.

    Raises:
        LiaoyuanError: the file cannot be read or is too short, or the model has no tokenizer.
    """
    if tokenizer_folder is None or not (tokenizer_folder / "tokenizer.json").exists():
        raise LiaoyuanError(f"--text {path} needs a model with its tokenizer (tokenizer.json), and there is none.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LiaoyuanError(f"The text {path} cannot be read: {error}.") from error
    tokens = Tokenizer.load(tokenizer_folder).encode(text)
    if len(tokens) <= rows * length:
        raise LiaoyuanError(f"The text {path} has {len(tokens)} tokens, but --tokens asks for {rows * length} and one.")
    enough = np.resize(np.array(tokens, dtype=np.uint32), max(len(tokens), (rows + 1) * length + 1))
    return TokenStream(enough, np.zeros(1, dtype=np.int64))
