"""A dry step of fine-tuning is a real one: products, bytes at the peak, numbers that are trained."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from liaoyuan.compute.plan import Job
from liaoyuan.compute.plan.program.apart import apart
from liaoyuan.compute.plan.program.trace import Recorder, Trace
from liaoyuan.compute.plan.tuning import TuneJob, dry_tune
from liaoyuan.compute.plan.tuning.dry_tune import document_batch
from liaoyuan.data import Batch
from liaoyuan.models import Decoder, config_from_dict
from liaoyuan.models.lora import without_adapters
from liaoyuan.ops.choice import operators_called
from liaoyuan.parallel import Layout, Program, World
from liaoyuan.training import TrainConfig, make_optimiser
from liaoyuan.training.loop import take_step
from liaoyuan.tuning.lora import add_adapters, begin
from liaoyuan.tuning.preference_batches import AnswerBatch
from liaoyuan.tuning.preference_objective import PreferenceLoss, PreferenceObjective
from liaoyuan.tuning.reference import _document_sums
from tests.parallel.layouts import MODELS

LENGTH = 64
JOBS: dict[str, tuple[str, PreferenceLoss | None]] = {
    "all weights": ("full", None),
    "dora": ("dora", None),
    "dpo": ("full", PreferenceLoss()),
    "kto of adapters": ("lora", PreferenceLoss(loss="kto")),
    "a reward model": ("full", PreferenceLoss(loss="reward")),
}


def tune_job(name: str) -> TuneJob:
    method, loss = JOBS[name]
    config = config_from_dict(MODELS["dense"] | {"torch_dtype": "bfloat16", "num_hidden_layers": 1})
    train = TrainConfig(steps=2, batch_tokens=8 * LENGTH, microbatches=2, clip=0.01)
    return TuneJob(Job(config, Layout(), 1, LENGTH, train), 24, method, preference=loss)  # type: ignore[arg-type]


def real_step(tune: TuneJob) -> tuple[Trace, int]:
    """The second step of the same tuning, by a model that has weights."""
    world, train, loss = World(), tune.job.train, tune.preference
    model = Decoder(tune.job.model).to(tune.job.model.torch_dtype)
    program = Program([model])
    program.initialise(0)
    if tune.has_adapters:
        add_adapters(model, tune.method, tune.lora)
        begin(program, 0)
    objective = None if loss is None else PreferenceObjective(loss, loss.is_paired)
    with operators_called(), Recorder(program) as recorder:
        optimiser = make_optimiser(program, train, world)
        for _ in range(2):
            recorder.restart()
            batches: list[Batch] = [document_batch(tune, world) for _ in range(train.microbatches)]
            if loss is not None and loss.has_reference and tune.has_adapters:
                batches = [referred(batch, program) for batch in batches]
            take_step(program, optimiser, batches, 1e-4, train.clip, world, objective=objective)
        trace = recorder.finish()
    return trace, sum(one.numel() for one in program.models[0].parameters() if one.requires_grad)


def referred(batch: Batch, program: Program) -> AnswerBatch:
    assert isinstance(batch, AnswerBatch)
    with without_adapters(program.models):
        found = program.loss(batch, losses=_document_sums)
        if batch.strangers:
            program.loss(batch.strangers)
    return replace(batch, reference=found)


def products(trace: Trace) -> Counter[tuple[Any, ...]]:
    return Counter((e.operator, e.module, e.phase, e.flops) for e in trace.events if e.flops)


@pytest.mark.parametrize("name", JOBS)
def test_it_is_a_real_step(name: str) -> None:
    torch.manual_seed(0)
    tune = tune_job(name)
    (real, trained), planned = real_step(tune), apart(dry_tune, tune)
    assert planned.trained == trained
    assert products(planned.trace) == products(real)
    assert planned.trace.before == real.before
    assert planned.trace.peak == pytest.approx(real.peak, rel=0.02)


def test_documents_fill_rows_and_answers_come_in_pairs() -> None:
    batch = document_batch(tune_job("dpo"), World())
    assert isinstance(batch, AnswerBatch)
    assert batch.boundaries[-1] == len(batch.tokens) == 4 * LENGTH
    assert len(batch.documents) % 2 == 0 and batch.liked.sum() * 2 == len(batch.liked)
    assert LENGTH in batch.boundaries.tolist()  # no document goes over two rows
