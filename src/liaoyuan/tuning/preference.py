"""A user's own preference tuning: a run folder whose result is `model`, measured against what it began with.

Log-probabilities of the model to begin with are computed once, up front, by the same forward pass; no second copy of
it is in memory while the first one is trained.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from liaoyuan.checkpoint import load_weights, save_program
from liaoyuan.config import Config
from liaoyuan.data import Tokenizer, read_examples
from liaoyuan.device import select_device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.evaluation import score
from liaoyuan.models import Decoder, read_config
from liaoyuan.ops import configure
from liaoyuan.parallel import Layout, Program, Shape, World, lay_out, resolve
from liaoyuan.rundir import Progress, Report, read_json, remember, silent, write_json
from liaoyuan.tasks.seen import Seen, read_seen, write_seen
from liaoyuan.training import TrainConfig, train
from liaoyuan.training.loop import STATE
from liaoyuan.tuning.card import Card, sources_of, write_card
from liaoyuan.tuning.finetune import finetune
from liaoyuan.tuning.held_out import refuse_other_data
from liaoyuan.tuning.losses import log_odds
from liaoyuan.tuning.preference_batches import AnswerBatches, Judged, fitting, judge, split, strangers
from liaoyuan.tuning.preference_comparison import Judgement, Questions, compare
from liaoyuan.tuning.preference_objective import PreferenceLoss, PreferenceObjective
from liaoyuan.tuning.reference import answer_log_probs, reference_log_probs

FREE = ("layout.", "ops.", "device", "ask.")  # may change when a run goes on; and "control", before there is one
FORWARD = 1 / 3  # cost of a forward pass, in tokens that are trained on
REWARD_FILE = "liaoyuan_reward.json"  # beside a reward model's weights: the token whose log-odds are the reward


class PreferenceConfig(Config):
    """`model` to begin with, judged answers to learn from (`data`), the loss, how to train, what to measure.

    held_out: answers to measure on; without it, a share of the prompts of `data` is not learned from.
    control: also fine-tune on the chosen answers for the same compute, and measure that.
    """

    model: Path
    data: Path
    held_out: Path | None = None
    held_out_share: float = Field(0.1, gt=0, lt=1)
    skip_bad: bool = False  # learn from the good records of a file that has bad ones
    preference: PreferenceLoss = PreferenceLoss()
    train: TrainConfig = TrainConfig(steps=300, batch_tokens=4096, learning_rate=1e-5, weight_decay=0.0)
    layout: Layout = Layout()
    sequence_length: int = Field(1024, gt=0)  # of the rows into which answers are packed, the two of a pair together
    skip_long: bool = False  # whether records that do not fit in a row are left out
    control: bool = False
    control_learning_rate: float = Field(4e-4, gt=0)
    ask: Questions = Questions()
    device: str = "auto"
    ops: dict[str, str] = Field(default_factory=dict)  # kernels, where not those chosen


def run_preference(
    config: PreferenceConfig, folder: Path, report: Report = silent, world: World | None = None
) -> dict[str, Any]:
    """Tune on preferences, export `folder/model`, and measure it; goes on from what is in `folder`.

    `world`: the processes that train together, each of which makes this call. Returns what `folder/comparison.json`
    holds, and figures of the run.

    Raises:
        LiaoyuanError: model or data are missing or wrong, a record fits in no row, the layout cuts documents, or
            `folder` holds a run of other settings or data.
    """
    check(config)
    configure(config.ops)
    world = world or World(device=select_device(config.device))
    tokenizer = Tokenizer.load(config.model)
    (learned, held_out), left_out = _items(config, tokenizer)
    program, world = _laid_out(config, world)
    if world.is_first:
        has_begun, control = (folder / STATE).exists(), folder / "control"
        remember(config, folder, has_begun, FREE if control.exists() else (*FREE, "control"))
        refuse_other_data(folder, [answer for item in learned for answer in item.answers], has_begun)
        Seen(folder, config.model).add_records(item.record for item in learned)
    others = strangers(learned, config.sequence_length) if config.preference.loss == "kto" else []
    needed = [answer for item in learned for answer in item.answers] if config.preference.has_reference else []
    asked = [answer for item in held_out for answer in item.answers]
    start = reference_log_probs(
        program, config.model, [*asked, *needed, *others], config.sequence_length, world, folder, report
    )
    before, reference, apart = start.split([len(asked), len(needed), len(others)])
    if not needed:
        reference = torch.zeros(sum(len(item.answers) for item in learned))
    settings = (config.train.seed, config.train.batch_tokens, config.sequence_length, config.train.microbatches)
    strange = (others, apart) if others else None
    batches = AnswerBatches(learned, reference, *settings, world.data_rank, world.data_size, strange)
    judgement = Judgement(config.preference, held_out, before)

    def measure(model: Program) -> dict[str, float]:
        return judgement.values(answer_log_probs(model, asked, config.sequence_length, world))

    paired = all(len(item.answers) == 2 for item in learned)
    objective = PreferenceObjective(config.preference, paired)
    done = train(program, batches, config.train, folder, report, measure, world, None, objective)
    save_program(program, folder / "model", config.model, world)
    if config.preference.loss == "reward" and world.is_first:
        write_json(folder / "model" / REWARD_FILE, {"mark": tokenizer.eos_ids[0]})
    found = {"start": before, "model": answer_log_probs(program, asked, config.sequence_length, world)}
    folders = {"start": config.model, "model": folder / "model"}
    del program
    if config.control:
        tokens = done.tokens + FORWARD * sum(len(answer.tokens) for answer in [*needed, *others])
        found["control"] = _control(config, learned, asked, tokens, folder, report, world)
        folders["control"] = folder / "control" / "model"
    comparison = compare(judgement, found, folders, config.ask, report) if world.is_first else {}
    if world.is_first:
        for name in found.keys() - {"start"}:
            write_seen(folders[name], read_seen(folder))
        write_card(folder / "model", _card(config, folder, learned, held_out, comparison))
        write_json(folder / "comparison.json", comparison)
    world.barrier()
    return asdict(done) | {"left_out": left_out, "comparison": read_json(folder / "comparison.json")}


def _card(
    config: PreferenceConfig,
    folder: Path,
    learned: Sequence[Judged],
    held_out: Sequence[Judged],
    comparison: dict[str, Any],
) -> Card:
    verb = "reward" if config.preference.loss == "reward" else "dpo"
    parts = ((learned, "learned"), (held_out, "held out"))
    return Card(
        title=folder.name,
        relation="finetune",
        base=config.model,
        method=f"preference tuning ({config.preference.loss})",
        command=f"liaoyuan tune {verb} {folder / 'config.toml'} --out {folder}",
        data=[source for items, use in parts for source in sources_of((item.record for item in items), use)],
        config=config.model_dump(mode="json", exclude_none=True),
        scores={"held-out records": len(held_out), "model": comparison["model"]},
        controls={name: values for name, values in comparison.items() if name not in ("model", "held_out")},
    )


def reward_of(model: Decoder, mark: int, conversations: Sequence[Sequence[int]]) -> list[float]:
    """Return a reward model's reward of each tokenised conversation: the log-odds of `mark` after its last token.

    mark: what `REWARD_FILE` in the model's folder says. Higher is better; only differences mean something.
    """
    scores = score(model, [[*tokens, mark] for tokens in conversations])
    found: list[float] = log_odds(torch.tensor([one[-1] for one in scores])).tolist()
    return found


def check(config: PreferenceConfig) -> None:
    """Refuse what a loss of whole answers cannot be computed with.

    Raises:
        LiaoyuanError: see above.
    """
    layout = config.layout
    if config.ask.task:
        _ = config.ask.chosen
    if layout.pp > 1 or layout.context > 1:
        raise LiaoyuanError(
            f"The layout {layout.describe()} does not fit: a preference is a loss of whole answers, which pp and cp "
            "cut. Use fsdp, dp, tp and ep."
        )
    if config.train.penalties:
        raise LiaoyuanError(
            "train.z_loss and train.label_smoothing belong to the cross-entropy, which is not what is learned here: "
            "leave them 0 (preference.label_smoothing is that of DPO)."
        )


def _items(config: PreferenceConfig, tokenizer: Tokenizer) -> tuple[tuple[list[Judged], list[Judged]], int]:
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


def _laid_out(config: PreferenceConfig, world: World) -> tuple[Program, World]:
    """Return the model to begin with over the processes of `world`, and these in that layout."""
    with torch.device("meta"):
        model = Decoder(read_config(config.model))
    rows = config.train.batch_tokens // config.sequence_length
    layout = resolve(
        config.layout, world.size, Shape(model.config, config.sequence_length, rows, config.train.microbatches)
    )
    world = world.arrange(layout)
    program = lay_out(model, layout, world)
    load_weights(program, config.model)
    return program, world


def _control(
    config: PreferenceConfig,
    learned: Sequence[Judged],
    asked: Sequence[Any],
    tokens: float,
    folder: Path,
    report: Report,
    world: World,
) -> torch.Tensor:
    """Fine-tune the model to begin with on the chosen answers, on as many tokens; return how it judges `asked`."""
    chosen = [answer for item in learned for answer, liked in zip(item.answers, item.liked, strict=True) if liked]
    steps = max(1, round(tokens / config.train.batch_tokens))
    train_ = config.train.model_copy(update={"steps": steps, "learning_rate": config.control_learning_rate})
    program, world = _laid_out(config, world)

    def tell(progress: Progress) -> None:
        report(replace(progress, text=f"control: {progress.text}"))

    finetune(program, chosen, train_, folder / "control", tell, None, world, config.sequence_length)
    save_program(program, folder / "control" / "model", config.model, world)
    return answer_log_probs(program, asked, config.sequence_length, world)
