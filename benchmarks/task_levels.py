"""Which levels of the generated tasks a small model begins to solve after SFT on a few hundred worked solutions.

For each task one model is fine-tuned on its worked solutions of the first levels, and answers test problems of each
of these levels: greedily, and sampled at temperature 1. Reinforcement learning can begin where 20 to 60% of the
samples are right. One process, one thread.

    python benchmarks/task_levels.py --model runs/small/model --tasks addition maze --levels 4
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from liaoyuan.cli.process import tune_process

SETTINGS = tune_process(1)

import torch  # noqa: E402  (after the allocator's settings)

from liaoyuan.checkpoint import load_model  # noqa: E402
from liaoyuan.data import Tokenizer, tokenise  # noqa: E402
from liaoyuan.device import cpu_name  # noqa: E402
from liaoyuan.evaluation import measure_accuracy  # noqa: E402
from liaoyuan.tasks import TASKS, Right, Task, find_task, held_out_problems, solution_records  # noqa: E402
from liaoyuan.training import TrainConfig  # noqa: E402
from liaoyuan.tuning import finetune  # noqa: E402
from liaoyuan.tuning.validation import tuning_engine  # noqa: E402

ROOM = 16  # tokens that an answer may be longer than the longest worked solution


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    print(f"{cpu_name()}, one thread, {options.solutions} worked solutions, {options.steps} steps of 1,024 tokens")
    rows = [row for name in options.tasks for row in levels_of(find_task(name), options)]
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        Path(options.json).write_text(json.dumps({"rows": rows, "settings": settings}, indent=2) + "\n")


def levels_of(task: Task, options: argparse.Namespace) -> list[dict[str, float | str]]:
    """Teach the task and measure it level by level; print a line for each."""
    levels = list(task.levels)[options.first : options.first + options.levels]
    tokenizer = Tokenizer.load(options.model)
    records = tokenise(
        tokenizer, solution_records(task, levels, options.solutions, options.seed, 4, hurried=options.hurried)
    )
    model, start = load_model(options.model, torch.float32), time.process_time()
    train = TrainConfig(
        steps=options.steps,
        batch_tokens=1024,
        learning_rate=2e-2,
        weight_decay=0.3,
        optimiser="muon",
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        done = finetune(model, records, train, Path(folder))
    taught = time.process_time() - start
    longest = max(sum(weight > 0 for weight in record.weights) for record in records) + ROOM
    engine, rows = tuning_engine(model.eval(), longest), []
    for level in levels:
        start = time.process_time()
        asked = held_out_problems(task, (level,), options.problems)
        with torch.inference_mode():
            found = measure_accuracy(
                engine, tokenizer, Right(task), asked, options.samples, seed=options.seed, max_tokens=longest
            )
        row = {
            "task": task.name,
            "level": level,
            "greedy": float(found.greedy.mean()),
            "sampled": float(found.sampled.mean()),
            "pass": float(found.pass_at_k.mean()),
            "thought": float(found.thought_lengths.mean()),
            "loss": done.loss,
        }
        seconds = time.process_time() - start
        print(
            f"{task.name:<16} level {level}  greedy {100 * row['greedy']:5.1f}  sampled {100 * row['sampled']:5.1f}  "
            f"pass@{options.samples} {100 * row['pass']:5.1f}  thought {row['thought']:5.1f} tokens  "
            f"SFT {taught:.0f} CPU-s, loss {done.loss:.3f}; measuring {seconds:.0f} CPU-s",
            flush=True,
        )
        rows.append(row)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the model to begin with, of `liaoyuan train`")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--first", type=int, default=0, help="so many of the easiest levels are left out")
    parser.add_argument("--levels", type=int, default=4, help="how many levels")
    parser.add_argument("--solutions", type=int, default=600)
    parser.add_argument("--hurried", type=float, default=0.0, help="see `liaoyuan tasks write`")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
