"""Reinforcement learning beside TRL's GRPO: rollouts and one update, tokens generated a second.

The same weights, prompts, number of answers, longest answer, temperature and reward (1 for every second answer, so that
every group teaches); one update from all answers of a step. Each side is a process that takes a step when it is asked
to; they take turns, and medians are shown. TRL generates in its own process with the weights that it trains, as ours
does; its two ways of doing so are both measured (`--ways`).

Models of random weights (`--models`) never end an answer, so all are of one length. With `--model DIR`, one that was
fine-tuned on additions, answers end where they do in a run.

    python benchmarks/rl_peer.py prepare FOLDER
    python benchmarks/rl_speed.py --peers FOLDER --models m1 m10 --json rl_speed.json
    python benchmarks/rl_speed.py --peers FOLDER --model runs/quickstart/seed-0/sft/best
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from liaoyuan.cli.process import tune_process

tune_process()

import torch  # noqa: E402  (after the allocator's settings)

from liaoyuan.checkpoint import load_model, save_model  # noqa: E402
from liaoyuan.data import Tokenizer, train_tokenizer  # noqa: E402
from liaoyuan.device import cpu_name  # noqa: E402
from liaoyuan.inference import Completion  # noqa: E402
from liaoyuan.models import Decoder, ModelConfig, initialise  # noqa: E402
from liaoyuan.rundir import Progress, read_metrics  # noqa: E402
from liaoyuan.tasks import Problem, Rollout, Score, find_task  # noqa: E402
from liaoyuan.tuning import ReinforceConfig, reinforce, rollout  # noqa: E402

SIZES = {  # hidden, intermediate, layers, query heads, key-value heads, vocabulary
    "m1": (128, 384, 4, 4, 2, 2048),
    "m10": (320, 960, 6, 5, 5, 8192),
    "m30": (512, 1536, 8, 8, 4, 16384),
}
LEVELS = (2, 3, 4)


def main() -> None:
    options = parse()
    if options.ours:
        ours(json.loads(options.ours.read_text()))
        return
    print(f"{cpu_name()}, {options.threads} threads, {options.dtype}, {options.problems} problems x {options.group}")
    rows = [row for model in options.model or options.models for row in measure(str(model), options)]
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": rows, "cpu": cpu_name()}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder that rl_peer.py prepare made; none: ours alone")
    parser.add_argument("--models", nargs="+", default=["m1"], choices=SIZES)
    parser.add_argument("--model", nargs="+", type=Path, metavar="DIR", help="trained models, in place of --models")
    parser.add_argument("--ways", nargs="+", default=["generate"], choices=("generate", "continuous"))
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="of the longest answer")
    parser.add_argument("--rows", type=int, default=64, help="answers of a forward pass of TRL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Let the sides take turns; return a row for each."""
    with tempfile.TemporaryDirectory() as work:
        folder, model = Path(work), Path(name).resolve()
        if name in SIZES:
            model = folder / "model"
            make_model(name, model)
        sides = {"ours": start([sys.executable, __file__, "--ours"], write_task(folder, model, "ours", options))}
        for way in options.ways if options.peers else ():
            python = [str(options.peers / "trl" / "bin" / "python"), str(Path(__file__).with_name("rl_peer.py")), "run"]
            sides[f"TRL, {way}"] = start(python, write_task(folder, model, way, options))
        steps: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for place in range(options.rounds + 1):
            for side, process in sides.items():
                found = step(process)
                if place:  # the first one compiles, allocates and fills caches
                    steps[side].append(found)
        for process in sides.values():
            process.kill()
    return [show(name, side, found) for side, found in steps.items()]


def make_model(name: str, folder: Path) -> None:
    hidden, intermediate, layers, heads, key_value_heads, vocabulary = SIZES[name]
    config = ModelConfig(
        "qwen3", vocabulary, hidden, intermediate, layers, heads, key_value_heads, 64,
        max_position_embeddings=512, qk_norm=True, tie_word_embeddings=True,
    )  # fmt: skip
    train_tokenizer(["12+34=?"], 271).save(folder.parent / "tokenizer")
    save_model(initialise(Decoder(config), 0), folder, folder.parent / "tokenizer")


def write_task(folder: Path, model: Path, way: str, options: argparse.Namespace) -> Path:
    tokenizer, task = Tokenizer.load(model), find_task("addition")
    problems = [task.problem(0, place, LEVELS[place % 3]) for place in range(4 * options.problems)]
    prompts = [tokenizer.decode(tokenizer.render([{"role": "user", "content": p.question}]), False) for p in problems]
    path = folder / f"{way}.json"
    path.write_text(json.dumps({
        "model": str(model), "folder": str(folder), "prompts": prompts, "group": options.group,
        "problems": options.problems, "max_tokens": options.tokens, "threads": options.threads,
        "dtype": options.dtype, "rows": options.rows, "way": way, "steps": options.rounds + 1,
    }))  # fmt: skip
    return path


def start(command: list[str], task: Path) -> subprocess.Popen[str]:
    log = task.with_suffix(".log").open("w")
    return subprocess.Popen([*command, str(task)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)


def step(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdin and process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit(f"A side ended: {process.args}")
    found: dict[str, float] = json.loads(answer)
    return found


def show(name: str, side: str, steps: list[dict[str, float]]) -> dict[str, Any]:
    rate, cpu = (statistics.median(one["tokens"] / one[key] for one in steps) for key in ("seconds", "cpu_seconds"))
    tokens = statistics.median(one["tokens"] for one in steps)
    print(f"{name:>5}  {side:16} {rate:9,.0f} tokens/s  {cpu:9,.0f} per CPU-second  ({tokens:,.0f} tokens a step)")
    return {"model": name, "side": side, "tokens_per_second": rate, "tokens_per_cpu_second": cpu, "tokens": tokens}


def ours(task: dict[str, Any]) -> None:
    """Take steps when asked to, as `rl_peer.run` does."""
    torch.set_num_threads(task["threads"])
    rollout.read_rollout = unread
    folder, began = Path(task["folder"]) / "run", (0.0, 0.0)
    config = ReinforceConfig(
        levels=LEVELS, steps=task["steps"], problems=task["problems"], group=task["group"],
        update_group=task["group"], minibatches=1, max_tokens=task["max_tokens"], learning_rate=1e-5,
        checkpoint_every=1_000_000, measure_kl=False,
    )  # fmt: skip

    def report(_: Progress) -> None:
        nonlocal began
        seconds, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
        values = read_metrics(folder / "metrics.jsonl")[-1]
        assert not values["no_signal"], "every group is to teach"
        tokens = values["length"] * task["problems"] * task["group"]
        print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu}), flush=True)
        began = wait(sys.stdin)

    model = load_model(Path(task["model"]), getattr(torch, task["dtype"]))
    began = wait(sys.stdin)
    tokenizer = Tokenizer.load(Path(task["model"]))
    reinforce(model, tokenizer, find_task("addition"), config, folder, report, reward=EverySecond())


def wait(lines: IO[str]) -> tuple[float, float]:
    lines.readline()
    return time.perf_counter(), time.process_time()


class EverySecond:
    """1 for every second answer, as `rl_peer.py` has it."""

    name = "every second"

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, rollout: Rollout) -> Score:
        self._count += 1
        return Score(float(self._count % 2), "")


def unread(_: Tokenizer, problem: Problem, answer: Completion, thinking: bool = True) -> Rollout:
    return Rollout(problem, "", "", "", len(answer.tokens))


if __name__ == "__main__":
    main()
