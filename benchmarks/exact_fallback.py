"""What exactness costs without compiled kernels: PyTorch's own operators in tiles, against the same as they are.

Random weights; seconds of the processor, the best of alternated runs, so that busy neighbours count for little. Where
`--kernels` names "native" too, that is what a compiler gives, which is exact at no further cost.

    python benchmarks/exact_fallback.py --dtypes float32 bfloat16 --json exact_fallback.json

With `--shapes` it looks for a product of a random shape in which a row has other bits at another place of its tile, or
on other numbers of threads (ATEN_CPU_CAPABILITY and MKL_ENABLE_INSTRUCTIONS choose the instructions).

    python benchmarks/exact_fallback.py --shapes 7600
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from liaoyuan.cli.process import tune_process

tune_process()

import numpy as np  # noqa: E402
import torch  # noqa: E402  (after the allocator's settings)

from liaoyuan import ops  # noqa: E402
from liaoyuan.device import cpu_name  # noqa: E402
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams  # noqa: E402
from liaoyuan.models import Decoder, ModelConfig, initialise, packed_context  # noqa: E402
from liaoyuan.ops import tiled  # noqa: E402
from liaoyuan.ops.operator import OPERATORS  # noqa: E402

SIZES = {
    "model_type": "qwen3", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "qk_norm": True, "tie_word_embeddings": True,
}  # fmt: skip
THREADS = (1, 2, 3, 4, 8)
DOCUMENTS = (512, 256, 256)  # tokens of a training step
PROMPT, ANSWER = 16, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kernels", nargs="+", default=["reference", "tiled"])
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=WORK)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json")
    parser.add_argument("--shapes", type=int, default=0)
    options = parser.parse_args()
    if options.shapes:
        unequal = [shape for shape in map(random_shape, range(options.shapes)) if not is_exact(*shape)]
        print(f"{cpu_name()}: {options.shapes} products, {len(unequal)} not exact", *unequal[:9])
        return
    torch.set_num_threads(1)
    print(f"{cpu_name()}, 1 thread, seconds of the processor")
    rows = []
    for dtype in options.dtypes:
        model = initialise(Decoder(ModelConfig(**SIZES | {"dtype": dtype})), seed=0).eval()
        for name in options.work:
            best = dict.fromkeys(options.kernels, float("inf"))
            for _ in range(options.repeats):
                for kernels in options.kernels:
                    best[kernels] = min(best[kernels], seconds(WORK[name], model, kernels))
            rows.append({"dtype": dtype, "work": name} | best)
            print(f"{dtype:9} {name:24}", *(f"{way} {value:7.3f}" for way, value in best.items()), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")


def random_shape(seed: int) -> tuple[int, int, int, torch.dtype]:
    """Return rows, inputs and outputs of a product, most of them small, and its dtype."""
    rows, depth, out = (int(x) for x in np.exp(np.random.default_rng(seed).uniform(0, np.log((200, 3000, 3000)))))
    return rows, depth, out, (torch.float32, torch.bfloat16)[seed % 2]


def is_exact(rows: int, depth: int, out: int, dtype: torch.dtype) -> bool:
    """Return whether every row has the same bits at every place of a tile, on any number of threads."""
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, depth, generator=generator).to(dtype) for n in (rows, out))
    whole, order = tiled.product(x, weight), torch.arange(rows)
    orders = [order[place:] for place in range(min(rows, tiled.TILE))] + [order.flip(0)]
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found += [torch.equal(tiled.product(x[order], weight), whole[order]) for order in orders]
    torch.set_num_threads(1)
    return all(found)


def seconds(work: Callable[[Decoder], None], model: Decoder, kernels: str) -> float:
    """Return the processor's time for some work, by these kernels."""
    ops.configure({} if kernels == "native" else dict.fromkeys(OPERATORS, "reference"))
    ops.seek_exactness(kernels == "tiled")
    ops.status()  # chooses the kernels
    start = time.process_time()
    work(model)
    return time.process_time() - start


def step(model: Decoder) -> None:
    """A forward and a backward pass."""
    _log_probs(model).sum().backward()
    model.zero_grad()


def score(model: Decoder) -> None:
    with torch.no_grad():
        _log_probs(model)


def _log_probs(model: Decoder) -> torch.Tensor:
    positions, context = packed_context(list(DOCUMENTS))
    tokens = torch.arange(len(positions))
    return model(tokens, positions, context, targets=tokens)


def answers(sequences: int, prompt: int = PROMPT, count: int = ANSWER) -> Callable[[Decoder], None]:
    """Return the work of so many answers at a time."""

    def work(model: Decoder) -> None:
        sizes = EngineConfig(max_sequences=sequences, cache_tokens=sequences * (prompt + count + 32))
        requests = [Request(n, tuple(range(n, n + prompt)), SamplingParams(max_tokens=count)) for n in range(sequences)]
        Engine(model, sizes).generate(requests)

    return work


WORK = {
    "training step": step,
    "scoring": score,
    "prompt": answers(1, 1024, 1),
    "1 answer": answers(1),
    "8 answers at a time": answers(8),
    "32 answers at a time": answers(32),
}

if __name__ == "__main__":
    main()
