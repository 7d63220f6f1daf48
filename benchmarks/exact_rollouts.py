"""Exact rollouts beside ordinary ones: the same run with the gap between rollout and training closed and open.

A policy that rolls out with other bits than it trains with learns from rollouts of another policy. Here the same run is
done three times: with kernels in which a row's bits are its own (exact: no gap); with attention that training computes
by PyTorch's operators and the engine by its kernel (ordinary, as where trainer and engine are two programs); and as the
latter with truncated importance weights, which `rl.importance = "auto"` switches on by itself. Start, seeds, problems
and settings are the same, in bfloat16, where bits are few. The divergence KL(rollout || training) is that of the first
update of each step, before which both have the same weights. All models are measured with the same kernels on the same
test problems. Intervals are bootstrapped over problems and seeds, differences paired by both.

    python benchmarks/exact_rollouts.py --model runs/quickstart/seed-0/sft/best --out runs/exact-rollouts \\
        --json exact_rollouts.json --plots docs/images

The model is any that sometimes solves the task, such as the SFT model of a quickstart or of docs/tune.md. It goes on
from what is in `--out`. About 2 CPU-minutes of one thread; `--quick` takes half a minute and shows nothing.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liaoyuan.cli.process import tune_process

SETTINGS = tune_process()

import numpy as np  # noqa: E402  (after the allocator's settings)
import torch  # noqa: E402

from liaoyuan import ops, report  # noqa: E402
from liaoyuan.checkpoint import load_model  # noqa: E402
from liaoyuan.data import Tokenizer  # noqa: E402
from liaoyuan.device import cpu_name  # noqa: E402
from liaoyuan.evaluation import bootstrap  # noqa: E402
from liaoyuan.rundir import Report, read_metrics, write_atomic  # noqa: E402
from liaoyuan.runs import chart_of  # noqa: E402
from liaoyuan.tasks import find_task  # noqa: E402
from liaoyuan.tuning import ReinforceConfig, reinforce  # noqa: E402
from liaoyuan.tuning.jobs import Job, run_jobs  # noqa: E402
from rl_answers import MEASURES, answers_of, cell, parser_of  # noqa: E402

APART = {"attention": "reference"}  # training's attention by PyTorch's operators, the engine's by its own kernel
WAYS: dict[str, tuple[dict[str, str], str]] = {  # kernels, and rl.importance
    "exact": ({}, "auto"),
    "ordinary": (APART, "off"),
    "ordinary, weighted": (APART, "auto"),
}
GAPS = ("log_prob_gap", "gap_kl")  # columns of the metrics
CURVES = {"gap_kl": "exact-rollouts-kl.svg", "reward": "exact-rollouts-reward.svg"}
LAST = 4  # the reward at the end is the mean over the last one of so many parts of the run


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    print(f"{cpu_name()}, one thread, {options.dtype}")
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for seed in options.seeds:
        for way, found in runs.items():
            about = {"way": way, "seed": seed, "options": vars(options)}
            folder = Path(options.out) / f"seed-{seed}" / way.replace(", ", "-")
            found += run_jobs([Job(f"{seed} {way}", folder, learn, about)], 0)
            print(f"seed {seed}: {way} done", flush=True)
    result = {"rows": {way: row(way, runs) for way in WAYS}, "settings": vars(options)}
    print(table(result["rows"]))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    for column, name in CURVES.items() if options.plots else ():
        write_atomic(Path(options.plots) / name, report.picture(plot(column, runs)))


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, "runs/exact-rollouts")
    parser.add_argument("--levels", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--max-tokens", type=int, default=48, help="of one answer")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--test-problems", type=int, default=300)
    parser.add_argument("--plots", default="", help="folder for the pictures of the curves (.svg)")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.test_problems = [0, 1], 4, 30
    return options


def learn(folder: Path, report: Report, way: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Reinforce the start with rollouts of one kind; return its curves, and which test problems it solves."""
    kernels, importance = WAYS[way]
    ops.configure(kernels)
    start, task = Path(options["model"]), find_task(options["task"])
    model, tokenizer = load_model(start, getattr(torch, options["dtype"])), Tokenizer.load(start)
    config = ReinforceConfig.model_validate(
        {name: options[name] for name in ("levels", "steps", "max_tokens")}
        | {"seed": seed, "importance": importance, "checkpoint_every": 10 * options["steps"]}
    )
    done = reinforce(model, tokenizer, task, config, folder)
    rows = read_metrics(folder / "metrics.jsonl")
    names = ("reward", "gap_kl", "log_prob_gap", "kl_start")
    found: dict[str, Any] = {name: [one.get(name) for one in rows] for name in names}
    ops.configure({})
    answers = answers_of(model, tokenizer, options, options["max_tokens"])
    found |= {"greedy": answers.greedy.astype(int).tolist(), "sampled": answers.sampled_mean.tolist()}
    return found | {"exact": done.exact, "corrected": rows[0]["corrected"], "cpu_seconds": done.cpu_seconds}


def row(way: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return what the runs of one way show; None stands for steps that changed nothing."""
    own, exact = runs[way], runs["exact"]
    gaps, divergences = ([value for run in own for value in run[name] if value is not None] for name in GAPS)
    ends = [float(np.mean(run["reward"][-max(1, len(run["reward"]) // LAST) :])) for run in own]
    found: dict[str, Any] = {
        "exact": [run["exact"] for run in own],
        "corrected": [run["corrected"] for run in own],
        "largest_gap": max(gaps),
        "kl": float(np.mean(divergences)),
        "kl_last": float(np.mean([value for run in own for value in run["gap_kl"][-LAST:] if value is not None])),
        "reward_at_the_end": ends,
        "cpu_seconds": [run["cpu_seconds"] for run in own],
    }
    for name in MEASURES:
        values, others = (np.array([run[name] for run in some], dtype=float) for some in (own, exact))
        found[name] = bootstrap(values).to_dict()
        found[f"{name}_minus_exact"] = bootstrap(values - others).to_dict()
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    heads = ["rollouts", "largest gap, nats", "KL, nats a token", "reward at the end, by seed", *MEASURES]
    heads += [f"{name}, less exact" for name in MEASURES]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for way, found in rows.items():
        ends = ", ".join(f"{value:.3f}" for value in found["reward_at_the_end"])
        cells = [way, f"{found['largest_gap']:.3g}", f"{found['kl']:.3g}", ends]
        cells += [cell(found[name]) for name in MEASURES]
        cells += [cell(found[f"{name}_minus_exact"], "+") if way != "exact" else "" for name in MEASURES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(column: str, runs: dict[str, list[dict[str, Any]]]) -> report.Plot:
    """Return a figure over the steps, the mean of the seeds, with the lowest and the highest as a band."""
    chart = chart_of(column)
    assert chart
    lines = [curve(way, [run[column] for run in found], place) for place, (way, found) in enumerate(runs.items())]
    return report.Plot(chart.title, report.Lines("step", chart.unit, lines))


def curve(way: str, columns: Sequence[Sequence[float | None]], colour: int) -> report.Line:
    known = [
        (step, [one for one in values if one is not None]) for step, values in enumerate(zip(*columns, strict=True))
    ]
    points = [(step, values) for step, values in known if values]
    steps, values = [step for step, _ in points], [values for _, values in points]
    means = [sum(one) / len(one) for one in values]
    return report.Line(way, steps, means, list(map(min, values)), list(map(max, values)), colour)


if __name__ == "__main__":
    main()
