"""Each operator on its workload: the kernel in use, the plain PyTorch reference, the same compiled, and the limit.

The sides take turns in one run; medians. Forward, and forward with backward for operators that have one. The limit is
the larger of FLOPs at the best rate of matrix products and bytes at the best rate of copies, both measured first.
Attention over 512 to 4096 tokens, and the linear layer at 1 to 2048 rows, stand beside PyTorch's own.

    python benchmarks/operators.py --dtype bfloat16 --json operators.json      # --compile: compiled references too
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from liaoyuan.cli.process import tune_process

os.environ.setdefault("OMP_NUM_THREADS", "1")
tune_process()

import torch  # noqa: E402  (after the allocator's settings)
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from liaoyuan import ops  # noqa: E402
from liaoyuan.device import cpu_name, measure_gemm_rate, measure_memory_rate  # noqa: E402
from liaoyuan.ops.operator import OPERATORS, Operator, cast  # noqa: E402

SECONDS = 1.0  # spent on each measured rate
Side = Callable[[], object]


def main() -> None:
    options = _options()
    dtype = getattr(torch, options.dtype)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rates = measure_gemm_rate(dtype, SECONDS), measure_memory_rate(seconds=SECONDS)
    ops.status()
    rows = []
    for operator in OPERATORS.values():
        if options.only and operator.name not in options.only:
            continue
        rows.append(measured(operator, dtype, rates, options))
        print(f"{operator.name}: {rows[-1]['kernel']}", file=sys.stderr)
    stock = [] if options.only else [*attention_rows(dtype, options.rounds), *linear_rows(dtype, options.rounds)]
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "gemm": rates[0], "memory": rates[1]}
    print(text(rows, stock, machine, options.dtype))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows, "stock": stock}, indent=2) + "\n")


def measured(operator: Operator, dtype: torch.dtype, rates: tuple[float, float], options: Any) -> dict[str, Any]:
    """Return the seconds of each side on the operator's workload."""
    (status,) = [row for row in ops.status() if row.operator == operator.name]
    dtype = dtype if dtype in status.dtypes or not status.dtypes else status.dtypes[0]  # routing knows fp32 alone
    sample = operator.workload(dtype) if operator.workload else cast(list(operator.samples(dtype))[-1], dtype)
    sides = {"ours": operator.call, "eager": operator.reference}
    if options.compile:
        sides["compiled"] = torch.compile(operator.reference)
    limit = max(operator.flops(*sample) / rates[0], operator.traffic(*sample) / rates[1])
    found = {"operator": operator.name, "kernel": status.kernel, "exact": status.exact, "limit": limit}
    found["forward"] = alternate({name: forward(side, sample) for name, side in sides.items()}, options.rounds)
    if operator.gradient:
        both = {name: with_backward(operator, side, sample) for name, side in sides.items()}
        found["both"] = alternate(both, options.rounds)
    return found


def forward(function: Callable[..., Any], sample: tuple[Any, ...]) -> Side:
    def run() -> None:
        with torch.no_grad():
            function(*sample)

    return run


def with_backward(operator: Operator, function: Callable[..., Any], sample: tuple[Any, ...]) -> Side:
    assert operator.gradient
    leaves = [
        x.detach().requires_grad_(i in operator.gradient.inputs) if isinstance(x, Tensor) else x
        for i, x in enumerate(sample)
    ]
    sources = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]

    def run() -> None:
        outputs = function(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x.requires_grad]
        torch.autograd.grad(outputs, sources, [torch.ones_like(x) for x in outputs], allow_unused=True)

    return run


def alternate(sides: dict[str, Side], rounds: int) -> dict[str, float]:
    """Return each side's median seconds; they take turns, and each runs once before."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def attention_rows(dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """Attention forward and backward beside scaled_dot_product_attention, one causal document."""
    for tokens in (512, 1024, 2048, 4096):
        query, key, value = (torch.randn(tokens, heads, 64).to(dtype).requires_grad_() for heads in (8, 2, 2))
        boundaries = torch.tensor([0, tokens], dtype=torch.int32)

        def ours(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor = boundaries) -> Tensor:
            return ops.attention(q, k, v, boundaries, 0.125)

        def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125, enable_gqa=True)

        sides = {name: _both(side, (query, key, value)) for name, side in (("ours", ours), ("stock", stock))}
        yield {"what": f"attention, {tokens} tokens, forward + backward", **alternate(sides, rounds)}


def linear_rows(dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """The linear layer beside PyTorch's, forward."""
    for rows in (1, 4, 16, 32, 64, 256, 2048):
        x, weight = torch.randn(rows, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        sides = {"ours": forward(ops.linear, (x, weight)), "stock": forward(F.linear, (x, weight))}
        yield {"what": f"linear 1024 to 1024, {rows} rows", **alternate(sides, max(rounds, 4000 // (rows + 20)))}


def _both(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Side:
    def run() -> None:
        out = function(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return run


def text(rows: list[dict[str, Any]], stock: list[dict[str, Any]], machine: dict[str, Any], dtype: str) -> str:
    """Return the tables in Markdown."""
    lines = [
        f"{machine['cpu']}, threads: {machine['threads']}, {dtype}; best product {machine['gemm'] / 1e9:.0f} GFLOP/s, "
        f"best copy {machine['memory'] / 1e9:.0f} GB/s",
        "",
        "| operator | kernel | forward ms | of the limit | eager | compiled | with backward ms | eager | compiled |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = f"{row['limit'] / row['forward']['ours']:.0%}"
        lines.append(
            f"| {row['operator']} | {row['kernel']} | {_cells(row['forward'], share)} | {_cells(row.get('both'))} |"
        )
    lines += ["", "| beside PyTorch's own | ours ms | stock ms | ratio |", "|---|---|---|---|"]
    for row in stock:
        ours, other = 1e3 * row["ours"], 1e3 * row["stock"]
        lines.append(f"| {row['what']} | {ours:.3g} | {other:.3g} | {other / ours:.2f} |")
    return "\n".join(lines)


def _cells(sides: dict[str, float] | None, share: str = "") -> str:
    if sides is None:
        return " | ".join(["-"] * 3)
    others = [f"{sides[name] / sides['ours']:.1f}x" if name in sides else "-" for name in ("eager", "compiled")]
    return " | ".join([f"{1e3 * sides['ours']:.3g}", *([share] if share else []), *others])


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", help="operators")
    parser.add_argument("--compile", action="store_true", help="compile the references too: minutes, the first time")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
