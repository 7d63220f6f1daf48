"""What long prompts do to those who are getting their tokens: one kind of worker, or prefill and decode apart.

`--streams` requests with short prompts decode while long prompts arrive one after the other. Each set-up has two
processes of one thread: `alike`, two workers that do everything, at two budgets of tokens a step (the smaller one cuts
prompts into pieces, the other remedy for the same ill); `apart`, one for prompts and one that decodes. Reported: time
between tokens of the short requests, time to the first token of the long ones, and all tokens a second; set-ups take
turns, medians over rounds.

    python benchmarks/disaggregation.py --rounds 3 --json disaggregation.json
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from liaoyuan.checkpoint import save_model
from liaoyuan.device import cpu_name
from liaoyuan.inference import EngineConfig, Request, SamplingParams
from liaoyuan.inference.disaggregation.dispatch import Dispatch
from liaoyuan.inference.disaggregation.process import start_worker
from liaoyuan.models import Decoder, ModelConfig, initialise

MODEL = ModelConfig(
    "qwen3", 8192, 384, 1152, 8, 8, 4, 48, max_position_embeddings=4096, qk_norm=True, tie_word_embeddings=True,
    dtype="bfloat16",
)  # fmt: skip
SETUPS = {"alike, 2048 tokens a step": (2048, 0), "alike, 128 tokens a step": (128, 0), "apart": (2048, 1)}
Row = dict[str, float]


def main() -> None:
    options = parse()
    print(f"{cpu_name()}, two processes of one thread, {MODEL.num_parameters():,} weights in {MODEL.dtype}")
    rows: dict[str, list[Row]] = {name: [] for name in SETUPS}
    with tempfile.TemporaryDirectory() as folder:
        save_model(initialise(Decoder(MODEL), 0), Path(folder) / "model")
        for turn in range(options.rounds):
            for name, (budget, prefill) in SETUPS.items():
                rows[name].append(asyncio.run(measure(Path(folder), f"{turn}", budget, prefill, options)))
    medians = {
        name: {key: statistics.median(row[key] for row in kept) for key in kept[0]} for name, kept in rows.items()
    }
    print(table(medians))
    if options.json:
        options.json.write_text(json.dumps({"machine": cpu_name(), "rows": rows}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=6, help="short requests at once")
    parser.add_argument("--tokens", type=int, default=160, help="of each short request's answer")
    parser.add_argument("--prompt", type=int, default=1500, help="tokens of a long prompt")
    parser.add_argument("--long", type=int, default=6, help="long prompts, one after the other")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


async def measure(folder: Path, turn: str, budget: int, prefill: int, options: argparse.Namespace) -> Row:
    """Start two workers, warm them up, and run the requests once."""
    paths = [folder / f"{turn}-{budget}-{prefill}-{n}" for n in range(2)]
    config = EngineConfig(max_batch_tokens=budget, max_sequences=32, cache_tokens=32768)
    processes = [start_worker(folder / "model", path, config) for path in paths]
    try:
        while not all(path.exists() for path in paths):
            assert all(process.poll() is None for process in processes), "a worker did not start"
            await asyncio.sleep(0.1)
        front = Dispatch(paths[prefill:], paths[:prefill])
        for path in paths:
            await run(Dispatch([path]), request("warm", 600, 4, 99))
        return await load(front, options)
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def load(front: Dispatch, options: argparse.Namespace) -> Row:
    begin = time.perf_counter()
    short = [asyncio.create_task(run(front, request(f"s{n}", 32, options.tokens, n))) for n in range(options.streams)]
    first = []
    for n in range(options.long):
        asked = time.perf_counter()
        times = await run(front, request(f"l{n}", options.prompt, 8, 1000 + n))
        first.append(times[0] - asked)
    steps = np.concatenate([np.diff(await task) for task in short])
    seconds = time.perf_counter() - begin
    tokens = options.streams * options.tokens + options.long * (options.prompt + 8)
    return {
        "p50": 1e3 * float(np.median(steps)),
        "p99": 1e3 * float(np.quantile(steps, 0.99)),
        "longest": 1e3 * float(steps.max()),
        "first": 1e3 * statistics.median(first),
        "rate": tokens / seconds,
    }


def request(name: str, count: int, most: int, seed: int) -> Request:
    prompt = tuple(np.random.default_rng(seed).integers(MODEL.vocab_size, size=count).tolist())
    return Request(name, prompt, SamplingParams(max_tokens=most, seed=seed))


async def run(front: Dispatch, asked: Request) -> list[float]:
    """Return when each token came."""
    return [time.perf_counter() async for event in front.stream(asked) for _ in event.tokens]


def table(medians: dict[str, Row]) -> str:
    lines = [
        "| set-up | ms between tokens, median | 99% | longest | ms to a long prompt's first token | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    form = "| {name} | {p50:.1f} | {p99:.1f} | {longest:.0f} | {first:.0f} | {rate:.0f} |"
    return "\n".join([*lines, *(form.format(name=name, **row) for name, row in medians.items())])


if __name__ == "__main__":
    main()
