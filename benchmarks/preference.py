"""Preference losses beside each other and beside fine-tuning, on pairs of a small model's own right and wrong answers.

A model is taught written-out addition from random weights by a few worked solutions, until about half of its answers
are right. Its samples of fresh problems make the pairs: a right answer is better than a wrong one to the same problem.
From there every loss, and fine-tuning on the right answers, trains on as many tokens; a pass without gradients (the
reference, KTO's divergence) counts a third. All use `tuning.preference.run_preference`, as `liaoyuan tune dpo` does.
Each way chooses its learning rate on validation problems with a seed of its own, which is not reported; betas and
margins are the papers'. Intervals are bootstrapped over problems and seeds; differences are paired.

    python benchmarks/preference.py --out runs/preference --json preference.json

It goes on from what is in `--out`. About 6 CPU-minutes of one thread.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liaoyuan.cli.process import tune_process

SETTINGS = tune_process()

import numpy as np  # noqa: E402  (after the allocator's settings)
import torch  # noqa: E402

from liaoyuan.checkpoint import load_model, save_model  # noqa: E402
from liaoyuan.data import Message, Record, Tokenizer, read_records, train_tokenizer, write_records  # noqa: E402
from liaoyuan.device import cpu_name  # noqa: E402
from liaoyuan.evaluation import bootstrap, completions_of, measure_accuracy, read_rollout  # noqa: E402
from liaoyuan.models import Decoder, ModelConfig, initialise  # noqa: E402
from liaoyuan.parallel import Program, World  # noqa: E402
from liaoyuan.rundir import Progress  # noqa: E402
from liaoyuan.tasks import Problem, Right, Rollout, find_task, held_out_problems, spread  # noqa: E402
from liaoyuan.training import TrainConfig  # noqa: E402
from liaoyuan.tuning.finetune import finetune, worked_solutions  # noqa: E402
from liaoyuan.tuning.jobs import Job, run_jobs  # noqa: E402
from liaoyuan.tuning.preference import FORWARD, run_preference  # noqa: E402
from liaoyuan.tuning.preference_batches import Judged, judge  # noqa: E402
from liaoyuan.tuning.preference_config import PreferenceConfig, PreferenceTrain  # noqa: E402
from liaoyuan.tuning.preference_objective import PreferenceLoss  # noqa: E402
from liaoyuan.tuning.reference import answer_log_probs  # noqa: E402
from liaoyuan.tuning.validation import tuning_engine  # noqa: E402

TASK, LEVELS = find_task("addition"), (2, 3, 4)
MAX_TOKENS = 64
SAMPLES = 8  # of each problem, of which pairs are made
PAIRS = 2  # of a problem at most
HELD_OUT = 0.15  # share of the problems whose pairs are not learned
ROW = 256
TUNED_ON = 100  # the seed on which learning rates are chosen
RATES: dict[str, tuple[float, ...]] = {
    "sft": (3e-4, 1e-3, 3e-3, 1e-2),
    "dpo": (1e-5, 3e-5, 1e-4, 3e-4),
    "ipo": (1e-5, 3e-5, 1e-4, 3e-4),
    "kto": (3e-5, 1e-4, 3e-4, 1e-3),
    "orpo": (3e-4, 1e-3, 3e-3, 1e-2),
    "simpo": (1e-5, 3e-5, 1e-4, 3e-4),
}


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    print(f"{cpu_name()}, one thread")
    started = time.process_time()
    folder = Path(options.out)
    tuned = seed_jobs(folder, TUNED_ON, options, RATES)
    rates = {way: max(tuned[way], key=validation)["rate"] for way in RATES}
    seeds = [seed_jobs(folder, seed, options, {way: (rate,) for way, rate in rates.items()}) for seed in options.seeds]
    result = summary(seeds, rates, tuned)
    print(table(result))
    result["cpu_seconds"] = time.process_time() - started
    print(f"{result['cpu_seconds']:.0f} CPU-seconds in this process")
    if options.json:
        Path(options.json).write_text(json.dumps(result | {"settings": vars(options)}, indent=2) + "\n")


def validation(run: dict[str, Any]) -> float:
    """Return the mean of greedy and sampled accuracy on validation problems, by which a learning rate is chosen."""
    return float(np.mean(run["validation_greedy"]) + np.mean(run["validation_sampled"])) / 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/preference")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--solutions", type=int, default=600, help="worked solutions that the start learns from")
    parser.add_argument("--start-steps", type=int, default=500, help="of 1024 tokens, by which the start is taught")
    parser.add_argument("--problems", type=int, default=1200, help="fresh ones, whose samples make the pairs")
    parser.add_argument("--tokens", type=int, default=200_000, help="that each way trains on")
    parser.add_argument("--test-problems", type=int, default=600)
    parser.add_argument("--json", default="")
    return parser.parse_args()


def seed_jobs(
    folder: Path, seed: int, options: argparse.Namespace, rates: dict[str, tuple[float, ...]]
) -> dict[str, list[dict[str, Any]]]:
    """Return what each way reached with each of its rates, and the start under "start"; done ones are read again."""
    place = folder / f"seed-{seed}"
    shared = {"seed": seed, "options": vars(options)}
    run = [Job(f"{seed} start", place / "start", start, shared)]
    run_jobs(run, 0, say)
    jobs = {
        way: [
            Job(f"{seed} {way} {rate:g}", place / way / f"{rate:g}", learn, shared | {"way": way, "rate": rate})
            for rate in given
        ]
        for way, given in rates.items()
    }
    found = {"start": [run[0].result]}
    for way, some in jobs.items():
        found[way] = run_jobs(some, 0, say)
        print(f"seed {seed}: {way} done", flush=True)
    return found


def say(progress: Progress) -> None:
    """Draw nothing: a line a way is enough."""


def start(folder: Path, report: Any, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Teach a model from random weights, write it and its pairs, and measure it."""
    texts = (TASK.problem(0, index, LEVELS[index % len(LEVELS)], "train") for index in range(50))
    train_tokenizer((f"{one.question}{one.thought}{one.answer}\n" for one in texts), 263 + 8).save(folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    model = initialise(Decoder(shape(tokenizer)), seed)
    solutions = worked_solutions(TASK, LEVELS, options["solutions"], seed, 0, tokenizer)
    finetune(model, solutions, taught(options["start_steps"], 1024, 2e-2, seed, "muon", 0.3), folder / "sft")
    save_model(model, folder / "model", folder / "tokenizer")
    pairs = own_pairs(model, tokenizer, options["problems"], seed)
    held = round(HELD_OUT * len(pairs))
    flat = [[record for one in part for record in one] for part in (pairs[held:], pairs[:held])]
    for name, part in zip(("learn", "held_out"), flat, strict=True):
        write_records(folder / f"{name}.jsonl", part)
    counts = {"pairs": len(flat[0]), "held_out_pairs": len(flat[1])}
    return counts | measure(folder / "model", seed, options)


def shape(tokenizer: Tokenizer) -> ModelConfig:
    """A decoder of 177,280 weights."""
    return ModelConfig(
        model_type="qwen3",
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=ROW,
        tie_word_embeddings=True,
        qk_norm=True,
        eos_token_id=tokenizer.eos_ids[0],
    )


def taught(steps: int, tokens: int, rate: float, seed: int, optimiser: str, decay: float) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "steps": steps,
            "batch_tokens": tokens,
            "learning_rate": rate,
            "warmup_steps": min(20, steps // 10),
            "weight_decay": decay,
            "optimiser": optimiser,
            "seed": seed,
            "checkpoint_every": 10 * steps,
        }
    )


