"""Pretraining: a prepared corpus and the shape of a model in, a Hugging Face folder out.

The run folder gets `config.toml`, `metrics.jsonl`, `state/` while it runs, and `model/` (weights, config, tokenizer)
once it is done. Every stage goes on from where a kill left it.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from liaoyuan.checkpoint import load_weights, save_program
from liaoyuan.checkpoint.training_state import CheckpointConfig
from liaoyuan.config import Config
from liaoyuan.data import Corpus, TokenBatches, Tokenizer, load_corpus
from liaoyuan.device import Device, select_device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig, config_from_dict, read_config
from liaoyuan.models.config import DTYPES
from liaoyuan.ops import configure
from liaoyuan.parallel import Layout, Program, Shape, World, lay_out, resolve
from liaoyuan.rundir import Report, remember, silent
from liaoyuan.training.guard import SpikeGuard
from liaoyuan.training.loop import STATE, TrainConfig, TrainResult, extra_of, make_optimiser, train
from liaoyuan.training.optimiser import Optimiser

MODEL = "model"
FREE = ("layout.", "checkpoint.", "plan.")  # sections that may change when a run goes on: states know no layout


FREE_WORDS = ("dtype", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


class ShapeConfig(Config):
    """The model: keys of a Hugging Face `config.json`, or `weights`, a model folder to go on from.

    What the tokenizer says (vocabulary, end tokens) is not repeated here.
    """

    weights: Path | None = None
    model_type: str = "qwen3"
    hidden_size: int = Field(256, gt=0)
    intermediate_size: int = Field(768, gt=0)
    num_hidden_layers: int = Field(6, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    num_key_value_heads: int = Field(2, gt=0)
    head_dim: int = Field(64, gt=0)
    max_position_embeddings: int = Field(2048, gt=0)
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: what the device multiplies fast


class PlanConfig(Config):
    """The section `[plan]` of a run file: whom the command line asks where `layout = "auto"`. Training needs none."""

    auto: bool = False  # the layout is still to be found; `layout = "auto"` is short for it
    cluster: str | None = None  # a name, such as "h100", or a TOML file; none: the kind of this machine
    profile: Path | None = None  # what `liaoyuan plan calibrate` wrote
    whole: int = Field(4, gt=0)  # layouts that are predicted as a whole, of all that formulas put in order


class PretrainConfig(Config):
    """A pretraining run."""

    corpus: Path
    model: ShapeConfig = ShapeConfig()
    train: TrainConfig
    layout: Layout = Layout()
    plan: PlanConfig = PlanConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sequence_length: int = Field(512, gt=0)
    held_out_tokens: int = Field(32768, gt=0)  # of the held-out split, for the loss shown beside the training loss
    device: str = "auto"
    ops: dict[str, str] = Field(default_factory=dict)  # kernels, where not those chosen: {attention = "reference"}

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("layout") != "auto":
            return values
        plan = values.get("plan", {})
        return values | {"layout": {}, "plan": {**plan, "auto": True} if isinstance(plan, dict) else plan}


def pretrain(config: PretrainConfig, folder: Path, report: Report = silent, world: World | None = None) -> TrainResult:
    """Train a model on a corpus and export it to `folder/model`; the same call goes on after a kill.

    `world`: the processes that train together, each of which makes this call.

    Raises:
        LiaoyuanError: no corpus, a shape or layout that does not fit, a folder of another run, a full disk.
    """
    if config.plan.auto:
        raise LiaoyuanError('Training takes a layout, not "auto": `liaoyuan train` finds one before it begins.')
    configure(config.ops)
    world = world or World(device=select_device(config.device))
    corpus = load_corpus(config.corpus)
    shape = model_config(config.model, corpus.tokenizer(), world.device)
    layout = resolve(config.layout, world.size, layout_shape(config, shape))
    world = world.arrange(layout)
    if world.is_first:
        remember(config, folder, (folder / STATE).exists(), FREE)
    program = _start(config, shape, layout, world)
    batches = _batches(corpus, config, world)
    measure = held_out_loss(corpus, config, world)
    result = train(program, batches, config.train, folder, report, measure, world, config.checkpoint)
    save_program(program, folder / MODEL, corpus.tokenizer_folder, world)
    return result


def model_config(shape: ShapeConfig, tokenizer: Tokenizer, device: Device) -> ModelConfig:
    """Return the config of the model to train, with the tokenizer's vocabulary and end tokens."""
    return shaped(shape, tokenizer.vocab_size, tokenizer.eos_ids[0] if tokenizer.eos_ids else None, device)


