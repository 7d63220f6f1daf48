"""Formulas for memory, FLOPs and bytes are those of dry runs, and the least time is never more than predicted."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from liaoyuan.compute.plan import Job, dry_run, read_cluster
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import assumed
from liaoyuan.compute.plan.program.trace import Trace
from liaoyuan.compute.plan.search.bounds import FLOOR, in_flight, memory_at
from liaoyuan.compute.plan.search.estimate import Estimator
from liaoyuan.models import config_from_dict
from liaoyuan.parallel import Layout, Traffic, World
from liaoyuan.training.loop import TrainConfig
from tests.conftest import slow_if
from tests.parallel.layouts import MODELS
from tests.parallel.processes import run

LENGTH = 256
WIDE = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 32, "vocab_size": 512}


@dataclass(frozen=True)
class Case:
    kind: str
    processes: int
    axes: dict[str, Any]
    microbatches: int = 2
    rank: int = 0
    close: float = 0.08  # how near the peak must be


CASES = {
    "one process": Case("dense", 1, {}, 1),
    "fsdp 4, recomputed": Case("dense", 4, {"recompute": "full"}),
    "tp 2": Case("dense", 2, {"tp": 2}, 1),
    "ring 2, selectively recomputed": Case("dense", 2, {"cp": {"ring": 2}, "recompute": "selective"}, 1),
    "first of pp 4": Case("dense", 4, {"pp": 4}, 8),
    "last of zbv": Case("dense", 2, {"pp": 2, "schedule": "zbv"}, 4, 1),
    "ep 2": Case("experts", 2, {"ep": 2}, 1),
    "latent": Case("latent", 1, {}, 1, close=0.15),
}
NOT_COUNTED = ("world", "tp: all-reduce")  # a few numbers of the optimiser's norm


def job_of(case: Case) -> Job:
    config = config_from_dict(MODELS[case.kind] | WIDE | {"torch_dtype": "bfloat16"})
    train = TrainConfig(steps=2, batch_tokens=32 * LENGTH, microbatches=case.microbatches)
    job = Job(config, Layout(**case.axes), case.processes, LENGTH, train, "cuda")
    return replace(job, layout=job.resolved)


def dry(_: World, job: Job, rank: int) -> Trace:
    return dry_run(job, rank, steps=1 if job.layout.pp == 1 else 2)


@pytest.mark.parametrize("name", [slow_if(name in ("tp 2", "first of pp 4"), name) for name in CASES])
def test_they_are_those_of_a_dry_run(name: str) -> None:
    case = CASES[name]
    job = job_of(case)
    (trace,) = run(1, dry, job, case.rank)
    place = case.rank * job.layout.pp // case.processes
    held = memory_at(job, place)
    assert held.lasting == pytest.approx(trace.before, rel=0.01)
    assert held.peak == pytest.approx(trace.peak, rel=case.close)
    assert held.peak * FLOOR <= trace.peak
    found = estimator().at(job, place)
    assert found.flops == pytest.approx(trace.flops, rel=1e-9)
    assert bytes_of(found.sent) == bytes_of(trace.traffic())


def bytes_of(traffic: Traffic) -> dict[str, int]:
    told = {f"{axis}: {kind}": sent.bytes for (axis, kind), sent in traffic.items()}
    return {name: count for name, count in told.items() if not name.startswith(NOT_COUNTED) and "counts" not in name}


def estimator() -> Estimator:
    cluster = read_cluster("h100")
    figures = assumed(cluster).median()
    return Estimator(Fabric(cluster, figures), figures)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"])
def test_no_process_holds_more_microbatches_than_there_are(schedule: str) -> None:
    layout = Layout.model_validate({"pp": 4, "schedule": schedule, "fsdp": 1})
    for place in range(4):
        held = in_flight(layout, place, 8)
        assert all(1 <= number <= 8 for number in held)
    assert sum(in_flight(layout, 0, 8)) >= sum(in_flight(layout, 3, 8))