def own_pairs(model: Decoder, tokenizer: Tokenizer, count: int, seed: int) -> list[list[Record]]:
    """Return for each problem that was answered both right and wrong its pairs of such answers, at most `PAIRS`."""
    problems = spread(TASK, 10 + seed, LEVELS, count, "train")
    engine = tuning_engine(model.eval(), MAX_TOKENS)
    with torch.inference_mode():
        answers = completions_of(engine, tokenizer, problems, SAMPLES, 1.0, True, seed, MAX_TOKENS)
    found, right = [], Right(TASK)
    for place, problem in enumerate(problems):
        read = [read_rollout(tokenizer, problem, one) for one in answers[place * SAMPLES : (place + 1) * SAMPLES]]
        whole = {(one.thought, one.text): one for one in read if not one.flaw}.values()
        sides = [[one for one in whole if right(one).is_right is wanted] for wanted in (True, False)]
        pairs = [pair(problem, n, *two) for n, two in enumerate(zip(*sides, strict=False))][:PAIRS]
        found += [pairs] if pairs else []
    return found


def pair(problem: Problem, number: int, chosen: Rollout, rejected: Rollout) -> Record:
    def message(one: Rollout) -> tuple[Message, ...]:
        return (Message(role="assistant", content=one.text, think=one.thought),)

    return Record(
        id=f"{problem.key}/{number}",
        kind="preference",
        messages=(Message(role="user", content=problem.question),),
        chosen=message(chosen),
        rejected=message(rejected),
        source="generated",
    )


def learn(folder: Path, report: Any, seed: int, options: dict[str, Any], way: str, rate: float) -> dict[str, Any]:
    """Train from the start on its pairs with one loss, or by fine-tuning on the right answers, and measure it."""
    given, batch = folder.parent.parent / "start", 8 * ROW
    free = free_tokens(given, way)
    train = taught(round((options["tokens"] - free) / batch), batch, rate, seed, "adamw", 0.0)
    begun = time.process_time()
    if way == "sft":
        model, items = load_model(given / "model"), judged(given, "learn")
        finetune(model, [item.answers[0] for item in items], train, folder, sequence_length=ROW)
        save_model(model, folder / "model", given / "tokenizer")
    else:
        config = PreferenceConfig(
            model=given / "model",
            data=given / "learn.jsonl",
            held_out=given / "held_out.jsonl",
            preference=PreferenceLoss.model_validate({"loss": way}),
            train=PreferenceTrain.model_validate(train.model_dump()),
            sequence_length=ROW,
            device="cpu",
        )
        run_preference(config, folder)
    spent = {"cpu_seconds": time.process_time() - begun, "steps": train.steps, "rate": rate}
    return spent | measure(folder / "model", seed, options, given)


