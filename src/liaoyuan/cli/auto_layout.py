"""`layout = "auto"`: the command line asks the planner, and hands training a finished layout.

A run that has begun keeps the layout that its folder's `config.toml` says, unless there are other processes now for
which it is none. The first process asks; the others wait for it where they would meet anyway.
"""

import os
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.compute.plan import Cluster, Job
    from liaoyuan.compute.plan.machine.profile import DeviceProfile
    from liaoyuan.compute.plan.search.reasons import Reason
    from liaoyuan.compute.plan.search.search import Ranking
    from liaoyuan.device import Device
    from liaoyuan.parallel import World
    from liaoyuan.training.pretrain import PretrainConfig


def find_layout(config: "PretrainConfig", out: Path, device: "Device", cluster: str | None = None) -> "PretrainConfig":
    """Return the run with a finished layout where it asks for one; for the process that asks, before others join it.

    Raises:
        LiaoyuanError: no layout fits, or it is not known what this machine is.
    """
    if not config.plan.auto:
        return config
    if cluster:
        config = config.model_copy(update={"plan": config.plan.model_copy(update={"cluster": cluster})})
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("RANK", "0")):
        return config  # it is told: `share_layout`
    from liaoyuan.compute.plan.search.space import describe
    from liaoyuan.parallel.layout import objection

    job, machines, profile = planned(config, processes, device)
    before = _begun(config, out, job)
    if before and objection(before.layout, processes, before.shape) is None:
        _say(f"layout: {describe(before)}, as this run began.")
        return _finished(config, before)
    keep = f"microbatches={before.train.microbatches}" if before else None  # they decide how sums are rounded
    from liaoyuan.cli.plan_search import find
    from liaoyuan.cli.progress import bar
    from liaoyuan.compute.plan.search.reasons import reasons

    with bar("Plan") as report:
        ranking = find(job, machines, profile, keep, config.plan.whole, report)
    for line in told(ranking, reasons(ranking, profile)):
        _say(line)
    return _finished(config, ranking.best.job)


def share_layout(config: "PretrainConfig", world: "World") -> "PretrainConfig":
    """Return the run as the first process has it."""
    if world.size == 1:
        return config
    return type(config).model_validate_json(world.broadcast(config.model_dump_json()))


def planned(config: "PretrainConfig", processes: int, device: "Device") -> "tuple[Job, Cluster, DeviceProfile]":
    """Return a run as the planner knows it, on the machines that it names or this one's kind."""
    from liaoyuan.compute.plan import Job, read_cluster
    from liaoyuan.compute.plan.machine.profile import assumed, read_profile
    from liaoyuan.data import load_corpus
    from liaoyuan.training.pretrain import model_config

    cluster = read_cluster(config.plan.cluster or _kind_of(device))
    profile = read_profile(config.plan.profile) if config.plan.profile else assumed(cluster)
    model = model_config(config.model, load_corpus(config.corpus).tokenizer(), device)
    kind = device.torch.type
    return Job(model, config.layout, processes, config.sequence_length, config.train, kind), cluster, profile


def legal_counts(config: "PretrainConfig") -> Callable[[int], bool]:
    """Return whether some layout of this run is legal on a number of processes."""
    from liaoyuan.compute.plan.search.space import candidates
    from liaoyuan.device import select_device

    job, cluster, _ = planned(config, 1, select_device(config.device))
    reaches = tuple(link.reach for link in cluster.links if link.reach)

    def legal(processes: int) -> bool:
        return next(candidates(replace(job, processes=processes), None, reaches), None) is not None

    return legal


def told(ranking: "Ranking", found: "list[Reason]") -> tuple[str, str]:
    """Return in two lines what was chosen, and why not what comes next."""
    best = ranking.best
    span = best.found.seconds if best.found else None
    interval = f" ({span.low:.3g} to {span.high:.3g})" if span else ""
    share = best.memory_share(ranking.cluster)
    first = (
        f"layout: {best.words}: about {best.seconds:.3g} s{interval} a step and {share:.0%} of the memory of "
        f"{ranking.cluster.accelerator.name}, the best of {ranking.legal:,}."
    )
    nearest = min((one for one in found if one.slower is not None), key=lambda one: one.slower or 0.0, default=None)
    other = nearest or (found[0] if found else None)
    return first, f"layout: {other.neighbour} {other.sentence}" if other else "layout: there is no other."


def _begun(config: "PretrainConfig", out: Path, job: "Job") -> "Job | None":
    """Return the job with the layout and microbatches with which the run in this folder began, if it has."""
    from liaoyuan.parallel import Layout
    from liaoyuan.rundir import CONFIG
    from liaoyuan.training.loop import STATE

    if not (out / STATE).exists():
        return None
    try:
        before = tomllib.loads((out / CONFIG).read_text(encoding="utf-8"))
        layout, microbatches = Layout.model_validate(before["layout"]), int(before["train"]["microbatches"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return replace(job, layout=layout, train=config.train.model_copy(update={"microbatches": microbatches}))


def _finished(config: "PretrainConfig", job: "Job") -> "PretrainConfig":
    plan = config.plan.model_copy(update={"auto": False})
    return config.model_copy(update={"layout": job.layout, "train": job.train, "plan": plan})


def _kind_of(device: "Device") -> str:
    """Return the cluster that ships of which this machine is one."""
    if device.is_cpu:
        return "cpu"
    import torch

    from liaoyuan.compute.plan import cluster_names

    name = torch.get_device_module(device.torch).get_device_name().lower()
    found = [known for known in cluster_names() if known.split("-")[-1] in name.replace(" ", "-")]
    if len(found) != 1:
        raise LiaoyuanError(f'Which cluster is this ({name})? Say so in the run file: [plan] cluster = "h100".')
    return found[0]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
