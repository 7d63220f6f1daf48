"""A user's own fine-tuning: a run folder whose result is `model`, or `adapter`, with its card and how it compares.

The part of the data that is held out by content is measured before the first step, every `train.evaluate_every` steps
and at the end; `comparison.json` puts the checkpoint that is kept beside the model that was begun with.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from liaoyuan.data import FileRecords, Record, RecordTokens, TokenisedRecord, Tokenizer, write_records
from liaoyuan.device import select_device
from liaoyuan.models import read_config
from liaoyuan.ops import configure
from liaoyuan.parallel import World
from liaoyuan.rundir import Report, remember, silent, write_json
from liaoyuan.tasks.seen import Seen, read_seen, write_seen
from liaoyuan.training.loop import STATE
from liaoyuan.tuning.card import Card, sources_of, write_card
from liaoyuan.tuning.finetune import finetune
from liaoyuan.tuning.held_out import HELD_OUT, Split, refuse_other_data, split, split_off
from liaoyuan.tuning.kept import Kept
from liaoyuan.tuning.lora import trained_parameters
from liaoyuan.tuning.sft_config import SftConfig, resolved
from liaoyuan.tuning.sft_data import Source, read_source, with_replay

DATA_REPORT = "data_report.json"  # what was in each file, and what of it is not learned


@dataclass(frozen=True)
class Lesson:
    """What a run learns and what it is measured on, as records, which stay in their file, and as tokens; and the files
    it is from, by setting.
    """

    records: Split[FileRecords]
    general: Split[FileRecords]
    learned: RecordTokens
    measured: dict[str, Sequence[TokenisedRecord]]
    sources: dict[str, Source]

    @property
    def left_out(self) -> int:
        """How many rows and records of all files are neither learned nor measured, being bad or too long."""
        return sum(source.tokens.left_out for source in self.sources.values())

    def report(self) -> dict[str, Any]:
        """Return what `DATA_REPORT` holds: what was in the data, and under their settings in the other files."""
        files = {name: source.tokens.to_dict() for name, source in self.sources.items()}
        return files.pop("data") | files


def run_sft(config: SftConfig, folder: Path, report: Report = silent, world: World | None = None) -> dict[str, Any]:
    """Fine-tune and write `folder/model`, or `folder/adapter`; goes on from what is in `folder`.

    `world`: the processes that train together, each of which makes this call.

    Raises:
        LiaoyuanError: model or data are missing or wrong, or a record does not fit in a batch.
    """
    configure(config.ops)
    world = world or World(device=select_device(config.device))
    lesson = read_lesson(config, Tokenizer.load(config.model), report)
    shape = read_config(config.model)
    config = resolved(config, shape, lesson.learned)
    program, world = config.start.lay_out(config.layout, config.train, config.sequence_length, world)
    if world.is_first:
        has_begun = (folder / STATE).exists()
        remember(config, folder, has_begun, ("layout.", "ops.", "device"))
        refuse_other_data(folder, lesson.learned, has_begun)
        write_records(folder / HELD_OUT, lesson.records.held_out)
        write_json(folder / DATA_REPORT, lesson.report())
        seen = Seen(folder, config.model)
        for part in (lesson.records, lesson.general):
            seen.add_records(part.train)
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
    counts = {"records": len(lesson.learned), "left_out": lesson.left_out}
    figures = {**counts, **asdict(done), "trained_parameters": trained, "parameters": shape.num_parameters()}
    if world.is_first:
        write_seen(kept.result, read_seen(folder))
        write_card(kept.result, _card(config, folder, lesson, compared))
    world.barrier()
    return figures | ({"comparison": compared} if compared else {})


def read_lesson(config: SftConfig, tokenizer: Tokenizer, report: Report = silent) -> Lesson:
    """Read and tokenise the examples; what is held out is not learned.

    Raises:
        LiaoyuanError: a file is missing or wrong, or nothing is left to learn.
    """
    paths = {"data": config.data, "validation": config.validation, "replay": config.replay}
    sources = {
        name: read_source(path, tokenizer, config.sequence_length, config.skip_bad, report)
        for name, path in paths.items()
        if path
    }
    data, given, general = sources["data"], sources.get("validation"), sources.get("replay")
    if given:
        chosen = split_off(data.records, given.records, config.validation_records)
    else:
        chosen = split(data.records, config.validation_share, config.validation_records)
    learned = data.tokens_of(chosen.train)
    measured: dict[str, Sequence[TokenisedRecord]] = {"held_out": (given or data).tokens_of(chosen.held_out)}
    nothing = data.records[:0]
    other = Split(nothing, nothing)
    if general:
        other = split(general.records, config.validation_share, config.validation_records)
        learned = with_replay(learned, general.tokens_of(other.train), config.replay_share, config.train.seed)
        measured["general"] = general.tokens_of(other.held_out)
    return Lesson(chosen, other, learned, {name: some for name, some in measured.items() if len(some)}, sources)


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
        relation=config.start.relation,
        base=config.model,
        method=f"supervised fine-tuning ({config.method})",
        command=f"liaoyuan tune sft {folder / 'config.toml'} --out {folder}",
        data=[source for records, use in parts for source in sources_of(records, use)],
        config=config.model_dump(mode="json", exclude_none=True),
        scores={"kept": kept, **scores},
        controls={"the model that was begun with": "the figures 'before', on the same held-out records"},
    )
