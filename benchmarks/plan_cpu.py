"""The seconds of a training step on this machine: told by a dry run and a calibrated profile, against the real step.

Steps of the training program on one process and thread, of models of 1 to 30 million weights in bf16 and fp32, take
turns with the timings of the calibration, so that both see the same machine; of each the fastest counts, in seconds
of computing of this process. No figure is fitted to a step of this table: the calibration has models of its own.

    python benchmarks/plan_cpu.py --minutes 8 --json plan_cpu.json
"""

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from liaoyuan.cli.process import tune_process

os.environ["OMP_NUM_THREADS"] = "1"
tune_process()

import torch  # noqa: E402  (after the allocator's settings)

from liaoyuan.cli.progress import bar  # noqa: E402
from liaoyuan.compute.plan import Job, dry_run, read_cluster  # noqa: E402
from liaoyuan.compute.plan.calibration.calibrate import DTYPES, Measured, fitted, measure, prepare  # noqa: E402
from liaoyuan.compute.plan.calibration.calls import Clock, step_of  # noqa: E402
from liaoyuan.compute.plan.machine.cost import seconds  # noqa: E402
from liaoyuan.compute.plan.machine.profile import DeviceProfile, assumed  # noqa: E402
from liaoyuan.compute.plan.program.apart import apart  # noqa: E402
from liaoyuan.compute.plan.program.work import Work, work_of  # noqa: E402
from liaoyuan.device import Device, cpu_name  # noqa: E402
from liaoyuan.models import ModelConfig  # noqa: E402
from liaoyuan.models.config import Experts  # noqa: E402
from liaoyuan.parallel import Layout  # noqa: E402
from liaoyuan.training.loop import TrainConfig  # noqa: E402


@dataclass(frozen=True)
class Size:
    """A model and its step: `rows` rows of `length` tokens, in `microbatches`."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    head: int
    vocabulary: int
    rows: int
    length: int
    microbatches: int = 1
    experts: int = 0


SIZES = (
    Size(128, 352, 4, 4, 32, 2048, 4, 128),
    Size(192, 512, 5, 3, 64, 2048, 2, 512),
    Size(256, 640, 6, 4, 64, 4096, 8, 128, 2),
    Size(320, 896, 8, 5, 64, 4096, 1, 1024),
    Size(384, 1024, 8, 6, 64, 8192, 2, 256),
    Size(512, 1408, 8, 8, 64, 8192, 1, 512),
    Size(192, 160, 4, 3, 64, 2048, 4, 256, experts=8),
    Size(320, 256, 6, 5, 64, 4096, 2, 256, experts=8),
)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    rows, profile = compare(options.minutes)
    print(f"{cpu_name()}, one process of one thread")
    print(table(rows))
    if options.profile:
        profile.save(options.profile)
    if options.json:
        values = {"machine": cpu_name(), "rows": rows, **summary(rows)}
        options.json.write_text(json.dumps(values, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for the timings")
    parser.add_argument("--profile", type=Path, help="where the calibrated profile is kept")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def compare(minutes: float) -> tuple[list[dict[str, object]], DeviceProfile]:
    """Return a row for each size and dtype, and the profile that told it."""
    device = Device("cpu")
    jobs = {(size, dtype): job_of(size, dtype) for size in SIZES for dtype in DTYPES}
    told = {key: [work_of(event) for event in apart(dry_run, job, 0).events] for key, job in jobs.items()}
    with bar("Plan on this machine") as report:
        calls, steps = prepare(device, DTYPES, report)
        scored = [step_of(job, device, str(key))[0] for key, job in jobs.items()]
        found = measure(calls, steps, Clock(device), minutes * 60, report, scored)
    profile = fitted(assumed(read_cluster("cpu")), Measured(found.calls, found.steps[: len(steps)]))
    took = {step.name: time for step, time in found.steps}
    return [row(size, dtype, jobs, told, took, profile) for size, dtype in jobs], profile


def row(
    size: Size,
    dtype: str,
    jobs: dict[tuple[Size, str], Job],
    told: dict[tuple[Size, str], list[Work]],
    took: dict[str, float],
    profile: DeviceProfile,
) -> dict[str, object]:
    works, real = told[size, dtype], took[str((size, dtype))]
    guess = sum(seconds(work, profile) + profile.launch.median for work in works)
    weights = jobs[size, dtype].model.num_parameters()
    return {
        "weights": weights,
        "dtype": dtype,
        **asdict(size),
        "measured": real,
        "told": guess,
        "error": guess / real - 1,
    }


def job_of(size: Size, dtype: str) -> Job:
    sparse = Experts(size.experts, 2, size.ffn) if size.experts else None
    model = ModelConfig(
        *("qwen3_moe" if sparse else "qwen3", size.vocabulary, size.hidden, size.ffn, size.layers),
        *(size.heads, size.heads, size.head),
        qk_norm=True,
        experts=sparse,
        dtype=dtype,
    )
    train = TrainConfig(steps=2, batch_tokens=size.rows * size.length, microbatches=size.microbatches)
    return Job(model, Layout(), 1, size.length, train, "cpu")


def summary(rows: list[dict[str, object]]) -> dict[str, float]:
    """Return the median error, the bias, and Spearman's rank correlation."""
    errors = [float(str(one["error"])) for one in rows]
    measured, told = ([float(str(one[key])) for one in rows] for key in ("measured", "told"))
    return {
        "median_error": statistics.median(map(abs, errors)),
        "bias": statistics.median(errors),
        "spearman": statistics.correlation(ranks(measured), ranks(told)) if len(rows) > 1 else float("nan"),
    }


def ranks(values: list[float]) -> list[float]:
    """Return the place of each value among them; no two are equal."""
    ordered = sorted(values)
    return [float(ordered.index(value)) for value in values]


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| weights | dtype | model | tokens | measured | told | error |", "|" + "---|" * 7]
    for one in rows:
        sparse = f", {one['experts']} experts" if one["experts"] else ""
        lines.append(
            f"| {one['weights']:,} | {one['dtype']} | {one['layers']} x {one['hidden']}{sparse} | "
            f"{one['rows']} x {one['length']} | {one['measured']:.3f} s | {one['told']:.3f} s | {one['error']:+.1%} |"
        )
    found = summary(rows)
    lines.append(
        f"\nmedian error {found['median_error']:.1%}, bias {found['bias']:+.1%}, Spearman {found['spearman']:.3f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
