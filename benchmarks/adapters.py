"""What adapters cost: tokens a second of the same requests, without adapters, with one, with one each, of many loaded.

Random weights in the shape of engine_speed.py's models, adapters of all projections, prompts of one length, greedy; the
sides take turns in one run, medians.

    python benchmarks/adapters.py --size m10 --concurrency 8 --loaded 1 8 64
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from liaoyuan.cli.process import tune_process

SETTINGS = tune_process()
sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests know how an adapter's files look

import torch  # noqa: E402  (after the allocator's settings)
from tests.inference.adapter_files import write_adapter  # noqa: E402

from engine_speed import SIZES, config_of  # noqa: E402
from liaoyuan.checkpoint import save_model  # noqa: E402
from liaoyuan.checkpoint.adapters import AdapterWeights  # noqa: E402
from liaoyuan.device import cpu_name, select_device  # noqa: E402
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams  # noqa: E402
from liaoyuan.models import Decoder, initialise  # noqa: E402


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    model = initialise(Decoder(config_of(options.size, options.dtype)), 0).eval()
    print(f"{cpu_name()}, {options.threads} threads, {options.dtype}, {options.size}, rank {options.rank}")
    engine = Engine(model, EngineConfig(max_sequences=64, prefix_cache=False))
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "base")
        write_adapter(Path(folder) / "adapter", Path(folder) / "base", rank=options.rank)
        read = engine.adapters.read(Path(folder) / "adapter")
    rows, loaded = [], 0
    count = options.concurrency
    for most in options.loaded:
        while loaded < most:
            engine.adapters.add(f"a{loaded}", Path("adapter"), another(read, loaded))
            loaded += 1
        sides = {"none": [""], "one": ["a0"], "one each": [f"a{n}" for n in range(min(count, loaded))]}
        rates = measure(engine, sides, options)
        shown = "  ".join(f"{name} {rate:7.0f} ({rate / rates['none']:.2f}x)" for name, rate in rates.items())
        print(f"{loaded:>3} loaded ({engine.adapters.nbytes / 1e6:6.1f} MB), {count} at once: {shown}", flush=True)
        rows.append({"loaded": loaded, "tokens_per_second": rates})
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": rows, "settings": vars(options)}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="m10", choices=SIZES)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--loaded", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    dtype = str(select_device("cpu").default_dtype).removeprefix("torch.")
    parser.add_argument("--dtype", default=dtype, choices=["bfloat16", "float32"])
    parser.add_argument("--json", help="where to write the figures")
    return parser.parse_args()


def another(read: AdapterWeights, number: int) -> AdapterWeights:
    """Return an adapter of the same shape with other weights."""
    weights = {name: (a * (1 + number / 64), b) for name, (a, b) in read.weights.items()}
    return AdapterWeights(weights, read.rank, f"{number}")


def measure(engine: Engine, sides: dict[str, list[str]], options: argparse.Namespace) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    shape = (options.concurrency, options.prompt)
    prompts = torch.randint(1, engine.model.config.vocab_size, shape, generator=generator).tolist()
    sampling = SamplingParams(max_tokens=options.output, temperature=0.0)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.rounds + 1):
        for name, adapters in sides.items():
            asked = [
                Request(n, tuple(prompt), sampling, adapter=adapters[n % len(adapters)])
                for n, prompt in enumerate(prompts)
            ]
            start = time.perf_counter()
            made = sum(len(completion.tokens) for completion in engine.generate(asked))
            if turn:  # the first turn warms up
                rates[name].append(made / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


if __name__ == "__main__":
    main()