def free_tokens(given: Path, way: str) -> float:
    """Return what passes without gradients cost a way, in tokens that are trained on."""
    items = judged(given, "learn")
    answers = FORWARD * sum(item.size for item in items)
    if way == "kto":  # the divergence of each step, about as many passes as the pairs are shown; and its reference
        return answers * 1.5
    return answers if way in ("dpo", "ipo") else 0.0


def judged(given: Path, name: str) -> list[Judged]:
    return judge(Tokenizer.load(given / "model"), read_records(given / f"{name}.jsonl"), paired=True)


def measure(model: Path, seed: int, options: dict[str, Any], given: Path | None = None) -> dict[str, Any]:
    """Return what a model folder reaches on validation and test problems, and how it judges held-out pairs."""
    tokenizer, decoder = Tokenizer.load(model), load_model(model).eval()
    found: dict[str, Any] = {}
    sets = {"validation": spread(TASK, 7, LEVELS, 200, "validation")} if seed == TUNED_ON else {}
    sets |= {} if seed == TUNED_ON else {"test": held_out_problems(TASK, LEVELS, options["test_problems"])}
    for name, problems in sets.items():
        engine = tuning_engine(decoder, MAX_TOKENS)
        answers = measure_accuracy(engine, tokenizer, Right(TASK), problems, 4, seed=seed, max_tokens=MAX_TOKENS)
        found[f"{name}_greedy"], found[f"{name}_sampled"] = answers.greedy.astype(int), answers.sampled_mean
    items = judged(given or model.parent, "held_out")
    program = Program([decoder])
    total = answer_log_probs(program, [one for item in items for one in item.answers], ROW, World()).view(-1, 2)
    found |= {"pair_accuracy": (total[:, 0] > total[:, 1]).int().numpy(), "chosen": total[:, 0].numpy()}
    found["rejected"] = total[:, 1].numpy()
    return {name: value.tolist() for name, value in found.items()}


MEASURES = {
    "test_greedy": "greedy %",
    "test_sampled": "sampled %",
    "pair_accuracy": "pairs %",
    "chosen": "log p(chosen)",
    "rejected": "log p(rejected)",
}


def summary(
    seeds: Sequence[dict[str, list[dict[str, Any]]]], rates: dict[str, float], tuned: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Return measures of each way with intervals over problems and seeds, and paired differences to fine-tuning."""
    rows = {}
    for way in ("start", *rates):
        runs = [seed[way][0] for seed in seeds]
        values = {name: stacked(runs, name) for name in MEASURES}
        control = {name: stacked([seed["sft"][0] for seed in seeds], name) for name in MEASURES}
        rows[way] = {
            "rate": rates.get(way),
            "cpu_seconds": sum(run.get("cpu_seconds", 0.0) for run in runs) / len(runs),
            **{name: bootstrap(value).to_dict() for name, value in values.items()},
            "minus_sft": {name: bootstrap(values[name] - control[name]).to_dict() for name in MEASURES},
            "greedy_by_seed": [float(np.mean(run["test_greedy"])) for run in runs],
        }
    validations = {way: {run["rate"]: round(validation(run), 3) for run in tuned[way]} for way in rates}
    pairs = [(seed["start"][0]["pairs"], seed["start"][0]["held_out_pairs"]) for seed in seeds]
    return {"rows": rows, "validation_by_rate": validations, "pairs": pairs, "seeds": len(seeds)}


def stacked(runs: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Return outcomes [seeds, problems]; seeds have pairs of their own, of which as many count as the fewest have."""
    fewest = min(len(run[name]) for run in runs)
    return np.array([run[name][:fewest] for run in runs], dtype=np.float64)


def table(result: dict[str, Any]) -> str:
    """Return the measures of all ways as a Markdown table."""
    heads = ["", "rate", *MEASURES.values(), "greedy less SFT's", "sampled less SFT's", "CPU-s"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for way, row in result["rows"].items():
        cells = [way, f"{row['rate']:g}" if row["rate"] else ""]
        cells += [cell(row[name], name) for name in MEASURES]
        cells += [cell(row["minus_sft"][name], name) for name in ("test_greedy", "test_sampled")]
        lines.append("| " + " | ".join([*cells, f"{row['cpu_seconds']:.1f}"]) + " |")
    lines.append(f"\npairs learned, held out: {result['pairs']}")
    lines += [f"validation of {way} by rate: {rates}" for way, rates in result["validation_by_rate"].items()]
    return "\n".join(lines)


def cell(value: dict[str, float], name: str) -> str:
    size = 1 if name in ("chosen", "rejected") else 100
    return f"{size * value['mean']:.1f} ({size * value['low']:.1f} to {size * value['high']:.1f})"


if __name__ == "__main__":
    main()
