"""A teacher of on-policy distillation: what another model thinks of the tokens that the student wrote.

Distillation is reinforcement learning whose advantages come from a model, a token at a time, instead of a reward, or
beside one. So rollouts, updates and all else are those of `reinforce`; only what is here is its own.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from liaoyuan.checkpoint import load_model
from liaoyuan.data import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder
from liaoyuan.tuning.losses import generalised_divergence, teacher_advantages
from liaoyuan.tuning.packing import PackedRollouts, Packs
from liaoyuan.tuning.policy_log_probs import CHUNK, policy_hidden, policy_log_probs
from liaoyuan.tuning.recipe import ReinforceConfig


def open_teacher(folder: Path, student: Path, device: torch.device) -> Decoder:
    """Return the model in `folder`, which is not trained.

    Raises:
        LiaoyuanError: a token of the student is another one for the teacher.
    """
    ours, theirs = Tokenizer.load(student), Tokenizer.load(folder)
    for index in range(ours.vocab_size):
        if ours.spelling(index) != theirs.spelling(index):
            raise LiaoyuanError(
                f"{folder} cannot teach {student}: token {index} is {theirs.spelling(index)!r} for the teacher and "
                f"{ours.spelling(index)!r} for the student. Log-probabilities need one vocabulary: choose a teacher of "
                "the same family, or learn from its answers (liaoyuan tune sample, then tune sft)."
            )
    return load_model(folder, device=device).eval().requires_grad_(False)


@torch.no_grad()
def advise(teacher: Decoder, packs: Packs, config: ReinforceConfig) -> tuple[Packs, dict[str, float]]:
    """Return the minibatches with what the teacher thinks added to each token's advantage, and how far the two are
    apart: an estimate of KL(student || teacher), nats a token.
    """
    parts = [part for minibatch in packs for part in minibatch]
    found = [teacher_advantages(policy_log_probs(teacher, one, config), one.rollout_log_probs) for one in parts]
    added = iter(found)
    advised = [
        [replace(one, advantages=one.advantages + config.teacher_weight * next(added)) for one in minibatch]
        for minibatch in packs
    ]
    return advised, {"teacher_divergence": -float(torch.cat(found).mean())} if found else {}


def divergences(
    model: Decoder, hidden: Tensor, teacher: Decoder, part: PackedRollouts, config: ReinforceConfig
) -> Tensor:
    """Return how far the two whole distributions are apart at each token, fp32 [R]; differentiable in the student.

    hidden: of the student, see `policy_hidden`. What is not in both vocabularies is left out.
    """
    with torch.no_grad():
        theirs = policy_hidden(teacher, part)
    size, found = max(1, CHUNK // model.config.vocab_size), list[Tensor]()
    for begin in range(0, len(hidden), size):
        chunk = slice(begin, begin + size)
        arguments = (model, hidden[chunk], teacher, theirs[chunk], config.beta)
        found.append(checkpoint(_of_rows, *arguments, use_reentrant=False))  # else all logits would be kept
    return torch.cat(found)


def _of_rows(model: Decoder, hidden: Tensor, teacher: Decoder, theirs: Tensor, beta: float) -> Tensor:
    shared = min(model.config.vocab_size, teacher.config.vocab_size)
    student, other = (
        one.logits(rows)[:, :shared].float().log_softmax(-1) for one, rows in ((model, hidden), (teacher, theirs))
    )
    return generalised_divergence(student, other, beta)
