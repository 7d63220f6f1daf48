"""What `liaoyuan plan RUN --cluster C --explain` says of a step: how long, why, how sure, and what it holds."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING

from liaoyuan.cli.plan_words import causes, size, told
from liaoyuan.cli.progress import bar
from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.compute.plan import Job
    from liaoyuan.compute.plan.step.predict import Memory, Prediction
    from liaoyuan.training.pretrain import PretrainConfig

SHOWN = 6  # parts of the memory at the peak
BAR = 30  # signs of a bar that is the whole step
REASONS = {"bubble": "waiting for other stages", "launch": "waiting for the host to ask"}


def explain(
    config: "PretrainConfig", job: "Job", cluster: str | None, profile: Path | None, json: bool, report: Path | None
) -> None:
    """Print the prediction of a step, and write its page where `report` says.

    Raises:
        LiaoyuanError: no cluster is named, the profile is wrong, or the layout does not fit.
    """
    from liaoyuan.cli.plan_job import machines_of
    from liaoyuan.cli.plan_page import write_page
    from liaoyuan.compute.plan import predict
    from liaoyuan.rundir import Progress

    if cluster is None:
        raise LiaoyuanError("--explain tells how long a step takes: it needs --cluster, such as --cluster h100.")
    machines, known = machines_of(cluster, profile)
    with bar("Plan", quiet=json) as progress:
        found = predict(job, machines, known, details=True)
        progress(Progress(1, 1, "layout", job.resolved.describe()))
    print(json_format.dumps(found.to_dict(), indent=2) if json else page(job, found))
    if report:
        write_page(report, config, job, machines, known, found, quiet=json)


def page(job: "Job", found: "Prediction") -> str:
    """Return the prediction as a page of text."""
    step = found.step
    lines = [
        f"{job.model.num_parameters():,} weights over {job.processes:,} processes, {job.resolved.describe()}, "
        f"{job.train.batch_tokens:,} tokens a step",
        "",
        f"A step takes {told(step.seconds, ' s')}: the median, and what holds 90% of what it may be",
        f"{told(found.tokens_per_second)} tokens/s on each card; model FLOPs are "
        f"{told(found.model_utilisation.times(100), '%')} of its peak, executed ones "
        f"{told(found.hardware_utilisation.times(100), '%')}",
        "",
        *_parts(found),
        "",
        f"{causes(found.width)}.",
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


def _memory(one: "Memory") -> list[str]:
    verb = "fits" if one.fits else "does NOT fit"
    lines = [
        f"Process {one.rank:,} ({one.stage}): {size(one.total.median)} ({size(one.total.low)} to "
        f"{size(one.total.high)}); it {verb} in {size(one.room)}",
        f"  {size(one.tensors):>12}  tensors at the peak, of which {size(one.lasting)} between steps",
    ]
    lines += [f"  {size(span.median):>12}  {name}" for name, span in one.allowance.items()]
    lines.append("  Most of the tensors:")
    for part in one.held[:SHOWN]:
        lines.append(f"  {size(part.bytes):>12}  {part.module or 'the model'}: {part.operator} ({part.phase})")
    for name, sent in sorted(one.sent.items(), key=lambda item: -item[1].bytes):
        lines.append(f"  {size(sent.bytes):>12}  sent, {name} in {sent.calls:,} calls")
    return lines
