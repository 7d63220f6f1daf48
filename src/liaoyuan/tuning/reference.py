"""Log-probabilities of given answers under a laid-out model, and those of the model to begin with: computed once, or
for each batch where its adapters can be switched off.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from liaoyuan.data import Batch, RecordBatches, TokenisedRecord
from liaoyuan.models.lora import without_adapters
from liaoyuan.parallel import Program, World
from liaoyuan.rundir import Progress, Report, silent, write_atomic
from liaoyuan.tuning.losses import sums
from liaoyuan.tuning.preference_batches import AnswerBatch, AnswerBatches
from liaoyuan.tuning.start import Start

PASS_TOKENS = 4096  # of one forward pass, or one row if that is longer
NAME = "log_probs"


def answer_log_probs(
    program: Program, answers: Sequence[TokenisedRecord], length: int, world: World, report: Report = silent
) -> Tensor:
    """Return the sum of each answer's log-probabilities by their weights, fp32 [A], the same in every process.

    By the forward pass of training; `length`: of the rows into which answers are packed. Every process computes its
    share, in as many passes as the others.
    """
    batches = RecordBatches(answers, 0, length, length)
    rows = batches.fill(range(len(answers)))
    most, size = max(1, PASS_TOKENS // length), world.data_size
    passes = [rows[first : first + most] for first in range(0, len(rows), most)]
    found = [0.0] * len(answers)
    for turn in range(0, len(passes), size):
        own = passes[turn + world.data_rank] if turn + world.data_rank < len(passes) else []
        values = program.loss(batches.batch(own or [[]]), losses=_document_sums).tolist()
        for one, document in zip((one for row in own for one in row), batches.documents(own), strict=True):
            found[one] = values[document]
        report(Progress(min(turn + size, len(passes)), len(passes), "pass", "reference log-probabilities"))
    return torch.tensor(world.sum_numbers(*found), dtype=torch.float32)


def reference_log_probs(
    program: Program,
    start: Start,
    answers: Sequence[TokenisedRecord],
    length: int,
    world: World,
    folder: Path,
    report: Report = silent,
) -> Tensor:
    """Return `answer_log_probs` of a program that is what `start` says, kept in `folder`.

    What was computed once for the same weights, answers and number type is read again.
    """
    about = f"{next(iter(program.named_parameters()))[1].dtype} {start.bits}"
    name = content_hash(start.model, answers, about) if world.is_first else ""
    path = folder / f"reference-{world.broadcast(name)}.safetensors"
    there = world.broadcast(str(path.exists()) if world.is_first else "") == "True"
    if there:
        return load_file(path)[NAME]
    found = answer_log_probs(program, answers, length, world, report)
    if world.is_first:
        write_atomic(path, save({NAME: found}))
    world.barrier()
    return found


class ReferredBatches:
    """Batches of answers with their reference, which the program gives with its adapters off: the same pass over the
    same rows, so that adapters that have learned nothing have a margin of exactly 0.
    """

    def __init__(self, batches: AnswerBatches, program: Program) -> None:
        self._batches, self._program = batches, program

    def __call__(self, step: int) -> list[AnswerBatch]:
        """Return this process's microbatches of the global batch `step`. Every process makes the call."""
        return [self.of(batch) for batch in self._batches(step)]

    def of(self, batch: AnswerBatch) -> AnswerBatch:
        """Return a batch with its reference."""
        with without_adapters(self._program.models):
            found = self._program.loss(batch, losses=_document_sums).cpu()[batch.documents]
            apart = -float(self._program.loss(batch.strangers)) if batch.strangers else 0.0
        return replace(batch, reference=found, strangers_reference=apart)


def content_hash(model: Path, answers: Sequence[TokenisedRecord], more: str) -> str:
    """Return a hash of a model folder's weights and config, of answers, and of `more`."""
    digest = hashlib.blake2b(more.encode(), digest_size=12)
    for file in sorted([*model.glob("*.safetensors"), model / "config.json"]):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    for answer in answers:
        digest.update(str((answer.tokens, answer.weights)).encode())
    return digest.hexdigest()


def _document_sums(log_probs: Tensor, batch: Batch) -> Tensor:
    return sums(log_probs * batch.weights.to(log_probs.device), batch.boundaries.to(log_probs.device))
