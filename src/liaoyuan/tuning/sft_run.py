"""A user's own fine-tuning: a run folder whose result is `model`, or `adapter`, with its card and how it compares.

The part of the data that is held out by content is measured before the first step, every `train.evaluate_every` steps
and at the end; `comparison.json` puts the checkpoint that is kept beside the model that was begun with.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from liaoyuan.checkpoint import load_model, load_weights
from liaoyuan.data import Record, TokenisedRecord, Tokenizer, read_records, write_records
from liaoyuan.device import select_device
from liaoyuan.models import Decoder, ModelConfig, Quantisation, read_config
from liaoyuan.ops import configure
from liaoyuan.parallel import Program, Shape, World, lay_out, resolve
from liaoyuan.rundir import Report, remember, silent
from liaoyuan.tasks.seen import Seen, read_seen, write_seen
from liaoyuan.training.loop import STATE
from liaoyuan.tuning.card import Card, sources_of, write_card
from liaoyuan.tuning.finetune import finetune
from liaoyuan.tuning.held_out import Split, refuse_other_data, split, split_off
from liaoyuan.tuning.kept import Kept
from liaoyuan.tuning.lora import add_adapters, begin, refuse_layout, trained_parameters
from liaoyuan.tuning.sft_config import SftConfig, resolved
from liaoyuan.tuning.sft_data import tokenise_all, with_replay

HELD_OUT = "held_out.jsonl.zst"  # the records in a run folder that were never trained on


@dataclass(frozen=True)
class Lesson:
    """What a run learns and what it is measured on, as records and as tokens."""

    records: Split
    general: Split
    learned: list[TokenisedRecord]
    measured: dict[str, list[TokenisedRecord]]


def run_sft(config: SftConfig, folder: Path, report: Report = silent, world: World | None = None) -> dict[str, Any]:
    """Fine-tune and write `folder/model`, or `folder/adapter`; goes on from what is in `folder`.

    `world`: the processes that train together, each of which makes this call.

    Raises:
        LiaoyuanError: model or data are missing or wrong, or a record does not fit in a batch.
    """
    configure(config.ops)
    world = world or World(device=select_device(config.device))
    lesson = read_lesson(config, Tokenizer.load(config.model))
    shape = read_config(config.model)
    config = resolved(config, shape, lesson.learned)
    program, world = start_program(config, shape, world)
    if world.is_first:
        has_begun = (folder / STATE).exists()
        remember(config, folder, has_begun, ("layout.", "ops.", "device"))
        refuse_other_data(folder, lesson.learned, has_begun)
        write_records(folder / HELD_OUT, lesson.records.held_out)
        Seen(folder, config.model).add_records([*lesson.records.train, *lesson.general.train])
    kept = Kept(program, config, folder, lesson.measured if config.can_measure else {}, world)
    kept.measure_start()
    done = finetune(
        program,
        lesson.learned,
        config.train,
        folder,
        report,
        kept if kept.sets else None,
        world,
        config.sequence_length,
        seeded=config.lora.dropout > 0,
    )
    compared = kept.finish()
    trained = trained_parameters(program)
    figures = {**asdict(done), "trained_parameters": trained, "parameters": shape.num_parameters()}
    if world.is_first:
        write_seen(kept.result, read_seen(folder))
        write_card(kept.result, _card(config, folder, lesson, compared))
    world.barrier()
    return figures | ({"comparison": compared} if compared else {})


def read_lesson(config: SftConfig, tokenizer: Tokenizer) -> Lesson:
    """Read and tokenise the records; what is held out is not learned.

    Raises:
        LiaoyuanError: a file is missing or wrong, or nothing is left to learn.
    """
    records, length = read_records(config.data), config.sequence_length
    if config.validation:
        chosen = split_off(records, read_records(config.validation), config.validation_records)
    else:
        chosen = split(records, config.validation_share, config.validation_records)
    general = read_records(config.replay) if config.replay else []
    other = split(general, config.validation_share, config.validation_records) if general else Split([], [])
    learned = tokenise_all(tokenizer, chosen.train, length)
    if general:
        texts = tokenise_all(tokenizer, other.train, length)
        learned = with_replay(learned, texts, config.replay_share, config.train.seed)
    measured = {"held_out": chosen.held_out, "general": other.held_out}
    tokens = {name: tokenise_all(tokenizer, some, length) for name, some in measured.items() if some}
    return Lesson(chosen, other, learned, tokens)


def start_program(config: SftConfig, shape: ModelConfig, world: World) -> tuple[Program, World]:
    """Return the model laid out over the processes, with the weights to begin with, and the processes in that layout.

    Raises:
        LiaoyuanError: the layout does not fit, or is none for adapters.
    """
    rows = config.train.batch_tokens // config.sequence_length
    fits = Shape(shape, config.sequence_length, rows, config.train.microbatches)
    layout = resolve(config.layout, world.size, fits)
    if config.method != "full":
        refuse_layout(layout, config.lora, world.size)
    world = world.arrange(layout)
    if config.method != "full" and config.lora.base != "whole":
        few = Quantisation(config.lora.base, head=None)
        model = load_model(config.model, device=world.device.torch, quantisation=few)
        program = lay_out(add_adapters(model, config.method, config.lora), layout, world)
    else:
        with torch.device("meta"):
            model = Decoder(shape)
        if config.method != "full":
            add_adapters(model, config.method, config.lora)
        program = lay_out(model, layout, world)
        load_weights(program, config.model)
    if config.method != "full":
        begin(program, config.train.seed)
    return program, world


def _card(config: SftConfig, folder: Path, lesson: Lesson, compared: dict[str, Any]) -> Card:
    parts: list[tuple[Sequence[Record], str]] = [
        (lesson.records.train, "learned"),
        (lesson.records.held_out, "held out"),
        (lesson.general.train, "general text, of which a part was drawn"),
    ]
    scores = {name: value for name, value in compared.items() if name != "kept"}
    kept = compared.get("kept", {"choice": "the last checkpoint; no records were held out"})
    return Card(
        title=folder.name,
        relation="finetune" if config.method == "full" else "adapter",
        base=config.model,
        method=f"supervised fine-tuning ({config.method})",
        command=f"liaoyuan tune sft {folder / 'config.toml'} --out {folder}",
        data=[source for records, use in parts for source in sources_of(records, use)],
        config=config.model_dump(mode="json", exclude_none=True),
        scores={"kept": kept, **scores},
        controls={"the model that was begun with": "the figures 'before', on the same held-out records"},
    )
