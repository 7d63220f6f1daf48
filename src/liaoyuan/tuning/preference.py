"""A user's own preference tuning: a run folder whose result is `model`, or `adapter`, measured against what it began
with.

Log-probabilities of the model to begin with are computed by the same forward pass: once, up front, where every weight
is trained; for each batch, with the adapters off, where they are trained alone. No second copy of it is in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liaoyuan.data import Batch, TokenisedRecord, Tokenizer, read_examples, write_records
from liaoyuan.device import select_device
from liaoyuan.models.lora import without_adapters
from liaoyuan.ops import configure
from liaoyuan.parallel import Program, World
from liaoyuan.rundir import Progress, Report, read_json, remember, silent, write_json
from liaoyuan.tasks.rewards.judged import REWARD_FILE, Reading
from liaoyuan.tasks.seen import Seen, read_seen, write_seen
from liaoyuan.training import train
from liaoyuan.training.loop import STATE
from liaoyuan.tuning.card import Card, sources_of, write_card
from liaoyuan.tuning.finetune import SeededBatches, finetune
from liaoyuan.tuning.held_out import HELD_OUT, refuse_other_data
from liaoyuan.tuning.preference_batches import (
    AnswerBatches,
    Judged,
    fitting,
    judge,
    liked_conversations,
    split,
    strangers,
)
from liaoyuan.tuning.preference_comparison import Judgement, compare
from liaoyuan.tuning.preference_config import PreferenceConfig, check, resolved
from liaoyuan.tuning.preference_objective import PreferenceLoss, PreferenceObjective
from liaoyuan.tuning.reference import ReferredBatches, answer_log_probs, reference_log_probs

FREE = ("layout.", "ops.", "device", "ask.")  # may change when a run goes on; and "control", before there is one
FORWARD = 1 / 3  # cost of a forward pass, in tokens that are trained on


def run_preference(
    config: PreferenceConfig, folder: Path, report: Report = silent, world: World | None = None
) -> dict[str, Any]:
    """Tune on preferences, export `folder/model` or `folder/adapter`, and measure it; goes on from what is in `folder`.

    `world`: the processes that train together, each of which makes this call. Returns what `folder/comparison.json`
    holds, and figures of the run.

    Raises:
        LiaoyuanError: model or data are missing or wrong, a record fits in no row, the layout cuts documents, or
            `folder` holds a run of other settings or data.
    """
    check(config)
    config = resolved(config)
    configure(config.ops)
    world = world or World(device=select_device(config.device))
    tokenizer, start = Tokenizer.load(config.model), config.start
    (learned, held_out), left_out = read_judged(config, tokenizer)
    program, world = start.lay_out(config.layout, config.train, config.sequence_length, world)
    if world.is_first:
        has_begun, control = (folder / STATE).exists(), folder / "control"
        remember(config, folder, has_begun, FREE if control.exists() else (*FREE, "control"))
        refuse_other_data(folder, [answer for item in learned for answer in item.answers], has_begun)
        write_records(folder / HELD_OUT, liked_conversations(held_out))
        Seen(folder, config.model).add_records(item.record for item in learned)
    asked = [answer for item in held_out for answer in item.answers]
    batches, before, forwards = _batches(config, program, learned, asked, folder, report, world)
    judgement = Judgement(config.preference, held_out, before)

    def measure(model: Program) -> dict[str, float]:
        return judgement.values(answer_log_probs(model, asked, config.sequence_length, world))

    paired = all(len(item.answers) == 2 for item in learned)
    objective = PreferenceObjective(config.preference, paired)
    done = train(program, batches, config.train, folder, report, measure, world, None, objective)
    result = folder / start.name
    start.save(program, result, world)
    found = {"start": before, "model": answer_log_probs(program, asked, config.sequence_length, world)}
    if config.preference.loss == "reward" and world.is_first:
        reading = _reading(tokenizer.eos_ids[0], config.preference, held_out, found["model"])
        write_json(result / REWARD_FILE, reading.model_dump())
    del program
    results = {"model": result}
    if config.control:
        tokens = done.tokens * (1 + FORWARD * start.has_adapters) + FORWARD * forwards
        found["control"] = _control(config, learned, asked, tokens, folder, report, world)
        results["control"] = folder / "control" / start.name
    if world.is_first:
        models = {"start": start.base} | {name: partial(start.trained, place) for name, place in results.items()}
        comparison = compare(judgement, found, models, tokenizer, config.ask, report)
        for place in results.values():
            write_seen(place, read_seen(folder))
        write_card(result, _card(config, folder, learned, held_out, comparison))
        write_json(folder / "comparison.json", comparison)
    world.barrier()
    return asdict(done) | {"left_out": left_out, "comparison": read_json(folder / "comparison.json")}


def _batches(
    config: PreferenceConfig,
    program: Program,
    learned: Sequence[Judged],
    asked: Sequence[TokenisedRecord],
    folder: Path,
    report: Report,
    world: World,
) -> tuple[Callable[[int], Sequence[Batch]], Tensor, int]:
    """Return the batches to learn from, what the model to begin with gives to `asked`, and how many tokens beside
    those it read for this.
    """
    others = strangers(learned, config.sequence_length) if config.preference.loss == "kto" else []
    answers, train_ = [answer for item in learned for answer in item.answers], config.train
    is_live = config.start.has_adapters and config.preference.has_reference
    needed = [*answers, *others] if config.preference.has_reference and not is_live else []
    with without_adapters(program.models):
        given = (program, config.start, [*asked, *needed], config.sequence_length, world)
        before, found = reference_log_probs(*given, folder, report).split([len(asked), len(needed)])
    reference, apart = (
        found.split([len(answers), len(others)]) if needed else (torch.zeros(len(answers)), torch.zeros(len(others)))
    )
    settings = (train_.seed, train_.batch_tokens, config.sequence_length, train_.microbatches)
    strange = (others, apart) if others else None
    batches = AnswerBatches(learned, reference, *settings, world.data_rank, world.data_size, strange)
    referred = ReferredBatches(batches, program) if is_live else batches
    is_seeded = config.start.has_adapters and config.lora.dropout > 0
    seeded = SeededBatches(referred, train_.seed, world.rank) if is_seeded else referred
    return seeded, before, sum(len(answer.tokens) for answer in needed)


def _card(
    config: PreferenceConfig,
    folder: Path,
    learned: Sequence[Judged],
    held_out: Sequence[Judged],
    comparison: dict[str, Any],
) -> Card:
    verb = "reward" if config.preference.loss == "reward" else "dpo"
    parts = ((learned, "learned"), (held_out, "held out"))
    names = [config.preference.loss, *([config.method] if config.start.has_adapters else [])]
    return Card(
        title=folder.name,
        relation=config.start.relation,
        base=config.model,
        method=f"preference tuning ({', '.join(names)})",
        command=f"liaoyuan tune {verb} {folder / 'config.toml'} --out {folder}",
        data=[source for items, use in parts for source in sources_of((item.record for item in items), use)],
        config=config.model_dump(mode="json", exclude_none=True),
        scores={"held-out records": len(held_out), "model": comparison["model"]},
        controls={name: values for name, values in comparison.items() if name not in ("model", "held_out")},
    )


def _reading(mark: int, settings: PreferenceLoss, items: Sequence[Judged], total: Tensor) -> Reading:
    """Return how the reward model is to be read; total: the log-probabilities of the held-out answers [A]."""
    answers = [message for item in items for message in (*item.record.chosen, *item.record.rejected)]
    rewards = settings.rewards(total, torch.ones_like(total), torch.zeros_like(total))
    return Reading(mark=mark, middle=float(rewards.mean()), thoughts=any(message.think for message in answers))


def read_judged(config: PreferenceConfig, tokenizer: Tokenizer) -> tuple[tuple[list[Judged], list[Judged]], int]:
    """Return what is learned from and what is held out, and how many bad rows and long records were left out."""
    mark = tokenizer.eos_ids[0] if config.preference.loss == "reward" else None
    left_out = 0

    def items(path: Path) -> list[Judged]:
        nonlocal left_out
        records, tally = read_examples(path, config.skip_bad)
        found = judge(tokenizer, records, config.preference.is_paired, mark)
        kept = fitting(found, config.sequence_length, config.skip_long)
        left_out += tally.bad_rows + len(found) - len(kept)
        return kept

    if config.held_out is None:
        parts = split(items(config.data), config.held_out_share)
    else:
        parts = items(config.data), items(config.held_out)
    return parts, left_out


def _control(
    config: PreferenceConfig,
    learned: Sequence[Judged],
    asked: Sequence[TokenisedRecord],
    tokens: float,
    folder: Path,
    report: Report,
    world: World,
) -> torch.Tensor:
    """Fine-tune the model to begin with on the chosen answers, on as many tokens; return how it judges `asked`."""
    chosen = [answer for item in learned for answer, liked in zip(item.answers, item.liked, strict=True) if liked]
    steps = max(1, round(tokens / config.train.batch_tokens))
    train_ = config.train.model_copy(update={"steps": steps, "learning_rate": config.control_learning_rate})
    program, world = config.start.lay_out(config.layout, config.train, config.sequence_length, world)

    def tell(progress: Progress) -> None:
        report(replace(progress, text=f"control: {progress.text}"))

    finetune(program, chosen, train_, folder / "control", tell, None, world, config.sequence_length)
    config.start.save(program, folder / "control" / config.start.name, world)
    return answer_log_probs(program, asked, config.sequence_length, world)
