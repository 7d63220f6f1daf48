"""Loading a model folder beside reading its file: time and peak memory, ours and transformers' `from_pretrained`.

A random model of about `--gigabytes` in bf16 is written once, of each kind: a Llama-like dense one and a Qwen3-MoE.
Every measurement is a process of its own, so that peak memory is its own and none inherits warm memory; sides take
turns, with the file in the page cache for all (or, with `--cold`, dropped from it before each). "read" is the plain
sequential read of the weight files into fresh memory of that size, by the same Python and torch. transformers maps
what it can and reads it when it is first used: "touched" is a load after which every page of the weights was looked at.

The allocator is left as it is: with `--huge-pages`, as the command line sets it, all sides are faster where the machine
has such pages at hand, and the times of all scatter more widely where a virtual machine must first get them.

    python benchmarks/load_speed.py --rounds 5 --json load_speed.json
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liaoyuan.cli.process import tune_process

if "--huge-pages" in sys.argv:
    tune_process()

import torch

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.device import cpu_name
from liaoyuan.models import Decoder, ModelConfig
from liaoyuan.models.config import Experts

SIDES = ("read", "liaoyuan", "transformers", "transformers, touched")
MEGABYTE = 10**6
PAGE = 4096  # bytes


def main() -> None:
    options = parse()
    if options.side:
        print(json.dumps(measure(options.side, options.folder)))
        return
    print(f"{cpu_name()}, {options.threads} threads, page cache {'cold' if options.cold else 'warm'}")
    rows = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for kind in options.models:
            folder = Path(scratch) / kind
            write_model(CONFIGS[kind](options.gigabytes), folder)
            found = compare(kind, folder, options)
            show(found)
            rows += found
    if options.json:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "cpu": cpu_name()}
        settings = {name: value for name, value in vars(options).items() if name not in ("side", "folder")}
        result = {"rows": rows, "settings": settings, "machine": machine}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*CONFIGS], choices=CONFIGS)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of weights, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache before each measurement")
    parser.add_argument("--huge-pages", action="store_true", help="the allocator's settings of the command line")
    parser.add_argument("--only-ours", action="store_true", help="leave transformers out")
    parser.add_argument("--scratch", help="folder in which the models are written (default: that of temporary files)")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def llama(gigabytes: float) -> ModelConfig:
    """A dense decoder with the proportions of Llama 3.2 1B, as many layers as fill the gigabytes."""
    return ModelConfig(
        model_type="llama",
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=max(1, round((gigabytes - 0.27) / 0.122)),
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        dtype="bfloat16",
    )


def qwen3_moe(gigabytes: float) -> ModelConfig:
    """Layers of 64 experts with the proportions of Qwen3-30B-A3B, half as wide."""
    return ModelConfig(
        model_type="qwen3_moe",
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=max(1, round((gigabytes - 0.134) / 0.161)),
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        qk_norm=True,
        experts=Experts(64, 8, 384),
        dtype="bfloat16",
    )


CONFIGS: dict[str, Callable[[float], ModelConfig]] = {"llama": llama, "qwen3_moe": qwen3_moe}


def write_model(config: ModelConfig, folder: Path) -> None:
    model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(0.0, 0.02, generator=generator)
    save_model(model, folder)


def compare(kind: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for each side."""
    sides = [side for side in SIDES if not (options.only_ours and side.startswith("transformers"))]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(options.rounds + 1):
        for side in sides:
            if options.cold:
                forget(folder)
            result = in_own_process(side, folder, options)
            if number:  # the first round warms the cache, for all
                found[side].append(result)
    read = found["read"]
    rows = []
    for side, results in found.items():
        ratios = [mine["seconds"] / theirs["seconds"] for mine, theirs in zip(results, read, strict=True)]
        rows.append(
            {
                "model": kind,
                "side": side,
                "megabytes": results[0]["bytes"] / MEGABYTE,
                "seconds": statistics.median(result["seconds"] for result in results),
                "best_seconds": min(result["seconds"] for result in results),
                "time_ratio": statistics.median(ratios),
                "best_ratio": min(r["seconds"] for r in results) / min(r["seconds"] for r in read),
                "memory_ratio": statistics.median(result["grown"] / result["bytes"] for result in results),
                "rounds": results,
            }
        )
    return rows


def in_own_process(side: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    command += ["--huge-pages"] if options.huge_pages else []
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(side: str, folder: Path) -> dict[str, float]:
    """Return seconds, growth of the peak of resident memory, and bytes of the weights, of one load."""
    work = prepared(side, folder)
    before = peak_memory(afresh=True)
    start = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - start
    grown = peak_memory() - before
    del kept
    return {"seconds": seconds, "grown": grown, "bytes": sum(path.stat().st_size for path in weight_files(folder))}


def peak_memory(afresh: bool = False) -> int:
    """Return the peak of resident memory in bytes, since the start or (`afresh`) from now on."""
    if afresh:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def prepared(side: str, folder: Path) -> Callable[[], object]:
    """Return what is measured, with all that it imports loaded."""
    if side.startswith("transformers"):
        import transformers
        from transformers.models import llama, qwen3_moe  # noqa: F401  (which `from_pretrained` would import)

        transformers.utils.logging.disable_progress_bar()
        touch = side.endswith("touched")

        def load() -> object:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            for weight in model.parameters() if touch else ():
                weight.detach().view(-1).view(torch.uint8)[::PAGE].sum()
            return model

        return load
    if side == "liaoyuan":
        return lambda: load_model(folder)
    return lambda: [read_whole(path) for path in weight_files(folder)]


def read_whole(path: Path) -> torch.Tensor:
    """Read a file into fresh memory from begin to end."""
    data = torch.empty(path.stat().st_size, dtype=torch.uint8)
    left = memoryview(data.numpy())
    with path.open("rb", buffering=0) as file:
        while left:
            left = left[file.readinto(left) :]
    return data


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in weight_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['model']:10} {row['megabytes']:6,.0f} MB  {row['side']:21} {row['seconds']:6.3f} s  "
            f"best {row['best_seconds']:6.3f}  time {row['time_ratio']:5.2f} x read (best {row['best_ratio']:5.2f})  "
            f"peak memory {row['memory_ratio']:5.3f} x weights",
            flush=True,
        )


if __name__ == "__main__":
    main()
