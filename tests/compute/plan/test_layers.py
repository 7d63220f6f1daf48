"""A job told from few layers, microbatches and stages is the whole job run dry."""

from dataclasses import replace
from typing import Any

import pytest

from liaoyuan.compute.plan import Cluster, Job, dry_run, read_cluster
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import DeviceProfile, Figure, assumed
from liaoyuan.compute.plan.program.apart import apart_each
from liaoyuan.compute.plan.program.layers import blocks_of, sample, sketch, with_layers
from liaoyuan.compute.plan.program.ops import ops_of
from liaoyuan.compute.plan.program.trace import Trace
from liaoyuan.compute.plan.step.prices import Prices
from liaoyuan.compute.plan.step.timeline import play
from liaoyuan.compute.plan.step.whole import Load, Whole
from liaoyuan.models import config_from_dict
from liaoyuan.parallel import Layout
from liaoyuan.training.loop import TrainConfig
from tests.conftest import slow_if
from tests.parallel.layouts import MODELS

LENGTH = 64
PLAIN: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {  # model, processes, layers, microbatches, layout
    "fsdp, many microbatches": ("dense", 2, 5, 4, {}),
    "tp, recomputed, dense and sparse layers": ("latent", 4, 5, 1, {"tp": 2, "ep": 2, "recompute": "full"}),
    "windows": ("sinks", 2, 6, 2, {"overlap": False}),
}
PIPED: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "1f1b": ("dense", 4, 12, 6, {"pp": 4}),
    "zbv": ("dense", 3, 13, 8, {"pp": 3, "schedule": "zbv"}),
}
PEAKS = {"1f1b": 0.01, "zbv": 0.03}  # with ZBV microbatches differ in when they let go: told 1.3 to 2.5% too high


def job_of(case: tuple[str, int, int, int, dict[str, Any]]) -> Job:
    kind, processes, layers, microbatches, axes = case
    config = config_from_dict(MODELS[kind] | {"torch_dtype": "bfloat16", "num_hidden_layers": layers})
    train = TrainConfig(steps=2, batch_tokens=8 * microbatches * LENGTH, microbatches=microbatches)
    return Job(config, Layout(**axes), processes, LENGTH, train, "cuda")


def quick(cluster: Cluster) -> DeviceProfile:
    """Return a profile whose host is quick, so that tiny models are bound by their cards and links."""
    profile = assumed(cluster).median()
    return profile.model_copy(update={"launch": Figure(median=1e-9), "call": Figure(median=1e-7)})


def told(job: Job) -> Whole:
    plan = sketch(job)
    return Whole(plan, sample(plan), read_cluster("h100"))


def same_counts(load: Load, trace: Trace, peak: float = 0.01) -> None:
    assert load.flops == trace.flops
    assert load.traffic == pytest.approx(sum(event.traffic for event in trace.events), rel=0.002)
    sent = {f"{axis} {kind}": value for (axis, kind), value in trace.traffic().items() if axis != "world"}
    assert {name: value for name, value in load.sent.items() if not name.startswith("world")} == sent
    assert load.lasting == pytest.approx(trace.after, rel=0.01)
    assert load.peak == pytest.approx(trace.peak, rel=peak)


@pytest.mark.parametrize("name", [slow_if(name == "windows", name) for name in PLAIN])
def test_layers_and_microbatches_are_multiplied(name: str) -> None:
    job = job_of(PLAIN[name])
    whole = told(job)
    (trace,) = apart_each(dry_run, [(job, 0, 1)])
    (load,) = whole.loads()
    same_counts(load, trace)
    profile = quick(whole.cluster)
    prices = Prices(profile, Fabric(whole.cluster, profile), streams=True)
    real = play(ops_of(trace.events, True, job.layout.overlap)[0], prices)[-1]
    step = whole.step(profile)
    assert step.seconds == pytest.approx(real.seconds, rel=0.01)
    assert step.computing + sum(step.exposed.values()) == pytest.approx(step.seconds, rel=1e-6)


@pytest.mark.parametrize("name", ["1f1b", pytest.param("zbv", marks=pytest.mark.slow)])
def test_stages_are_multiplied(name: str) -> None:
    job = job_of(PIPED[name])
    whole = told(job)
    loads = whole.loads()
    each = job.processes // job.layout.pp
    traces = apart_each(dry_run, [(job, 0), (job, (job.layout.pp - 1) * each)], 2)
    for load, trace in zip((loads[0], loads[-1]), traces, strict=True):
        same_counts(load, trace, PEAKS[name])
    step = whole.step(quick(whole.cluster))
    assert step.computing + sum(step.exposed.values()) == pytest.approx(step.seconds, rel=1e-6)
    assert 0 < step.exposed["bubble"] < step.seconds


def test_a_block_is_as_many_layers_as_recomputation_takes_turns_with() -> None:
    job = job_of(("sinks", 1, 6, 1, {"recompute": "full", "recompute_every": 2}))
    assert [len(block) for block in blocks_of(job, range(5))] == [2, 2, 1]
    kinds = [layer for block in blocks_of(job, range(6)) for layer in block]
    model = with_layers(job.model, kinds)
    assert [(model.is_sparse(n), model.window(n)) for n in range(6)] == kinds
    assert replace(model, full_layers=job.model.full_layers) == job.model
