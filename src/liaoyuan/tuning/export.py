"""Out of the lab: an adapter merged, weights of few bits, and a gate between what was trained and what is shipped.

The reference is the model as it was trained: the base, in as many bits as it had then, with its adapter unmerged. The
folder that was written is read back and compared with it on held-out records; beyond the tolerance nothing is left
behind, unless the user insists, and then the card says so.
"""

import functools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.checkpoint.convert import FURTHER_FILES, convert_to_folder
from liaoyuan.checkpoint.hugging_face import MAX_SHARD_BYTES, copy_files
from liaoyuan.checkpoint.sources import FolderSource, MergedSource
from liaoyuan.data import Record, RecordTokens, Tokenizer
from liaoyuan.data.records import read_lines
from liaoyuan.errors import LiaoyuanError
from liaoyuan.evaluation import agreement, measure_accuracy, ratio
from liaoyuan.models import Decoder, read_config
from liaoyuan.models.quantised import quantisation_named
from liaoyuan.parallel import Program, World
from liaoyuan.rundir import Report, atomic_folder, silent
from liaoyuan.tasks import Right, find_task, held_out_problems
from liaoyuan.tasks.rewards.judged import REWARD_FILE
from liaoyuan.tasks.seen import read_seen, write_seen
from liaoyuan.tuning.card import Card, DataSource, read_card, sources_of, write_card
from liaoyuan.tuning.held_out import HELD_OUT, measure
from liaoyuan.tuning.lora import LoraConfig
from liaoyuan.tuning.sft_data import read_source
from liaoyuan.tuning.start import Start
from liaoyuan.tuning.validation import tuning_engine

MOST_RECORDS = 200  # of the held-out ones that the gate reads
TASK_PROBLEMS, TASK_TOKENS = 200, 128  # where a task is answered too


@dataclass(frozen=True)
class Tolerance:
    """How far the exported model may be from the trained one, as means over the held-out tokens.

    divergence: of Kullback and Leibler, in nats; same_first: least share of places with the same most probable token;
    drop: of the accuracy on learned tokens (or on problems), a share; only one whose interval is below zero counts.
    """

    divergence: float
    same_first: float
    drop: float


# By what is done to the weights. Merging rounds each weight once more; few bits are judged by what docs/quantise.md
# measured for models that were none the worse for it.
TOLERANCES = {
    "merged": Tolerance(0.005, 0.98, 0.005),
    "int8": Tolerance(0.01, 0.95, 0.01),
    "fp8": Tolerance(0.03, 0.92, 0.02),
    "int4": Tolerance(0.1, 0.80, 0.03),
}


@dataclass(frozen=True)
class Export:
    """What is to be exported.

    base: a model folder. adapter: to be merged into it, or None. quantise: "int8", "int4", "fp8" or None.
    texts: held-out records; None: those of the run that the adapter or the model lies in.
    task: whose problems both models answer too. divergence, drop: other tolerances than `TOLERANCES`.
    force: export beyond the tolerance too, and say so in the card. skip_bad: go on without bad lines of `texts`.
    """

    base: Path
    target: Path
    adapter: Path | None = None
    quantise: str | None = None
    dtype: str | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    texts: Path | None = None
    task: str | None = None
    divergence: float | None = None
    drop: float | None = None
    force: bool = False
    skip_bad: bool = False

    @property
    def tolerance(self) -> Tolerance:
        """What the gate asks for."""
        usual = TOLERANCES[self.quantise or "merged"]
        given = (self.divergence, None, self.drop)
        values = (usual.divergence, usual.same_first, usual.drop)
        return Tolerance(*(other if one is None else one for one, other in zip(given, values, strict=True)))


def export(request: Export, report: Report = silent) -> dict[str, Any]:
    """Write `request.target`; return the gate's figures.

    Raises:
        LiaoyuanError: there are no held-out records, something is torn or of another model, or the exported model is
            further from the trained one than is tolerated.
    """
    few = quantisation_named(request.quantise)
    records, texts, left_out = held_out_of(request, report)
    with atomic_folder(request.target) as part:
        whole = part / "whole"
        with FolderSource(request.base) as base:
            source = MergedSource(base, request.adapter) if request.adapter else base
            convert_to_folder(source, whole, request.dtype, request.max_shard_bytes, None, report)
        if request.adapter:
            copy_files(request.adapter, whole, [REWARD_FILE])  # of a reward model
        if few is not None:
            save_model(load_model(whole, quantisation=few), part / "few", whole)
            copy_files(whole, part / "few", FURTHER_FILES)
            shutil.rmtree(whole)
        made = part / ("whole" if few is None else "few")
        compared = compare_exported(trained_model(request), load_model(made), request, texts, report)
        figures = {"records": len(records), "left_out": left_out, **compared}
        refusal = objection(figures, request.tolerance)
        if refusal and not request.force:
            raise LiaoyuanError(f"{request.target} was not written: {refusal} --force writes it, and says so.")
        for file in made.iterdir():
            file.rename(part / file.name)
        made.rmdir()
        seen = [read_seen(folder) for folder in (request.base, request.adapter) if folder]
        write_seen(part, functools.reduce(np.union1d, seen))
        write_card(part, _card(request, figures, refusal, records))
    return {**figures, "tolerated": not refusal}


