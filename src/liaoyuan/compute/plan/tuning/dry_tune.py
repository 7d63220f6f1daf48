"""A step of fine-tuning or of learning from preferences, of one process among any number, without memory or network.

As `dry_run`, it is the program itself: adapters are put on, their optimiser is made, batches have documents of the
records' length, the loss is the one that is asked for, and what the model to begin with says of a batch is computed
where that is done for each batch.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from liaoyuan.compute.plan.program.dry_run import Job, Planned, alone_among
from liaoyuan.compute.plan.program.hollow import Hollow
from liaoyuan.compute.plan.program.trace import Recorder, Trace
from liaoyuan.data import Batch
from liaoyuan.models import Decoder
from liaoyuan.models.lora import without_adapters
from liaoyuan.ops.choice import operators_called
from liaoyuan.parallel import Program, World
from liaoyuan.parallel.program import give_memory, take_apart
from liaoyuan.training.loop import make_optimiser, take_step
from liaoyuan.tuning.lora import LoraConfig, Method, add_adapters
from liaoyuan.tuning.losses import sums
from liaoyuan.tuning.preference_batches import AnswerBatch
from liaoyuan.tuning.preference_objective import PreferenceLoss, PreferenceObjective


@dataclass(frozen=True)
class TuneJob:
    """A run of fine-tuning as far as its cost goes: `job`, whose rows hold documents of `document` tokens each.

    preference: the loss, if answers are judged; None: every token is learned.
    """

    job: Job
    document: int
    method: Method = "full"
    lora: LoraConfig = field(default_factory=LoraConfig)
    preference: PreferenceLoss | None = None

    @property
    def has_adapters(self) -> bool:
        return self.method != "full"


@dataclass(frozen=True)
class Step:
    """What a process does in a step, and how many numbers it trains over all processes."""

    trace: Trace
    trained: int


def dry_tune(tune: TuneJob, rank: int = 0, steps: int = 2) -> Step:
    """Return what process `rank` does in the last of `steps` steps; the first makes what later ones keep.

    Raises:
        LiaoyuanError: the layout does not fit, or the model has no projections to adapt.
    """
    job = tune.job
    with alone_among(job.processes, rank), operators_called():
        world = World(rank, job.processes, Planned(job.device)).arrange(job.resolved)
        with torch.device("meta"):
            model = Decoder(job.model).to(job.model.torch_dtype)
        if tune.has_adapters:
            add_adapters(model, tune.method, tune.lora)
        program = take_apart(model, job.resolved, world)
        trained = sum(one.numel() for _, one in program.named_parameters() if one.requires_grad)
        with Hollow():
            give_memory(program, world.device.torch)
            with Recorder(program) as recorder:
                return Step(_steps(tune, program, world, recorder, steps), trained)


def document_batch(tune: TuneJob, world: World) -> Batch:
    """Return a microbatch of one data rank, its rows filled with documents of one length, the last ones shorter."""
    job, length = tune.job, tune.job.sequence_length
    count = job.rows // world.data_size // job.train.microbatches
    sizes = [min(tune.document, length - begin) for begin in range(0, length, tune.document)]
    if tune.preference is not None and len(sizes) % 2:
        sizes = [*sizes[:-1], *_halves(sizes[-1])]
    positions = torch.cat([torch.arange(size) for size in sizes]).repeat(count)
    tokens = torch.zeros(count * length, dtype=torch.int64)
    boundaries = torch.tensor([0, *sizes * count]).cumsum(0).int()
    batch = Batch(tokens, positions, tokens, torch.ones(len(tokens)), boundaries)
    if tune.preference is None:
        return batch
    answers = count * len(sizes)
    liked = torch.arange(answers) % 2 == 0
    strangers = batch if tune.preference.loss == "kto" else None
    return AnswerBatch(
        **vars(batch),
        documents=torch.arange(answers),
        liked=liked,
        reference=torch.zeros(answers),
        strangers=strangers,
        strangers_count=answers if strangers else 0,
    )


def _steps(tune: TuneJob, program: Program, world: World, recorder: Recorder, steps: int) -> Trace:
    train, loss = tune.job.train, tune.preference
    optimiser = make_optimiser(program, train, world)
    objective = None if loss is None else PreferenceObjective(loss, loss.is_paired)
    for _ in range(steps):
        recorder.restart()
        batches = [document_batch(tune, world) for _ in range(train.microbatches)]
        if loss is not None and loss.has_reference and tune.has_adapters:
            batches = [_referred(batch, program) for batch in batches]
        take_step(program, optimiser, batches, 1e-4, train.clip, world, penalties=train.penalties, objective=objective)
    return recorder.finish()


def _referred(batch: Batch, program: Program) -> Batch:
    """Return a batch with its reference, as `tuning.reference.ReferredBatches` has it."""
    assert isinstance(batch, AnswerBatch)
    with without_adapters(program.models):
        found = program.loss(batch, losses=_document_sums)
        if batch.strangers:
            program.loss(batch.strangers)
    return replace(batch, reference=found)


def _document_sums(log_probs: Tensor, batch: Batch) -> Tensor:
    return sums(log_probs * batch.weights, batch.boundaries)


def _halves(size: int) -> tuple[int, int]:
    return size // 2, size - size // 2
