"""`liaoyuan doctor`: what this machine offers, what Liaoyuan uses of it, and what would add the rest.

Everything is measured or asked now, in this process; it takes a few seconds and changes nothing.
"""

import importlib.metadata
import importlib.util
import json as json_text
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from liaoyuan.errors import LiaoyuanError

VERSIONS = ("liaoyuan", "torch", "numpy", "tokenizers", "safetensors")
DTYPES = ("bfloat16", "float32")
KERNEL_FACTS = ("operator", "device", "kernel", "reason", "exact", "speed_up", "limit_share")
SECONDS = 0.5  # spent on each measured rate


class Part(StrEnum):
    """What of the diagnosis is asked for."""

    OPS = "ops"


def doctor(
    context: typer.Context,
    part: Annotated[Part | None, typer.Argument(help="ops: the operators' kernels, with their speeds.")] = None,
    exact: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Prove that no way to compute this model changes a bit.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the model for --exact (none: its own).")] = None,
    device: Annotated[str, typer.Option(help="Where --exact computes.")] = "cpu",
    tp: Annotated[int, typer.Option(min=1, metavar="N", help="Processes over which --exact spreads it.")] = 1,
    ep: Annotated[int, typer.Option(min=1, metavar="N", help="Of these, how many share the experts in training.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")] = False,
) -> None:
    """Show devices, kernels, threads, measured rates, and what is missing. With --exact: exit status 1 if not exact."""
    if exact is not None:
        from liaoyuan.cli.doctor_exact import show_proof

        if not show_proof(exact, dtype, device, json, tp, ep):
            raise typer.Exit(1)
        return
    if tp * ep > 1:
        raise LiaoyuanError("--tp and --ep are the layout of a proof: they need --exact MODEL.")
    if part is Part.OPS:
        show_operators(measured_kernels(), json)
        return
    found = diagnose(context.obj)
    if json:
        print(json_text.dumps(found, indent=2))
    else:
        show(found)


def diagnose(process: Any) -> dict[str, Any]:
    """Return all that `doctor` says as plain values; `process` is a `ProcessSettings`, or None if none were made."""
    from liaoyuan.device import cpu_features, list_devices

    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
        "devices": list_devices(),
        "cpu_features": cpu_features(),
        "memory": memory(),
        "process": process_facts(process),
        "rates": rates(),
        "kernels": kernels(),
        "cache": cache(),
        "jail": jail(),
        "missing": [dict(zip(("part", "without", "add"), row, strict=True)) for row in missing()],
    }


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def memory() -> dict[str, float]:
    """Return this machine's memory in GiB (nothing where the kernel does not tell)."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return {}
    lines = dict(line.split(":") for line in path.read_text(encoding="utf-8").splitlines())
    kinds = {"total": "MemTotal", "available": "MemAvailable"}
    return {name: round(int(lines[key].split()[0]) / 2**20, 1) for name, key in kinds.items() if key in lines}


def process_facts(process: Any) -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "threads_from": "torch", "allocator": "unknown"}
    if process is not None:
        facts |= {"threads_from": process.threads_from, "allocator": process.allocator}
        facts["huge_pages"] = process.huge_pages
    return facts


def rates() -> list[dict[str, Any]]:
    """Measure matrix products and memory copies: on one thread of the CPU, on all, and on the accelerator."""
    import torch

    from liaoyuan.device import find_accelerator

    threads = torch.get_num_threads()
    rows = []
    try:
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            rows.append({"where": f"cpu, {count} thread{'s' if count > 1 else ''}", **_rate("cpu")})
    finally:
        torch.set_num_threads(threads)
    accelerator = find_accelerator()
    return [*rows, {"where": accelerator, **_rate(accelerator)}] if accelerator else rows


def _rate(device: str) -> dict[str, float]:
    import torch

    from liaoyuan.device import measure_gemm_rate, measure_memory_rate

    found = {name: measure_gemm_rate(getattr(torch, name), SECONDS, device) / 1e12 for name in DTYPES}
    return {**found, "memory": measure_memory_rate(seconds=SECONDS, device=device) / 1e9}


def kernels() -> list[dict[str, Any]]:
    """Return for each operator the kernel in use and why it is this one."""
    from liaoyuan import ops

    return [{name: getattr(row, name) for name in KERNEL_FACTS} for row in ops.status()]


def measured_kernels() -> list[dict[str, Any]]:
    """Return `kernels` of the CPU and of the accelerator, with speeds against the reference and the device's limit."""
    from liaoyuan import ops
    from liaoyuan.device import Device, find_accelerator, measure_gemm_rate, measure_memory_rate

    rows = []
    for device in filter(None, ("cpu", find_accelerator())):
        dtype = Device(device).default_dtype
        matrix_rate = measure_gemm_rate(dtype, SECONDS, device)
        rows += ops.measure(device, dtype, matrix_rate, measure_memory_rate(seconds=SECONDS, device=device))
    return [{name: getattr(row, name) for name in KERNEL_FACTS} for row in rows]


def cache() -> str:
    """Return where compiled kernels are kept, or why they are not."""
    from liaoyuan.ops.build import cache_folder

    try:
        return str(cache_folder())
    except LiaoyuanError as error:
        return f"none: {error}"


