"""What saving costs the training: steps while a state is being written beside steps while none is, in one run.

Windows take turns: a save and the steps that follow it until the state is on the disk (at least `--steps`), then as
many steps without a save. Each row is a process of its own, since an allocator's settings must precede its start:
`tuned` is what the command line sets (`liaoyuan.cli.process`), `huge pages` only asks torch for them, `default` is
torch on the C library as both come. With one training thread a core is free for the writer; with as many threads as
cores none is. `blocked` is the time inside the call that saves; its share is that of the time between two saves.

    python benchmarks/checkpoint_jitter.py --rounds 8 --json checkpoint_jitter.json
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ALLOCATORS = {"tuned": "1", "huge pages": "1", "default": "0"}  # THP_MEM_ALLOC_ENABLE
SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 16384}


def main() -> None:
    options = parse()
    if options.measure:
        allocator, threads = options.measure
        print(json.dumps(measure(allocator, int(threads), options)))
        return
    rows = []
    for threads in options.threads:
        for allocator in options.allocators:
            rows.append(in_a_process(allocator, threads))
            show(rows[-1])
    if options.json:
        settings = {**vars(options), "folder": str(options.folder)}
        result = {"rows": rows, "settings": settings, "machine": machine()}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="saves of a row, the first of which is not counted")
    parser.add_argument("--steps", type=int, default=12, help="steps of a window, at least")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a step")
    parser.add_argument("--allocators", nargs="+", default=list(ALLOCATORS), choices=ALLOCATORS)
    threads = [*dict.fromkeys((1, os.cpu_count() or 1))]
    parser.add_argument("--threads", type=int, nargs="+", default=threads, help="of the training, a row each")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="a disk to write to")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process(allocator: str, threads: int) -> dict[str, Any]:
    """Return the row of one setting."""
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": ALLOCATORS[allocator], "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *sys.argv, "--measure", allocator, str(threads)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(allocator: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    from liaoyuan.cli.process import tune_process

    if allocator == "tuned":
        tune_process(threads)
    import torch

    from liaoyuan.checkpoint.training_state import Checkpointer

    torch.set_num_threads(threads)
    model, optimiser, step = training(options.tokens)
    saving: list[tuple[float, float]] = []
    quiet: list[tuple[float, float]] = []
    blocked, written, between = [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as name, Checkpointer(Path(name) / "state") as states:
        for number in range(options.rounds):
            start, before = time.perf_counter(), states.blocked_seconds
            states.save(number, model, optimiser, {})
            blocked.append(states.blocked_seconds - before)
            times = []
            while states.is_busy or len(times) < options.steps:
                times.append(timed(step))
                if not states.is_busy and len(written) == number:
                    written.append(time.perf_counter() - start)
            saving += times if number else []
            rest = [timed(step) for _ in times]
            quiet += rest if number else []
            between.append(time.perf_counter() - start)
        size = sum(file.stat().st_size for file in Path(name).glob("state/step-*/*")) / 2
    busy, idle = summary(saving), summary(quiet)
    return {
        "allocator": allocator,
        "threads": threads,
        "state_bytes": size,
        "saving": busy,
        "quiet": idle,
        "slowdown": busy["median"] / idle["median"] - 1,
        "cpu_slowdown": busy["cpu_median"] / idle["cpu_median"] - 1,
        "first_blocked": blocked[0],
        "blocked": statistics.median(blocked[1:]),
        "blocked_share": sum(blocked[1:]) / sum(between[1:]),
        "written": statistics.median(written[1:]),
        "between_saves": statistics.median(between[1:]),
    }


def training(tokens: int) -> Any:
    """Return a model, its optimiser, and the function that takes a step."""
    import torch

    from liaoyuan.data import Batch
    from liaoyuan.device import select_device
    from liaoyuan.models import Decoder, ModelConfig, initialise, packed_context
    from liaoyuan.parallel import Program, World
    from liaoyuan.training.loop import TrainConfig, make_optimiser, take_step

    dtype = str(select_device("cpu").default_dtype).removeprefix("torch.")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    config = ModelConfig(model_type="qwen3", tie_word_embeddings=True, dtype=dtype, **SHAPE, **heads)
    model = initialise(Decoder(config), 0).train()
    optimiser = make_optimiser(model, TrainConfig(steps=1))
    data = torch.randint(config.vocab_size, (tokens + 1,), generator=torch.Generator().manual_seed(0))
    positions, context = packed_context([tokens])
    batch = Batch(data[:-1], positions, data[1:], torch.ones(tokens), context.boundaries)
    program = Program([model])
    return model, optimiser, lambda: take_step(program, optimiser, [batch], 1e-4, 1.0, World())


def timed(step: Any) -> tuple[float, float]:
    """Return the seconds of a step, and its CPU seconds in this process."""
    start, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - start, time.process_time() - cpu


def summary(steps: list[tuple[float, float]]) -> dict[str, float]:
    ordered = sorted(seconds for seconds, _ in steps)
    return {
        "steps": len(ordered),
        "median": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "mean": statistics.mean(ordered),
        "cpu_median": statistics.median(cpu for _, cpu in steps),
    }


def show(row: dict[str, Any]) -> None:
    saving, quiet = row["saving"], row["quiet"]
    print(
        f"{row['threads']} threads  {row['allocator']:10}  {row['state_bytes'] / 1e6:4.0f} MB  "
        f"step saving {1e3 * saving['median']:5.0f} ms (p95 {1e3 * saving['p95']:5.0f})  "
        f"quiet {1e3 * quiet['median']:5.0f} ms (p95 {1e3 * quiet['p95']:5.0f})  "
        f"{row['slowdown']:+6.1%}, CPU {row['cpu_slowdown']:+6.1%}  "
        f"blocked {1e3 * row['blocked']:4.0f} ms (first {1e3 * row['first_blocked']:4.0f}) "
        f"= {row['blocked_share']:.2%} of {row['between_saves']:.1f} s",
        flush=True,
    )


def machine() -> dict[str, Any]:
    import torch

    from liaoyuan.device import cpu_name

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {**versions, "cpu": cpu_name(), "cores": os.cpu_count()}


if __name__ == "__main__":
    main()
