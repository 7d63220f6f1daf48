"""Products of few rows: at which rate a weight goes by, from memory and from a cache, beside a loop that only reads.

python benchmarks/few_rows.py --rows 1 2 4 8 9 32 --threads 1 2
python benchmarks/few_rows.py --rows 1 2 4 8 --kinds int8 fp8 int4    weights of few bits, in 1e9 a second
"""

import argparse
import time
from collections.abc import Callable

import torch

from liaoyuan import ops
from liaoyuan.device import cpu_name
from liaoyuan.ops.quantised_linear import Kind

FAR, NEAR = 150_000_000, 8_000_000  # bytes of weights that are read in turn: more than caches keep, and less
DTYPES = (torch.bfloat16, torch.float32)
# Kinds of few bits, and how many weights share a scale; None: all of an output.
GROUPS: dict[Kind, int | None] = {"int8": None, "fp8": None, "int4": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 9, 32])
    parser.add_argument("--shape", type=int, nargs=2, default=[1536, 768], help="outputs and inputs of a weight")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--kinds", nargs="+", choices=GROUPS, default=[], help="of weights of few bits (default: whole)"
    )
    options = parser.parse_args()
    print(f"{cpu_name()}, weights of {options.shape[0]} x {options.shape[1]}, {'1e9' if options.kinds else 'GB'}/s")
    for threads in options.threads:
        torch.set_num_threads(threads)
        plain = torch.ones(FAR // 4)
        print(f"{threads} threads, reading alone: {plain.nbytes / least(plain.sum, 8) / 1e9:.1f}")
        for kind in options.kinds or DTYPES:
            for place, size, times in (("memory", FAR, 4), ("a cache", NEAR, 20)):
                found = [f"{rows}: {rate(rows, options.shape, kind, size, times):.1f}" for rows in options.rows]
                print(f"  {kind}, from {place}, by rows  {'  '.join(found)}", flush=True)


@torch.inference_mode()
def rate(rows: int, shape: tuple[int, int], kind: torch.dtype | Kind, size: int, times: int) -> float:
    """Return the GB/s at which weights of `size` bytes in all go by, the best of some times; of few bits, how many 1e9
    weights a second, with bf16 rows.
    """
    outputs, inputs = shape
    if isinstance(kind, str):
        many = size * (2 if kind == "int4" else 1) // (outputs * inputs)
        few = [ops.quantise(torch.randn(outputs, inputs), kind, GROUPS[kind]) for _ in range(many)]
        x = torch.randn(rows, inputs).to(torch.bfloat16)
        return many * outputs * inputs / least(lambda: [ops.quantised_linear(x, weight) for weight in few], times) / 1e9
    weights = [torch.randn(outputs, inputs).to(kind) for _ in range(size // (outputs * inputs * kind.itemsize))]
    x = torch.randn(rows, inputs).to(kind)
    return sum(weight.nbytes for weight in weights) / least(lambda: [ops.linear(x, w) for w in weights], times) / 1e9


def least(work: Callable[[], object], times: int) -> float:
    """Return the seconds of the fastest of some calls."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