def jail() -> str:
    """Return whether code of strangers (a reward that runs unit tests) can be run here, or what lacks."""
    from liaoyuan.safety import lacking, mechanisms

    return f"none: {lacking()}" if lacking() else f"works: {len(mechanisms())} mechanisms, tried from inside"


def missing() -> Iterator[tuple[str, str, str]]:
    """Yield what is not here: the part, what is lost without it, and the command that adds it."""
    from liaoyuan.device import find_accelerator

    if not (shutil.which("g++") or shutil.which("c++")):
        yield "C++ compiler", "CPU kernels fall back to plain PyTorch", "sudo apt install g++"
    if Path("/dev/nvidiactl").exists() and find_accelerator() is None:
        yield "CUDA build of torch", "the NVIDIA card is not used", "see the README: choosing a build of torch"
    if any(Path("/dev").glob("davinci[0-9]*")) and not importlib.util.find_spec("torch_npu"):
        yield "torch_npu", "the Ascend card is not used", "pip install torch_npu==2.13.*  (after CANN)"
    if not importlib.util.find_spec("pytest"):
        yield "development extra", "the test suite", "make install-dev"
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        yield "Chromium", "tests of the chat page skip", "sudo apt install chromium chromium-driver"


def show(found: dict[str, Any]) -> None:
    """Print the diagnosis for people; it fits a screen."""
    from rich.console import Console

    console = Console(highlight=False)
    process, size = found["process"], found["memory"]
    console.print(_facts(found, process, size))
    console.print(_rates_table(found["rates"]))
    if found["kernels"]:
        console.print(_kernels_table(found["kernels"]))
    if found["missing"]:
        console.print(_missing_table(found["missing"]))
    else:
        console.print("\nNothing is missing.")


def _grid(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(
            column, header_style="dim", justify="right" if column in ("bf16", "fp32", "memory") else "left"
        )
        table.columns[index].overflow = "fold"
    return table


def _facts(found: dict[str, Any], process: dict[str, Any], size: dict[str, float]) -> Any:
    table = _grid("", "", "")
    table.show_header = False
    table.columns[0].style = "dim"
    for device in found["devices"]:
        table.add_row("device", device)
    table.add_row("instructions", ", ".join(found["cpu_features"]) or "none that speed up matrix products")
    if size:
        table.add_row("memory", f"{size['total']} GiB, {size.get('available', '?')} GiB free")
    table.add_row("threads", f"{process['threads']}, chosen by {process['threads_from']}")
    pages = ", huge pages asked for" if process.get("huge_pages") else ""
    table.add_row("allocator", process["allocator"] + pages)
    table.add_row("versions", ", ".join(f"{name} {number}" for name, number in found["versions"].items()))
    table.add_row("kernel cache", found["cache"])
    table.add_row("jail for code", found["jail"])
    return table


def _rates_table(rows: list[dict[str, Any]]) -> Any:
    table = _grid("\nMeasured now", "", "bf16", "fp32", "memory")
    for row in rows:
        products = (_rate_text(row[name]) for name in DTYPES)
        table.add_row(row["where"], *products, f"{row['memory']:.1f} GB/s")
    return table


def _rate_text(teraflops: float) -> str:
    return f"{teraflops:.2f} TFLOP/s" if teraflops >= 0.995 else f"{1000 * teraflops:.0f} GFLOP/s"


def show_operators(rows: list[dict[str, Any]], json: bool) -> None:
    """Print each operator's kernel and its speed, for people or for machines."""
    from rich.console import Console

    if json:
        print(json_text.dumps(rows, indent=2))
        return
    table, shared = _grid("", "operator", "device", "kernel", "speed", "of limit", "exact", ""), _shared_reasons(rows)
    for row in rows:
        gain = f"{row['speed_up']:.1f}x" if row["speed_up"] else "-"
        exact = {True: "yes", False: "no", None: "-"}[row["exact"]]
        share = f"{row['limit_share']:.0%}"
        why = row["reason"] if row["kernel"] == "reference" and row["reason"] not in shared else ""
        table.add_row(row["operator"], row["device"], row["kernel"], gain, share, exact, why)
    console = Console(highlight=False)
    console.print(table)
    for reason in shared:
        console.print(f"reference: {reason}", soft_wrap=True)
    console.print("speed: against the reference. limit: the best rates of matrix products and copies measured now.")


def _shared_reasons(rows: list[dict[str, Any]]) -> list[str]:
    """Return the reasons for which several operators have no kernel: they are said once, below the table."""
    counts = Counter(row["reason"] for row in rows if row["kernel"] == "reference")
    return [reason for reason, count in counts.items() if count > 1]


def _kernels_table(rows: list[dict[str, Any]]) -> Any:
    shared = _shared_reasons(rows)
    table = _grid("\nOperators (speeds: liaoyuan doctor ops)", "operator", "kernel", "why")
    for row in rows:
        table.add_row(row["operator"], row["kernel"], "see below" if row["reason"] in shared else row["reason"])
    table.caption, table.caption_justify = "\n".join(f"reference: {reason}" for reason in shared) or None, "left"
    return table


def _missing_table(rows: list[dict[str, str]]) -> Any:
    table = _grid("\nMissing", "part", "without it", "what adds it")
    for row in rows:
        table.add_row(row["part"], row["without"], row["add"])
    return table
