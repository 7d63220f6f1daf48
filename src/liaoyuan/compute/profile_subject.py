"""What `ops profile` takes steps of: training, prefill or decode, of a run file, a run or a model folder."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from liaoyuan import config as configuration
from liaoyuan.compute.profile import Subject
from liaoyuan.compute.subject import check_dtype, open_model, random_stream, some_batches
from liaoyuan.data import Batch, load_corpus
from liaoyuan.device import Device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams
from liaoyuan.models import Decoder, initialise
from liaoyuan.ops import configure
from liaoyuan.parallel import Layout, World, lay_out
from liaoyuan.rundir import CONFIG
from liaoyuan.training.loop import TrainConfig, make_optimiser, take_step
from liaoyuan.training.pretrain import PretrainConfig, model_config

Mode = Literal["train", "prefill", "decode"]
TOKENS = {"train": 2048, "prefill": 512, "decode": 256}  # where nothing says otherwise; of decode: the context
LENGTH = 512  # of a training sequence, likewise


@dataclass(frozen=True)
class Size:
    """How much a step does. tokens: of a training step or a prompt, or the context of decoding (None: the default);
    sequences: decoded at once; steps: how many are decoded one after another."""

    tokens: int | None = None
    sequences: int = 8
    steps: int = 32


def open_subject(path: Path, mode: Mode, device: Device, dtype: str | None, size: Size, set_: Sequence[str]) -> Subject:
    """Return what to profile at `path`; of a run folder or run file the settings of its training hold.

    Raises:
        LiaoyuanError: there is no model and no run file, or the sizes do not fit it.
    """
    config = _run_config(path, set_)
    if config:
        configure(config.ops)
    if path.is_file():
        assert config
        shape = model_config(config.model, load_corpus(config.corpus).tokenizer(), device)
        shape = replace(shape, dtype=check_dtype(dtype)) if dtype else shape
        model = initialise(Decoder(shape), config.train.seed).to(device.torch)
    else:
        model, _ = open_model(path, device.torch, dtype, gradients=mode == "train")
    facts = {
        "subject": str(path),
        "mode": mode,
        "device": str(device.torch),
        "dtype": model.config.dtype,
        "threads": torch.get_num_threads(),
        "parameters": model.config.num_parameters(),
    }
    if mode == "train":
        return _training(model, config, device, size, facts)
    return _inference(model, mode, device, size, facts)


def _run_config(path: Path, set_: Sequence[str]) -> PretrainConfig | None:
    """Return the run's config, or None for a folder that holds none (or one of another verb)."""
    if path.is_file():
        return configuration.load(PretrainConfig, path, set_)
    file = path / CONFIG
    if not file.exists():
        if set_:
            raise LiaoyuanError(f"--set is for run files and runs; {path} has no {CONFIG}.")
        return None
    try:
        return configuration.load(PretrainConfig, file, set_)
    except LiaoyuanError:
        if set_:
            raise
        return None


def _training(
    model: Decoder, config: PretrainConfig | None, device: Device, size: Size, facts: Mapping[str, Any]
) -> Subject:
    settings = config.train if config else TrainConfig(steps=1, batch_tokens=TOKENS["train"])
    tokens = size.tokens or settings.batch_tokens
    length = min(config.sequence_length if config else LENGTH, tokens)
    if tokens % (length * settings.microbatches):
        raise LiaoyuanError(
            f"--tokens {tokens} must be a multiple of {length * settings.microbatches} "
            f"(sequences of {length}, {settings.microbatches} microbatches)."
        )
    batches = _training_batches(model, tokens // length, length, settings.microbatches)
    layout, world = config.layout if config else Layout(), World(device=device)
    alone = Layout(recompute=layout.recompute, recompute_every=layout.recompute_every)
    program = lay_out(model, alone, world).train()
    optimiser = make_optimiser(program, settings)
    return Subject(
        model,
        lambda: take_step(program, optimiser, batches, settings.learning_rate, settings.clip, world),
        device,
        {**facts, "tokens": tokens, "sequence_length": length, "microbatches": settings.microbatches},
    )


def _training_batches(model: Decoder, rows: int, length: int, microbatches: int) -> list[Batch]:
    return some_batches(random_stream(model.config.vocab_size, rows, length), rows, length, microbatches)


def _inference(model: Decoder, mode: Mode, device: Device, size: Size, facts: Mapping[str, Any]) -> Subject:
    tokens, longest = size.tokens or TOKENS[mode], model.config.max_position_embeddings
    sequences = 1 if mode == "prefill" else size.sequences
    ahead = 1 if mode == "prefill" else size.steps
    if tokens + ahead > longest:
        raise LiaoyuanError(
            f"The model has {longest} positions, but {tokens} tokens and {ahead} more are asked for: lower --tokens."
        )
    most = max(tokens, sequences, 2048)
    # One step at a time, made of calls that can be watched.
    config = EngineConfig(max_sequences=sequences, max_batch_tokens=most, decode_steps=1, graphs=False)
    engine, numbers = Engine(model.eval(), config), itertools.count()
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingParams(max_tokens=ahead, temperature=1.0, seed=0)

    def add() -> None:
        prompt = torch.randint(model.config.vocab_size, (tokens,), generator=generator).tolist()
        engine.add(Request(next(numbers), tuple(prompt), sampling))

    def prefill() -> None:
        add()
        while engine.has_work:
            engine.step()

    if mode == "decode":
        for _ in range(sequences):
            add()
        while engine.statistics()["generated_tokens"] < sequences:  # all prompts are in the cache
            engine.step()
    facts = {**facts, "tokens": tokens if mode == "prefill" else sequences, "sequences": sequences}
    return Subject(model, prefill if mode == "prefill" else lambda: engine.step(), device, {**facts, "context": tokens})
