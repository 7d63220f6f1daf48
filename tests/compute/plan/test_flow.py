"""Bubbles come out of the schedules' own orders, as their papers count them; the orders are those that really run."""

import itertools

import pytest
import torch

from liaoyuan.compute.plan.program.actions import FORWARD, WEIGHT, Action, marking, orders
from liaoyuan.compute.plan.program.dry_run import Job, empty_batch
from liaoyuan.compute.plan.program.trace import Recorder
from liaoyuan.compute.plan.step.flow import Flow, flow
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, config_from_dict
from liaoyuan.parallel import Layout, World, lay_out
from liaoyuan.parallel.layout import STAGES_PER_PROCESS
from liaoyuan.training.loop import TrainConfig, make_optimiser, take_step
from tests.conftest import slow_if
from tests.parallel.layouts import MODELS
from tests.parallel.processes import run

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zbv", "dualpipev")
COSTS = {"forward": 1.0, "backward": 2.0, "input": 1.0, "weight": 1.0}
SIZES = ((2, 4), (4, 8), (8, 32))


def flowed(schedule: str, stages: int, microbatches: int, travel: float = 0.0, **options: float) -> Flow:
    layout = Layout(pp=stages, schedule=schedule)  # type: ignore[arg-type]
    each = STAGES_PER_PROCESS[schedule]
    order = orders(layout, microbatches)
    return flow(order, lambda action, _: COSTS[action.kind] / each, lambda *_: travel, layout.stages, **options)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_bubbles_are_those_of_the_papers(p: int, m: int) -> None:
    work = 3 * m
    share = {name: 1 - work / flowed(name, p, m).seconds for name in SCHEDULES}
    assert share["gpipe"] == share["1f1b"] == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    # Narayanan et al. 2021 (arXiv 2104.04473), sec. 2.2.2: v chunks divide the bubble by v
    assert share["interleaved"] == pytest.approx((p - 1) / (2 * m + p - 1), abs=1e-12)
    # Qi et al. 2024 (arXiv 2405.15362), tab. 1: with equal F, B and W the V's bubble is (p - 1) / 2 forward passes
    # of a process, a third of a microbatch's work each
    for name in ("zbv", "dualpipev"):
        assert share[name] == pytest.approx((p - 1) / 2 / (3 * m + (p - 1) / 2), abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_microbatch_passes_every_stage_once_each_way(name: str) -> None:
    layout = Layout(pp=4, schedule=name)  # type: ignore[arg-type]
    actions = list(itertools.chain(*orders(layout, 8)))
    assert len(set(actions)) == len(actions)
    pairs = {(stage, number) for stage in range(layout.stages) for number in range(8)}
    assert {(a.stage, a.microbatch) for a in actions if a.kind == FORWARD} == pairs
    assert {(a.stage, a.microbatch) for a in actions if a.kind not in (FORWARD, WEIGHT)} == pairs


@pytest.mark.parametrize("name", SCHEDULES)
def test_slower_links_and_fewer_cores_never_help(name: str) -> None:
    free = flowed(name, 4, 8).seconds
    slow = [flowed(name, 4, 8, travel).seconds for travel in (0.1, 0.2, 0.4)]
    assert free < slow[0] < slow[1] < slow[2]
    assert flowed(name, 4, 8, cores=1).seconds == pytest.approx(4 * 3 * 8)  # one core does all the work
    assert free <= flowed(name, 4, 8, cores=2).seconds <= 4 * 3 * 8


def test_a_process_waits_for_stages_or_for_what_is_under_way() -> None:
    found = flowed("gpipe", 2, 4, travel=0.5)
    assert found.bubble[1] == pytest.approx(1.0) and found.travel[1] == pytest.approx(0.5)
    for rank in range(2):
        busy = sum(end - begin for begin, end in zip(found.begins[rank], found.ends[rank], strict=True))
        assert busy + found.bubble[rank] + found.travel[rank] == pytest.approx(found.ends[rank][-1])


def test_orders_that_wait_for_each_other_are_refused() -> None:
    stuck = ((Action("forward", 0, 0), Action("backward", 0, 0)), (Action("backward", 1, 0), Action("forward", 1, 0)))
    with pytest.raises(LiaoyuanError, match="wait for each other"):
        flow(stuck, lambda *_: 1.0, lambda *_: 0.0, 2)


def real_order(world: World, job: Job) -> list[str]:
    world = world.arrange(job.resolved)
    with torch.device("meta"):
        model = Decoder(job.model).to(job.model.torch_dtype)
    program = lay_out(model, job.resolved, world).initialise(0)
    optimiser = make_optimiser(program, job.train, world)
    batches = [empty_batch(job, world) for _ in range(job.train.microbatches)]
    with Recorder(program) as recorder, marking(recorder, optimiser):
        take_step(program, optimiser, batches, 1e-3, 1.0, world)
    return [mark.name for mark in recorder.trace.marks if Action.parse(mark.name)]


@pytest.mark.parametrize("name", [slow_if(name == "gpipe", name) for name in SCHEDULES])
def test_a_real_pipeline_takes_its_actions_in_this_order(name: str) -> None:
    config = config_from_dict(MODELS["dense"] | {"num_hidden_layers": 4})
    train = TrainConfig(steps=1, batch_tokens=4 * 64, microbatches=4)
    job = Job(config, Layout(pp=2, schedule=name), 2, 64, train)  # type: ignore[arg-type]
    found = run(2, real_order, job)
    assert found == [[str(action) for action in order] for order in orders(job.resolved, 4)]
