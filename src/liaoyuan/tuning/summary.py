"""From the studies of all seeds to the figures of `summary.json`: accuracy with intervals, differences, compute."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from liaoyuan.errors import LiaoyuanError
from liaoyuan.evaluation import bootstrap, difference_to_best
from liaoyuan.training.loop import METRICS

MEASURES = ("greedy", "sampled", "pass_at_8")
CONTROLS = ("control", "control_own_samples")
LENGTH_GROUPS = 5  # groups of equal size by length of thought

Study = dict[str, Any]


def summarise(studies: Sequence[Study]) -> dict[str, Any]:
    """Return accuracy, difference, compute and samples of one study a seed, with the keys of `summary.json`.

    Intervals are bootstrapped over problems and seeds. The difference is RL minus the better of the two controls,
    the better one being chosen anew in each resample.
    """
    stages = list(studies[0]["measured"])
    accuracy: dict[str, Any] = {
        stage: {measure: bootstrap(outcomes(studies, stage, measure)).to_dict() for measure in MEASURES}
        for stage in stages
    }
    differences = {measure: _difference(studies, measure) for measure in MEASURES}
    accuracy["difference"] = {measure: found["interval"] for measure, found in differences.items()}
    return {
        "accuracy": accuracy,
        "difference_by_seed": {measure: found["by_seed"] for measure, found in differences.items()},
        "accuracy_by_level": {stage: _by_level(studies, stage) for stage in stages},
        "accuracy_by_length": {stage: _by_length(studies, stage) for stage in stages if stage != "fast"},
        "compute": _compute(studies),
        "problems": len(studies[0]["measured"]["sft"]["greedy"]),
        "seeds": len(studies),
        "tokens_per_second": _speeds(studies),
        "samples": _samples(studies[0]),
    }


def curves(folder: Path, studies: Sequence[Study], stage: str) -> list[str]:
    """Return where the metrics of a stage are, one file a study, seen from the folder in which the studies lie.

    Raises:
        LiaoyuanError: the folder was moved, and the studies are of a version that kept paths which do not move.
    """
    runs, whole = [Path(study["stages"][stage]["model"]).parent.resolve() for study in studies], folder.resolve()
    for run in runs:
        if not run.is_relative_to(whole):
            raise LiaoyuanError(
                f"{folder} was moved: its studies name files in {run}, where an older version wrote them. Move it "
                "back, or begin again in another folder."
            )
    return [str(run.relative_to(whole) / METRICS) for run in runs]


def outcomes(studies: Sequence[Study], stage: str, measure: str) -> np.ndarray:
    """Return the outcomes of a stage, float [seeds, problems]."""
    return np.array([study["measured"][stage][measure] for study in studies], dtype=np.float64)


def _difference(studies: Sequence[Study], measure: str) -> dict[str, Any]:
    ours = outcomes(studies, "rl", measure)
    controls = [outcomes(studies, control, measure) for control in CONTROLS]
    by_seed = ours.mean(1) - np.max([control.mean(1) for control in controls], axis=0)
    return {"interval": difference_to_best(ours, controls).to_dict(), "by_seed": by_seed.tolist()}


def _by_level(studies: Sequence[Study], stage: str) -> dict[str, Any]:
    levels = np.array(studies[0]["measured"][stage]["levels"])
    values = outcomes(studies, stage, "greedy")
    return {str(level): bootstrap(values[:, levels == level]).to_dict() for level in sorted(set(levels.tolist()))}


def _by_length(studies: Sequence[Study], stage: str) -> list[dict[str, Any]]:
    """Return accuracy in groups of problems by the length of their greedy thought, with the mean length."""
    lengths = np.concatenate([study["measured"][stage]["thought_lengths"] for study in studies])
    right = outcomes(studies, stage, "greedy").flatten()
    order = np.argsort(lengths, kind="stable")
    return [
        {"tokens": float(lengths[group].mean()), **bootstrap(right[group]).to_dict()}
        for group in np.array_split(order, LENGTH_GROUPS)
        if len(group)
    ]


def _compute(studies: Sequence[Study]) -> dict[str, dict[str, float]]:
    """Return CPU seconds and FLOPs of each stage, over all seeds; drawing its samples is part of control B's."""
    spent = {}
    for stage in ("sft", "rl", *CONTROLS):
        parts = [study["stages"][stage] for study in studies]
        if stage == "control_own_samples":
            parts += [study["stages"]["own_samples"] for study in studies]
        spent[stage] = {key: sum(part[key] for part in parts) for key in ("cpu_seconds", "flops")}
    return spent


def _speeds(studies: Sequence[Study]) -> dict[str, float]:
    """Return tokens per CPU second of one process: trained ones of SFT, generated ones of RL's rollouts."""
    sft = [study["stages"]["sft"] for study in studies]
    rl = [study["stages"]["rl"] for study in studies]
    return {
        "sft": _ratio(sum(one["tokens"] for one in sft), sum(one["cpu_seconds"] for one in sft)),
        "rollout": _ratio(sum(one["generated_tokens"] for one in rl), sum(one["rollout_seconds"] for one in rl)),
    }


def _ratio(count: float, seconds: float) -> float:
    return round(count / seconds, 1) if seconds else 0.0


def _samples(study: Study) -> list[dict[str, Any]]:
    """Return the same problems before and after RL, thought and answer."""
    rows = zip(study["measured"]["sft"]["shown"], study["measured"]["rl"]["shown"], strict=True)
    return [
        {
            "question": before["question"],
            "answer": before["answer"],
            "before": _written(before),
            "after": _written(after),
            "before_right": before["right"],
            "after_right": after["right"],
        }
        for before, after in rows
    ]


def _written(shown: dict[str, Any]) -> str:
    return f"{shown['thought']} → {shown['text']}"
