"""Products of few rows: at which rate a weight goes by, from memory and from a cache, beside a loop that only reads.

python benchmarks/few_rows.py --rows 1 2 4 8 9 32 --threads 1 2
"""

import argparse
import time
from collections.abc import Callable

import torch

from liaoyuan import ops
from liaoyuan.device import cpu_name

FAR, NEAR = 150_000_000, 8_000_000  # bytes of weights that are read in turn: more than caches keep, and less
DTYPES = (torch.bfloat16, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 9, 32])
    parser.add_argument("--shape", type=int, nargs=2, default=[1536, 768], help="outputs and inputs of a weight")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    print(f"{cpu_name()}, weights of {options.shape[0]} x {options.shape[1]}, GB/s")
    for threads in options.threads:
        torch.set_num_threads(threads)
        plain = torch.ones(FAR // 4)
        print(f"{threads} threads, reading alone: {plain.nbytes / least(plain.sum, 8) / 1e9:.1f}")
        for dtype in DTYPES:
            for place, size, times in (("memory", FAR, 4), ("a cache", NEAR, 20)):
                found = [f"{rows}: {rate(rows, *options.shape, dtype, size, times):.1f}" for rows in options.rows]
                print(f"  {dtype}, from {place}, by rows  {'  '.join(found)}", flush=True)


@torch.inference_mode()
def rate(rows: int, outputs: int, inputs: int, dtype: torch.dtype, size: int, times: int) -> float:
    """Return the GB/s at which weights of `size` bytes in all go by, the best of some times."""
    weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(size // (outputs * inputs * dtype.itemsize))]
    x = torch.randn(rows, inputs).to(dtype)
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
