"""Levels drawn by difficulty beside levels drawn alike: the same start, the same CPU-seconds, accuracy by level.

From one model, `rl.staging` is `signal` (levels by how often their groups teach), `bounds` (so that the share of right
answers stays within bounds) or `none`; everything else is the same. The levels reach beyond what the start can do.
Harder problems have longer answers, so a step of one way costs more than a step of another: a part of a run with a seed
that is not reported says how many CPU-seconds (rollouts and updates) a step costs, and each way gets as many steps as
the same seconds pay for. Each run keeps its best checkpoint on validation problems, which are of all levels alike, as
the test problems are. Intervals are bootstrapped over problems and seeds, differences paired by both.

    python benchmarks/staging.py --model runs/quickstart/seed-0/sft/best --out runs/staging --json staging.json \\
        --plot docs/images/staging.svg

The model is any that sometimes solves the easier levels, such as the SFT model of a quickstart or of docs/tune.md. It
goes on from what is in `--out`. About 3 CPU-minutes of one thread; `--quick` takes half a minute and shows nothing.
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

from liaoyuan import report  # noqa: E402
from liaoyuan.checkpoint import load_model  # noqa: E402
from liaoyuan.data import Tokenizer  # noqa: E402
from liaoyuan.device import cpu_name  # noqa: E402
from liaoyuan.evaluation import bootstrap  # noqa: E402
from liaoyuan.rundir import Report, write_atomic  # noqa: E402
from liaoyuan.tasks import find_task  # noqa: E402
from liaoyuan.tuning import ReinforceConfig, reinforce  # noqa: E402
from liaoyuan.tuning.jobs import Job, run_jobs  # noqa: E402
from liaoyuan.tuning.rl_run import RlConfig, run_rl  # noqa: E402
from rl_answers import MEASURES, answers_of, cell, parser_of  # noqa: E402

WAYS = {"none": "levels alike", "signal": "by signal", "bounds": "within bounds"}
PRICED_ON = 100  # the seed on which a step's cost is measured
PART, FEWEST = 3, 10  # a run is priced on one part of so many, and on so many steps at least


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    print(f"{cpu_name()}, one thread")
    steps = affordable(options)
    print(f"steps: {steps}", flush=True)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ("start", *WAYS)}
    for seed in options.seeds:
        for way in WAYS:
            runs[way].append(only(seed, way, options, learn, steps=steps[way]))
            print(f"seed {seed}: {way} done", flush=True)
    runs["start"] = [only(PRICED_ON, "start", options, measure_start)] * len(options.seeds)
    rows = {way: row(way, runs) for way in runs}
    print(table(rows, options.levels))
    if options.json:
        found = {"steps": steps, "rows": rows, "settings": vars(options)}
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")
    if options.plot:
        write_atomic(Path(options.plot), report.picture(plot(rows, options.levels)))


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, "runs/staging")
    parser.add_argument("--levels", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--max-tokens", type=int, default=64, help="of one answer")
    parser.add_argument("--steps", type=int, default=60, help="of the run whose levels are drawn alike")
    parser.add_argument("--test-problems", type=int, default=500)
    parser.add_argument("--plot", default="", help="picture of the differences (.svg)")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.test_problems = [0, 1], 6, 50
    return options


def only(seed: int, way: str, options: argparse.Namespace, work: Any, **more: Any) -> dict[str, Any]:
    """Return what one job found; one that was done before is read again."""
    about = {"way": way, "seed": seed, "options": vars(options)}
    return run_jobs([Job(f"{seed} {way}", Path(options.out) / f"seed-{seed}" / way, work, about | more)], 0)[0]


def affordable(options: argparse.Namespace) -> dict[str, int]:
    """Return how many steps of each way cost as much as `--steps` of levels that are drawn alike."""
    prices = {way: only(PRICED_ON, way, options, price)["seconds_a_step"] for way in WAYS}
    return {way: round(options.steps * prices["none"] / price) for way, price in prices.items()}


def price(folder: Path, report: Report, way: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Run the first part of a run and return the CPU-seconds of a step."""
    model, config = Path(options["model"]), recipe(way, seed, options["steps"], options)
    arguments = (load_model(model), Tokenizer.load(model), find_task(options["task"]), config, folder)
    done = reinforce(*arguments, until=max(FEWEST, options["steps"] // PART))
    return {"seconds_a_step": done.cpu_seconds / done.steps}


def recipe(way: str, seed: int, steps: int, options: dict[str, Any]) -> ReinforceConfig:
    return ReinforceConfig.model_validate(
        {
            "levels": options["levels"],
            "staging": way,
            "steps": steps,
            "seed": seed,
            "max_tokens": options["max_tokens"],
            "validate_every": max(1, steps // 5),
            "measure_kl": False,
        }
    )


def learn(folder: Path, report: Report, way: str, seed: int, options: dict[str, Any], steps: int) -> dict[str, Any]:
    """Reinforce the start with levels drawn in one way, and measure the result."""
    config = RlConfig(
        model=Path(options["model"]),
        task=options["task"],
        rl=recipe(way, seed, steps, options),
        validation_problems=100,
        test_problems=0,
        device="cpu",
    )
    done = run_rl(config, folder)
    spent = {name: done[name] for name in ("cpu_seconds", "generated_tokens", "trained_tokens", "updates")}
    return spent | measure(folder / "model", options)


def measure_start(folder: Path, report: Report, way: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    return measure(Path(options["model"]), options)


def measure(model: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return how often a model is right on each test problem, and the level of each."""
    found = answers_of(load_model(model), Tokenizer.load(model), options, options["max_tokens"])
    columns = {"greedy": found.greedy.astype(int), "sampled": found.sampled_mean, "levels": found.levels}
    return {name: values.tolist() for name, values in columns.items()}


def row(way: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return a way's accuracy and its paired difference to levels drawn alike, of all problems and by level."""
    found: dict[str, Any] = {"cpu_seconds": [run.get("cpu_seconds", 0.0) for run in runs[way]]}
    levels = np.array(runs[way][0]["levels"])
    for name in MEASURES:
        values, others = (np.array([run[name] for run in runs[one]], dtype=float) for one in (way, "none"))
        parts = {"all": levels > 0} | {str(level): levels == level for level in sorted(set(levels))}
        found[name] = {part: bootstrap(values[:, own]).to_dict() for part, own in parts.items()}
        found[f"{name}_minus_none"] = {
            part: bootstrap((values - others)[:, own]).to_dict() for part, own in parts.items()
        }
        found[f"{name}_minus_none_by_seed"] = (values - others).mean(1).tolist()
    return found


def table(rows: dict[str, dict[str, Any]], levels: Sequence[int]) -> str:
    """Return accuracy, its difference to levels drawn alike, and accuracy by level as Markdown tables."""
    heads = ["", *MEASURES, *(f"{name}, less levels alike" for name in MEASURES), "CPU-s by seed"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for way, found in rows.items():
        cells = [cell(found[name]["all"]) for name in MEASURES]
        cells += [difference(found, name) if way not in ("none", "start") else "" for name in MEASURES]
        seconds = ", ".join(f"{each:.1f}" for each in found["cpu_seconds"]) if way != "start" else ""
        lines.append("| " + " | ".join([WAYS.get(way, "the start"), *cells, seconds]) + " |")
    lines += ["", "| greedy, sampled | " + " | ".join(f"level {level}" for level in levels) + " |"]
    lines.append("|" + "---|" * (len(levels) + 1))
    for way, found in rows.items():
        pairs = [[found[name][str(level)]["mean"] for name in MEASURES] for level in levels]
        cells = [", ".join(f"{100 * mean:.1f}" for mean in pair) for pair in pairs]
        lines.append("| " + " | ".join([WAYS.get(way, "the start"), *cells]) + " |")
    return "\n".join(lines)


def difference(found: dict[str, Any], name: str) -> str:
    seeds = ", ".join(f"{100 * value:+.1f}" for value in found[f"{name}_minus_none_by_seed"])
    return f"{cell(found[f'{name}_minus_none']['all'], '+')}; seeds {seeds}"


def plot(rows: dict[str, dict[str, Any]], levels: Sequence[int]) -> report.Plot:
    """Return the paired differences of sampled accuracy to levels drawn alike, of all problems and by level."""
    parts = ["all", *map(str, levels)]
    values = [
        [report.Interval(**rows[way]["sampled_minus_none"][part]) for part in parts] for way in ("signal", "bounds")
    ]
    names = ["all levels", *(f"level {level}" for level in levels)]
    drawing = report.Intervals(
        "points of sampled accuracy, more than with levels drawn alike",
        names,
        [WAYS["signal"], WAYS["bounds"]],
        values,
        zero=True,
    )
    return report.Plot("Staged by difficulty less unstaged, the same compute", drawing)


if __name__ == "__main__":
    main()
