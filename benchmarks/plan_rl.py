"""Reinforcement learning as planned beside runs of it: seconds of rollouts and of training a step, and their shares.

The engine's rates and the prices of updates are measured before the runs, on the same model, by `plan.serving.measured`
and `plan.tuning.measured`; the plan is told how long answers are and how many groups teach, which are what a user
would have to guess. Weights are drawn at random and so are rewards, so that every group teaches something. All seconds
are CPU-seconds, of one thread.

    python benchmarks/plan_rl.py
"""

import argparse
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from liaoyuan.compute.plan import read_cluster
from liaoyuan.compute.plan.machine.profile import assumed
from liaoyuan.compute.plan.serving import EngineRates, Machines, Served, StepPrice, measure
from liaoyuan.compute.plan.tuning import RlJob, RlPlanner, Split, UpdatePrice, measure_updates
from liaoyuan.data import Tokenizer, train_tokenizer
from liaoyuan.evaluation import prompt_of
from liaoyuan.models import Decoder, ModelConfig, initialise
from liaoyuan.rundir import read_metrics
from liaoyuan.tasks import Rollout, Score, find_task
from liaoyuan.tuning import ReinforceConfig, reinforce
from liaoyuan.tuning.validation import tuning_engine

COMMON = {"levels": (2, 3), "measure_kl": False, "validate_every": 1000, "checkpoint_every": 1000}
RUNS: dict[str, dict[str, object]] = {
    "as it is": {},
    "short answers": {"max_tokens": 12},
    "long answers": {"max_tokens": 160},
    "few answers, all learned": {"group": 4, "update_group": 4},
    "many answers, few learned": {"group": 16, "update_group": 2},
    "one update": {"minibatches": 1, "group": 8, "update_group": 8},
    "a critic": {"advantage": "gae", "group": 4},
}


@dataclass(frozen=True)
class Chance:
    """A reward that has nothing to do with the answer, but is the same for the same one."""

    name: str = "chance"

    def __call__(self, rollout: Rollout) -> Score:
        return Score(float(len(rollout.text) * 7 + sum(map(ord, rollout.text[:8])) & 1), rollout.text)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        rows = [compare(name, settings, Path(place), options) for name, settings in RUNS.items()]
    errors = {key: [row["planned"][key] / row["measured"][key] - 1 for row in rows] for key in ("rollout", "training")}
    shares = [abs(row["planned"]["share"] - row["measured"]["share"]) for row in rows]
    both = [np.array([row[side]["step"] for row in rows]) for side in ("planned", "measured")]
    ranks = [values.argsort().argsort() for values in both]
    summary = {
        "median_error": {key: round(float(np.median(np.abs(found))), 3) for key, found in errors.items()},
        "bias": {key: round(float(np.mean(found)), 3) for key, found in errors.items()},
        "step_median_error": round(float(np.median(np.abs(both[0] / both[1] - 1))), 3),
        "step_spearman": round(float(np.corrcoef(*ranks)[0, 1]), 3),
        "share_apart_mean": round(float(np.mean(shares)), 3),
        "share_apart_most": round(float(np.max(shares)), 3),
    }
    print(json.dumps(summary, indent=1))
    if options.out:
        options.out.write_text(json.dumps({"rows": rows, "summary": summary}, indent=1))


def compare(name: str, settings: dict[str, object], place: Path, options: argparse.Namespace) -> dict:
    """Run a few steps, plan the same, and print a row of the table."""
    rl = ReinforceConfig.model_validate(COMMON | settings | {"steps": options.steps})
    task, tokenizer = find_task("addition"), tokenizer_in(place)
    model = initialise(Decoder(shape(tokenizer, options)), seed=0).eval()
    cluster = read_cluster("cpu")
    profile = assumed(cluster)
    price = StepPrice(Served(model.config), cluster, profile.median(), EngineRates())
    rates, _ = measure(model, price, options.rounds)
    scale = measure_updates(model, UpdatePrice(model.config, cluster, profile.median()), options.rounds)
    engine = tuning_engine(model, rl.max_tokens).config
    folder = place / name
    folder.mkdir()
    done = reinforce(model, tokenizer, task, rl, folder, reward=Chance())
    rows = list(read_metrics(folder / "metrics.jsonl"))[1:]  # the first warms up
    measured = phases_of(rows, rl)
    length, taught = (float(np.mean([row[key] for row in rows])) for key in ("length", "no_signal"))
    problem = task.problem(rl.seed, 0, 2, "train")
    job = RlJob(model.config, rl, len(prompt_of(tokenizer, problem)), length, 0.3, 1 - taught, corrected=not done.exact)
    found = RlPlanner(job, Machines(cluster, profile, rates), scale, engine).plan(Split(1), interval=False).phases
    assert found
    training = found.training + found.scoring
    planned = {"rollout": found.rollout, "training": training, "step": found.rollout + training}
    planned["share"] = planned["rollout"] / planned["step"]
    cells = (f"{key} {planned[key]:8.3g} {measured[key]:8.3g}" for key in planned)
    print(f"{name:28} " + " | ".join(cells), flush=True)
    return {"run": name, "planned": planned, "measured": measured}


def phases_of(rows: list[dict], rl: ReinforceConfig) -> dict[str, float]:
    """Return the mean CPU-seconds of a step's rollouts and of its training, as the metrics tell them."""
    rollouts = [rl.problems * rl.group * row["length"] / row["rollout_tokens_per_second"] for row in rows]
    spent = (rows[-1]["cpu_seconds"] - rows[0]["cpu_seconds"]) / (len(rows) - 1)
    rollout = float(np.mean(rollouts[1:]))
    return {"rollout": rollout, "training": spent - rollout, "step": spent, "share": rollout / spent}


def tokenizer_in(place: Path) -> Tokenizer:
    folder = place / "tokenizer"
    if not folder.exists():
        train_tokenizer(["12+34=?\n", "the answer"], 263 + 8).save(folder)
    return Tokenizer.load(folder)


def shape(tokenizer: Tokenizer, options: argparse.Namespace) -> ModelConfig:
    base = ModelConfig(
        model_type="qwen3",
        vocab_size=tokenizer.vocab_size,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 32,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        qk_norm=True,
    )
    return replace(base, eos_token_id=tokenizer.eos_ids[0])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1, help="of the calibration before each run")
    parser.add_argument("--out", type=Path, help="a JSON file of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
