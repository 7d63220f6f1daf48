"""Attention of one token a sequence over its pages: microseconds a layer, keys and values from memory and from a cache.

    python benchmarks/decode_attention.py --threads 1 2 --cases 1x200 32x200 8x2000

From memory: before each round weights go by that no cache has room for, as in a step of a large model. Medians.
"""

import argparse
import statistics
import time

from liaoyuan.cli.process import tune_process

tune_process()

import torch  # noqa: E402  (after the allocator's settings)

from liaoyuan import ops  # noqa: E402
from liaoyuan.device import cpu_name  # noqa: E402

LAYERS, BLOCK, ROUNDS = 12, 32, 15
PASSING = (64 * 1024, 1536)  # of the weights that go by, in bf16: 200 MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--heads", type=int, nargs=3, default=[12, 4, 64], help="of queries, of keys, and their size")
    parser.add_argument("--cases", nargs="+", default=["1x200", "1x2000", "8x200", "32x200"], help="sequences x tokens")
    options = parser.parse_args()
    print(f"{cpu_name()}, bf16, {options.heads[0]} heads over {options.heads[1]} of {options.heads[2]}, us a layer")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for case in options.cases:
            sequences, tokens = map(int, case.split("x"))
            far, near = times(sequences, tokens, *options.heads)
            print(f"  {threads} threads, {case:>8}: from memory {far:7.1f}, from a cache {near:7.1f}", flush=True)


@torch.inference_mode()
def times(sequences: int, tokens: int, heads: int, key_heads: int, dim: int) -> tuple[float, float]:
    """Return the microseconds of a layer whose keys and values lie in memory, and in a cache."""
    blocks = sequences * -(-tokens // BLOCK)
    shape = (blocks, BLOCK, key_heads, dim)
    caches = [tuple(torch.randn(shape, dtype=torch.bfloat16) for _ in range(2)) for _ in range(LAYERS)]
    tables = torch.randperm(blocks, dtype=torch.int32).view(sequences, -1)
    starts, lengths = torch.arange(sequences + 1, dtype=torch.int32), torch.full((sequences,), tokens).int()
    query = torch.randn(sequences, heads, dim, dtype=torch.bfloat16)
    row, weight = torch.randn(1, PASSING[1]).bfloat16(), torch.ones(PASSING, dtype=torch.bfloat16)

    def seconds(layers: list[int]) -> float:
        start = time.perf_counter()
        for layer in layers:
            ops.paged_attention(query, *caches[layer], tables, starts, lengths, dim**-0.5)
        return (time.perf_counter() - start) / len(layers) * 1e6

    far, near = [], []
    for _ in range(ROUNDS):
        ops.linear(row, weight)
        far.append(seconds(list(range(LAYERS))))
        seconds([0])
        near.append(seconds([0] * LAYERS))
    return statistics.median(far), statistics.median(near)


if __name__ == "__main__":
    main()
