"""Supervised fine-tuning: the training loop over conversations of which the assistant's tokens are learned."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from liaoyuan.data import RecordBatches, TokenisedRecord, Tokenizer, tokenise
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
) -> TrainResult:
    """Fine-tune `model` in place on tokenised records, going on from `folder` if it holds a state; see `train`.

    Records are packed into rows of `sequence_length` tokens (one row a batch if None). Where it is given, any number
    of processes that divides the rows of a batch gets the same batches.
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
    return train(model, batches, config, folder, report, evaluate, world)


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
