"""Supervised fine-tuning: the training loop over conversations of which the assistant's tokens are learned."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from liaoyuan.data import Batch, RecordBatches, TokenisedRecord, Tokenizer, tokenise
from liaoyuan.data.permutation import number
from liaoyuan.models import Decoder
from liaoyuan.parallel import Program, World
from liaoyuan.rundir import Report, silent
from liaoyuan.tasks import Task, solution_records
from liaoyuan.training import TrainConfig, TrainResult, train


def finetune(
    model: Decoder | Program,
    records: Sequence[TokenisedRecord],
    config: TrainConfig,
    folder: Path,
    report: Report = silent,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    world: World | None = None,
    sequence_length: int | None = None,
    seeded: bool = False,
) -> TrainResult:
    """Fine-tune `model` in place on tokenised records, going on from `folder` if it holds a state; see `train`.

    Records are packed into rows of `sequence_length` tokens (one row a batch if None). Where it is given, any number
    of processes that divides the rows of a batch gets the same batches. `seeded`: torch's random numbers begin anew
    with each step, so that a resumed run drops out the same.
    """
    here = world or World()
    batches = RecordBatches(
        records,
        config.seed,
        config.batch_tokens,
        sequence_length or config.batch_tokens // (config.microbatches * here.data_size),
        config.microbatches,
        here.data_rank,
        here.data_size,
    )
    given = SeededBatches(batches, config.seed, here.rank) if seeded else batches
    return train(model, given, config, folder, report, evaluate, world)


class SeededBatches:
    """Batches that set the random numbers of dropout before each step."""

    def __init__(self, batches: Callable[[int], Sequence[Batch]], seed: int, rank: int) -> None:
        self._batches, self._seed, self._rank = batches, seed, rank

    def __call__(self, step: int) -> Sequence[Batch]:
        torch.manual_seed(number(2**63, self._seed, step, self._rank))
        return self._batches(step)


def worked_solutions(
    task: Task,
    levels: Sequence[int],
    count: int,
    seed: int,
    fast_every: int,
    tokenizer: Tokenizer,
    hurried: float = 0.0,
) -> list[TokenisedRecord]:
    """Return worked solutions of training problems, ready to be learned; see `tasks.solution_records`."""
    return tokenise(tokenizer, solution_records(task, levels, count, seed, fast_every, hurried))
