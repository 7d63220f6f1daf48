"""What a step of a job costs each kind of its processes: memory, products and bytes sent, from dry runs.

Processes differ by their place in the pipeline alone: its first and last hold the embedding and the head, and hold
more microbatches the earlier they stand. One of each such kind is run dry.
"""

import re
from dataclasses import dataclass, replace

from liaoyuan.compute.plan.program.apart import apart
from liaoyuan.compute.plan.program.dry_run import Job, dry_run
from liaoyuan.compute.plan.program.trace import Held
from liaoyuan.ops.watch import Phase
from liaoyuan.parallel.traffic import Sent
from liaoyuan.rundir import Progress, Report, silent


@dataclass(frozen=True)
class Footprint:
    """Of process `rank` in a step.

    peak: bytes of tensors at most, of which `lasting` are held between steps; `held` says what they are, largest first.
    flops: of matrix products. sent: by axis and collective.
    """

    rank: int
    peak: int
    lasting: int
    flops: int
    sent: dict[str, Sent]
    held: tuple[Held, ...]


def footprints(job: Job, ranks: tuple[int, ...] | None = None, report: Report = silent) -> list[Footprint]:
    """Return the footprints of the processes `ranks`; None: of the first and the last of the pipeline.

    Raises:
        LiaoyuanError: the layout does not fit the job.
    """
    stages = job.resolved.pp
    chosen = ranks or tuple(dict.fromkeys((0, job.processes // stages * (stages - 1))))
    found = list[Footprint]()
    for rank in chosen:
        found.append(apart(_footprint, job, rank))
        report(Progress(len(found), len(chosen), "process", f"process {rank:,}"))
    return found


def _footprint(job: Job, rank: int) -> Footprint:
    trace = dry_run(job, rank)
    sent = {f"{axis}: {kind}": value for (axis, kind), value in sorted(trace.traffic().items())}
    return Footprint(rank, trace.peak, trace.before, trace.flops, sent, tuple(alike(trace.held)))


def alike(held: list[Held]) -> list[Held]:
    """Return what is held with the layers added up, largest first."""
    sums: dict[tuple[str, str, Phase], Held] = {}
    for one in held:
        module = re.sub(r"\blayers\.\d+", "layers.*", one.module)
        key = module, one.operator, one.phase
        before = sums.get(key, Held(*key, 0, 0))
        sums[key] = replace(before, bytes=before.bytes + one.bytes, tensors=before.tensors + one.tensors)
    return sorted(sums.values(), key=lambda part: -part.bytes)
