"""A dry run of one process among many says what a real one does: collectives, products and bytes of memory."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from liaoyuan.compute.plan.program.dry_run import Job, dry_run, empty_batch
from liaoyuan.compute.plan.program.trace import Recorder, Trace
from liaoyuan.models import Decoder, config_from_dict
from liaoyuan.ops.choice import operators_called
from liaoyuan.parallel import Layout, World, lay_out
from liaoyuan.training.loop import TrainConfig, make_optimiser, take_step
from tests.conftest import slow_if
from tests.parallel.layouts import MODELS
from tests.parallel.processes import run

LENGTH = 64
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one process": ("dense", 1, {}),
    "fsdp 2": ("dense", 2, {}),
    "dp 2 x fsdp 2": ("tied", 4, {"dp": 2}),
    "tp 2": ("dense", 2, {"tp": 2}),
    "fsdp 2 x tp 2, recomputed": ("dense", 4, {"tp": 2, "recompute": "selective"}),
    "ring 2 x ulysses 2": ("dense", 4, {"cp": {"ring": 2, "ulysses": 2}}),
    "pp 2 x fsdp 2": ("dense", 4, {"pp": 2}),
    "interleaved pp 2 x tp 2": ("dense", 4, {"pp": 2, "schedule": "interleaved"} | {"tp": 2}),
    "ep 2": ("experts", 2, {"ep": 2}),
    "ep 2 of fsdp 4, latent": ("latent", 4, {"ep": 2}),
}
ROUTED = ("ep", "all-to-all")  # of which the router says how much


def job_of(name: str) -> Job:
    kind, processes, axes = LAYOUTS[name]
    settings = TrainConfig(steps=2, batch_tokens=16 * LENGTH, microbatches=2, clip=0.01)
    layers = 4 if "pp" in axes else 2
    config = config_from_dict(MODELS[kind] | {"torch_dtype": "bfloat16", "num_hidden_layers": layers})
    return Job(config, Layout(**axes), processes, LENGTH, settings)


def real_run(world: World, job: Job) -> Trace:
    """The second step of the same training, by a process that has memory and neighbours."""
    layout = job.resolved
    world = world.arrange(layout)
    with torch.device("meta"):
        model = Decoder(job.model).to(job.model.torch_dtype)
    program = lay_out(model, layout, world).initialise(0)
    with operators_called(), Recorder(program) as recorder:
        optimiser = make_optimiser(program, job.train, world)
        batches = [empty_batch(job, world) for _ in range(job.train.microbatches)]
        for _ in range(2):
            for _ in range(3 if world.size > 1 else 0):
                dist.barrier()  # until the network has let go of what it sent last
            recorder.restart()
            take_step(program, optimiser, batches, job.train.learning_rate, job.train.clip, world)
        return recorder.finish()


def dry(_: World, job: Job, rank: int) -> Trace:
    return dry_run(job, rank)


SHOWN = ("fsdp 2", "tp 2", "ep 2", "pp 2 x fsdp 2")  # by rows with more axes


@pytest.mark.parametrize("name", [slow_if(name in SHOWN, name) for name in LAYOUTS])
def test_it_is_a_real_step_call_by_call(name: str) -> None:
    job = job_of(name)
    found = run(job.processes, real_run, job)
    with torch.device("meta"):
        names = {name for name, _ in Decoder(job.model).named_modules()}
    for rank in {0, job.processes - 1} if job.layout.pp > 1 else {0}:
        real, (planned,) = found[rank], run(1, dry, job, rank)
        assert without(ROUTED, planned.traffic()) == without(ROUTED, real.traffic())
        assert products(planned) == products(real)
        assert {event.module for event in planned.events} <= names
        assert planned.before == real.before
        if job.model.experts:  # how many rows come to a process is the router's affair, not how many there are
            assert job.processes * planned.flops == sum(trace.flops for trace in found)
            assert planned.peak == pytest.approx(real.peak, rel=0.2)
            continue
        assert planned.flops == real.flops
        assert planned.peak == pytest.approx(real.peak, rel=0.02)  # the network holds messages as long as it takes
        if job.processes == 1:
            assert (planned.peak, planned.held) == (real.peak, real.held)


def without(key: Any, traffic: dict[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in traffic.items() if name != key}


def products(trace: Trace) -> Counter[Any]:
    """The calls that multiply matrices, but for routed experts: phase, module and operator."""
    calls = [(event.phase, event.module, event.operator) for event in trace.events if event.flops]
    return Counter(call for call in calls if not call[1].endswith("experts"))
