"""What a run has gained: its model and the one that it began with, on the same test problems."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liaoyuan.data import Tokenizer
from liaoyuan.evaluation import bootstrap, measure_accuracy
from liaoyuan.models import Decoder
from liaoyuan.models.lora import kept_adapters
from liaoyuan.rundir import Progress, Report, read_json, silent, write_json
from liaoyuan.tasks import Problem, Right
from liaoyuan.tuning.validation import tuning_engine

FOLDER = "measured"  # in the run folder: the outcomes of each model, problem by problem


@dataclass(frozen=True)
class Exam:
    """Test problems that every model is asked greedily and `samples` times at temperature 1; `right` judges."""

    right: Right
    problems: Sequence[Problem]
    samples: int
    max_tokens: int


def gain(
    exam: Exam,
    models: Mapping[str, Callable[[], Decoder]],
    tokenizer: Tokenizer,
    folder: Path,
    report: Report = silent,
) -> dict[str, dict[str, Any]]:
    """Return for each model, and for the last less the first, its accuracies with 95% intervals over the problems.

    models: what loads each; one whose outcomes are in `folder` is not asked again. Differences are paired by problem.
    """
    found = {}
    for place, (name, load) in enumerate(models.items()):
        told = _told(report, name, place, len(models))
        kept = folder / FOLDER / f"{name}.json"
        if not kept.exists():
            write_json(kept, _outcomes(exam, load(), tokenizer, told))
        found[name] = {key: np.array(values) for key, values in read_json(kept).items()}
    first, last = (found[name] for name in (next(iter(models)), list(models)[-1]))
    found["difference"] = {key: last[key] - first[key] for key in last}
    return {
        name: {key: bootstrap(values).to_dict() for key, values in outcomes.items()} for name, outcomes in found.items()
    }


def _outcomes(exam: Exam, model: Decoder, tokenizer: Tokenizer, report: Report) -> dict[str, list[float]]:
    with torch.inference_mode(), kept_adapters(model):
        answers = measure_accuracy(
            tuning_engine(model.eval(), exam.max_tokens),
            tokenizer,
            exam.right,
            exam.problems,
            exam.samples,
            max_tokens=exam.max_tokens,
            report=report,
        )
    measures = {
        "greedy": answers.greedy,
        "sampled": answers.sampled_mean,
        f"pass_at_{exam.samples}": answers.pass_at_k,
        "thought_tokens": answers.thought_lengths,
    }
    return {name: values.astype(float).tolist() for name, values in measures.items()}


def _told(report: Report, name: str, place: int, count: int) -> Report:
    def tell(progress: Progress) -> None:
        share = (place + progress.done / max(1, progress.total)) / count
        report(Progress(round(1000 * share), 1000, "‰", f"measuring {name}"))

    return tell