def held_out_of(request: Export, report: Report = silent) -> tuple[list[Record], RecordTokens, int]:
    """Return the records on which the gate compares, their tokens, a text perhaps in pieces, and how many are left out.

    Raises:
        LiaoyuanError: there are none, or some are bad, of another kind than is learned from, or too long for the model,
            and `skip_bad` is not set.
    """
    run = (request.adapter or request.base).absolute().parent / HELD_OUT
    path = request.texts or (run if run.exists() and any(read_lines(run)) else None)
    if path is None:
        raise LiaoyuanError(
            "The exported model is compared with the trained one on held-out records, and there are none beside "
            f"{request.adapter or request.base}: name a file of records that it did not learn from with --texts."
        )
    length = read_config(request.base).max_position_embeddings - 1
    source = read_source(path, Tokenizer.load(request.base), length, request.skip_bad, report)
    records = source.records[:MOST_RECORDS]
    return list(records), source.tokens_of(records), source.tokens.left_out


def trained_model(request: Export) -> Decoder:
    """Return the model as it was trained: the base in its bits, with its adapter unmerged."""
    if request.adapter is None:
        return load_model(request.base)
    bits = read_card(request.adapter).get("config", {}).get("lora", {}).get("base", "whole")
    return Start(request.base, "lora", LoraConfig(base=bits)).trained(request.adapter)


def compare_exported(
    trained: Decoder, exported: Decoder, request: Export, texts: RecordTokens, report: Report = silent
) -> dict[str, Any]:
    """Return how far `exported` is from `trained`: log-probabilities, and accuracy on learned tokens (and a task)."""
    found = agreement(trained, exported, [texts.ids(number).tolist() for number in range(len(texts))], report)
    before, after = (measure(Program([model]), texts, World()) for model in (trained, exported))
    figures: dict[str, Any] = {
        "tokens": found.places,
        "divergence": found.divergence,
        "divergence_99th": found.worst,
        "same_first": found.same_first,
        "log_prob_difference": found.difference,
        "log_prob_difference_largest": found.largest,
        "loss": {"trained": before.loss, "exported": after.loss},
        "token_accuracy": {
            "trained": before.accuracy,
            "exported": after.accuracy,
            "difference": ratio(after.right - before.right, after.tokens).to_dict(),
        },
    }
    tokenizer = Tokenizer.load(request.base)
    return figures | (_task_figures(trained, exported, request.task, tokenizer, report) if request.task else {})


def _task_figures(
    trained: Decoder, exported: Decoder, name: str, tokenizer: Tokenizer, report: Report
) -> dict[str, Any]:
    """Return the greedy accuracy of both on a task's held-out problems, and the paired difference."""
    task = find_task(name)
    problems = held_out_problems(task, task.levels[:2], TASK_PROBLEMS)
    before, after = (
        measure_accuracy(
            tuning_engine(model, TASK_TOKENS),
            tokenizer,
            Right(task),
            problems,
            1,
            max_tokens=TASK_TOKENS,
            report=report,
        ).greedy.astype(float)
        for model in (trained, exported)
    )
    ones = before * 0 + 1
    difference = ratio(after - before, ones).to_dict()
    return {"task": {"name": name, "trained": before.mean(), "exported": after.mean(), "difference": difference}}


def objection(figures: dict[str, Any], tolerance: Tolerance) -> str:
    """Return why the exported model is not tolerated, in a sentence with the figures; empty if it is."""
    drops = {
        "learned tokens": figures["token_accuracy"],
        **({"problems": figures["task"]} if "task" in figures else {}),
    }
    found = []
    if not figures["divergence"] <= tolerance.divergence:
        found.append(f"its divergence is {figures['divergence']:.4f} nats (tolerated: {tolerance.divergence:g})")
    if not figures["same_first"] >= tolerance.same_first:
        share = 100 * figures["same_first"]
        found.append(f"{share:.1f}% of first choices are the same (tolerated: {100 * tolerance.same_first:g}%)")
    for what, values in drops.items():
        drop = values["trained"] - values["exported"]
        if not drop <= tolerance.drop and not values["difference"]["high"] >= 0:  # more than chance would do
            points, most = 100 * drop, 100 * tolerance.drop
            found.append(f"its accuracy on {what} is {points:.2f} points lower (tolerated: {most:g})")
    return f"The exported model is not the trained one: {'; '.join(found)}." if found else ""


def _card(request: Export, figures: dict[str, Any], refusal: str, records: Sequence[Record]) -> Card:
    made = read_card(request.adapter or request.base)
    data = [DataSource(**one) for one in made.get("data", [])] or sources_of(records, "compared on")
    options = [f"--model {request.base}", f"--out {request.target}"]
    options += [f"--merge {request.adapter}"] if request.adapter else []
    options += [f"--quantise {request.quantise}"] if request.quantise else []
    options += [f"--dtype {request.dtype}"] if request.dtype else []
    options += [f"--texts {request.texts}"] if request.texts else []
    options += [f"--task {request.task}"] if request.task else []
    options += [] if request.divergence is None else [f"--max-divergence {request.divergence:g}"]
    options += [] if request.drop is None else [f"--max-drop {request.drop:g}"]
    flags = {"--skip-bad": request.skip_bad, "--force": request.force}
    options += [name for name, is_given in flags.items() if is_given]
    steps = [made.get("method", "")] + (["merged into the base"] if request.adapter else [])
    steps += [f"weights of {request.quantise}"] if request.quantise else []
    return Card(
        title=request.target.name,
        relation="quantized" if request.quantise else "merge",
        base=request.base,
        method=", ".join(step for step in steps if step),
        command="\n".join([*filter(None, [made.get("command")]), f"liaoyuan convert {' '.join(options)}"]),
        data=data,
        config=made.get("config", {}),
        scores={**made.get("scores", {}), "exported against trained": figures},
        controls=made.get("controls", {}),
        notes=[f"{refusal} It was exported with --force."] if refusal else [],
    )