def shaped(shape: ShapeConfig, vocab_size: int, eos: int | None, device: Device) -> ModelConfig:
    """Return the config of the model to train, of text with so many different tokens that ends with `eos`."""
    if shape.weights:
        config = read_config(shape.weights)
        if config.vocab_size < vocab_size:
            raise LiaoyuanError(
                f"The corpus was tokenised with {vocab_size} tokens, but {shape.weights} knows only "
                f"{config.vocab_size}: prepare the corpus with the tokenizer of that model (data key 'tokenizer')."
            )
        return config if shape.dtype == "auto" else replace(config, dtype=shape.dtype)
    values: dict[str, Any] = shape.model_dump(exclude={"weights", "dtype"})
    if shape.num_experts and shape.model_type != "qwen3_moe":
        raise LiaoyuanError(
            f"model.num_experts is set, but a model of model_type '{shape.model_type}' has no experts here: "
            'set model.model_type = "qwen3_moe".'
        )
    values["vocab_size"] = vocab_size
    values["eos_token_id"] = eos
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    values["dtype"] = dtypes[device.default_dtype] if shape.dtype == "auto" else shape.dtype
    return config_from_dict(values, "the section [model]")


def layout_shape(config: PretrainConfig, model: ModelConfig) -> Shape:
    """Return what a layout of this run must fit."""
    rows = config.train.batch_tokens // config.sequence_length
    return Shape(model, config.sequence_length, rows, config.train.microbatches)


def first_state(config: PretrainConfig, given: ModelConfig) -> tuple[Decoder, Optimiser, dict[str, Any]]:
    """Return the model (on the meta device), the optimiser and the further values of a run's state before step 1.

    Raises:
        LiaoyuanError: the run is one of another model than `given`, which has the weights to begin with.
    """
    tokenizer = load_corpus(config.corpus).tokenizer()
    shape = model_config(config.model, tokenizer, select_device(config.device))
    ours, theirs = shape.to_dict(), given.to_dict()
    for key in (key for key in ours if key not in FREE_WORDS):
        if ours[key] != theirs.get(key):
            raise LiaoyuanError(
                f"The run file asks for {key} = {ours[key]!r}, but the weights have {theirs.get(key)!r}."
            )
    with torch.device("meta"):
        model = Decoder(shape)
    extra = extra_of(TrainResult(), config.train, SpikeGuard(config.train.spikes))
    return model, make_optimiser(model, config.train), extra


def held_out_loss(
    corpus: Corpus, config: PretrainConfig, world: World | None = None
) -> Callable[[Decoder | Program], dict[str, float]]:
    """Return the function that measures the mean loss (nats per token) on a fixed part of the held-out text."""
    here = world or World()
    length = config.sequence_length
    stream = corpus.stream("held_out")
    rows = max(1, min(config.held_out_tokens, len(stream.tokens) - 1 - length) // length)
    batches = TokenBatches(stream, 0, length, length)

    def measure(model: Decoder | Program) -> dict[str, float]:
        # Every process takes part in every row; of those that work on the same one, one counts it.
        program = model if isinstance(model, Program) else Program([model])
        losses = [float(program.loss(batches[row], 1.0 / length)) for row in range(rows)]
        return {"held_out_loss": here.sum_numbers(sum(losses))[0] / (rows * here.data_size)}

    return measure


def _start(config: PretrainConfig, shape: ModelConfig, layout: Layout, world: World) -> Program:
    """Return the model laid out, with its first weights; no process ever holds more than its own part."""
    with torch.device("meta"):
        model = Decoder(shape)
    program = lay_out(model, layout, world)
    if config.model.weights:
        load_weights(program, config.model.weights)
        return program
    return program.initialise(config.train.seed)


def _batches(corpus: Corpus, config: PretrainConfig, world: World) -> TokenBatches:
    settings = config.train
    return TokenBatches(
        corpus.stream("train"),
        settings.seed,
        settings.batch_tokens,
        config.sequence_length,
        settings.microbatches,
        world.data_rank,
        world.data_size,
    )
