"""What `liaoyuan plan RUN --cluster C --explain` says of a step: how long, why, how sure, and what it holds."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING

from liaoyuan.cli.progress import bar
from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.compute.plan import Job
    from liaoyuan.compute.plan.predict import Memory, Prediction
    from liaoyuan.compute.plan.step_time import Span

SHOWN = 6  # parts of the memory at the peak, and figures that make the interval wide
WIDE = 0.01  # share of the width from which on a figure is told
BAR = 30  # signs of a bar that is the whole step
REASONS = {"bubble": "waiting for other stages", "launch": "waiting for the host to ask"}


def explain(job: "Job", cluster: str | None, profile: Path | None, json: bool, report: Path | None = None) -> None:
    """Print the prediction of a step, and write its page where `report` says.

    Raises:
        LiaoyuanError: no cluster is named, the profile is wrong, or the layout does not fit.
    """
    from liaoyuan.cli.plan_page import write_page
    from liaoyuan.compute.plan import read_cluster
    from liaoyuan.compute.plan.predict import predict
    from liaoyuan.compute.plan.profile import read_profile
    from liaoyuan.rundir import Progress

    if cluster is None:
        raise LiaoyuanError("--explain tells how long a step takes: it needs --cluster, such as --cluster h100.")
    machines, known = read_cluster(cluster), read_profile(profile) if profile else None
    with bar("Plan", quiet=json) as progress:
        found = predict(job, machines, known, details=True)
        progress(Progress(1, 1, "layout", job.resolved.describe()))
    print(json_format.dumps(found.to_dict(), indent=2) if json else page(job, found))
    if report:
        write_page(report, job, machines, known, found, quiet=json)


def page(job: "Job", found: "Prediction") -> str:
    """Return the prediction as a page of text."""
    step = found.step
    lines = [
        f"{job.model.num_parameters():,} weights over {job.processes:,} processes, {job.resolved.describe()}, "
        f"{job.train.batch_tokens:,} tokens a step",
        "",
        f"A step takes {_range(step.seconds, ' s')} (90% of what it may be, and the median)",
        f"{_range(found.tokens_per_second, '')} tokens/s on each card; model FLOPs "
        f"{_range(found.model_utilisation, '', 100)}% of its peak, executed ones "
        f"{_range(found.hardware_utilisation, '', 100)}%",
        "",
        *_parts(found),
        "",
        *_width(found),
    ]
    for one in found.memory:
        lines += ["", *_memory(one)]
    return "\n".join([*lines, "", f"It rests on {found.rests_on}."])


def _parts(found: "Prediction") -> list[str]:
    """Where the median step goes: computing, and what it waits for."""
    step = found.step
    waited = sorted(step.exposed.items(), key=lambda item: -item[1])
    named = [(REASONS.get(name, f"waiting for {name}"), value) for name, value in waited]
    parts = [("computing", step.computing), *named]
    total = sum(value for _, value in parts)
    return [
        f"  {value:10.4g} s {value / total:6.1%}  {'#' * round(BAR * value / total):<{BAR}}  {name}"
        for name, value in parts
    ]


def _width(found: "Prediction") -> list[str]:
    told = [(name, share) for name, share in found.width.items() if share >= WIDE][:SHOWN]
    if not told:
        return ["Every figure that it rests on is certain."]
    return ["The interval is as wide as it is because of", *(f"  {share:6.0%}  {name}" for name, share in told)]


def _memory(one: "Memory") -> list[str]:
    verb = "fits" if one.fits else "does NOT fit"
    lines = [
        f"Process {one.rank:,} ({one.stage}): {_size(one.total.low)} to {_size(one.total.high)}, "
        f"median {_size(one.total.median)}; it {verb} in {_size(one.room)}",
        f"  {_size(one.tensors):>12}  tensors at the peak, of which {_size(one.lasting)} between steps",
    ]
    lines += [f"  {_size(span.median):>12}  {name}" for name, span in one.allowance.items()]
    lines.append("  Most of the tensors:")
    for part in one.held[:SHOWN]:
        lines.append(f"  {_size(part.bytes):>12}  {part.module or 'the model'}: {part.operator} ({part.phase})")
    for name, sent in sorted(one.sent.items(), key=lambda item: -item[1].bytes):
        lines.append(f"  {_size(sent.bytes):>12}  sent, {name} in {sent.calls:,} calls")
    return lines


def _range(span: "Span", unit: str, times: float = 1.0) -> str:
    return (
        f"{_short(span.low * times)} to {_short(span.high * times)}{unit}, median {_short(span.median * times)}{unit}"
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    raise AssertionError
