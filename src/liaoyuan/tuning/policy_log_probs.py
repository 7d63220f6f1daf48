"""The log-probabilities of rollouts under the weights that are trained, whatever they were drawn from.

Drawn from the model's own distribution, they are those of the loss head. Drawn at another temperature, or from a few
tokens alone (top-k, top-p, a thought that had to end), each is normalised over the very tokens that could have been
drawn there, which the engine reported: else the ratio to the rollout is biased from the first update on.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from liaoyuan.inference.sampling import kept_log_probs, kept_scores
from liaoyuan.models import Decoder
from liaoyuan.ops import log_sum_exp
from liaoyuan.tuning.packing import PackedRollouts
from liaoyuan.tuning.recipe import ReinforceConfig

CHUNK = 2**24  # logits that are there at once: 64 MiB in fp32


def policy_log_probs(model: Decoder, part: PackedRollouts, config: ReinforceConfig) -> Tensor:
    """Return the log-probability of each target under what it was drawn from, fp32 [R]; differentiable."""
    return log_probs_of(model, policy_hidden(model, part), part, config)


def policy_hidden(model: Decoder, part: PackedRollouts) -> Tensor:
    """Return what the model's head reads before each target, [R, H]."""
    found: Tensor = model(part.tokens, part.positions, part.context, rows=part.rows, hidden=True)
    return found


def log_probs_of(model: Decoder, hidden: Tensor, part: PackedRollouts, config: ReinforceConfig) -> Tensor:
    """Return `policy_log_probs` of what `policy_hidden` gave."""
    if config.draws_raw:
        return model.score(hidden, part.targets)
    size, values = max(1, CHUNK // model.config.vocab_size), []
    for begin in range(0, len(hidden), size):
        chunk = slice(begin, begin + size)
        allowed = None if part.allowed is None else part.allowed[chunk]
        arguments = (model, hidden[chunk], part.targets[chunk], allowed, config.temperature)
        values.append(checkpoint(_of_rows, *arguments, use_reentrant=False))  # else all logits would be kept
    return torch.cat(values)


def _of_rows(model: Decoder, hidden: Tensor, targets: Tensor, allowed: Tensor | None, temperature: float) -> Tensor:
    heat = torch.full((len(hidden),), temperature, device=hidden.device)
    found: Tensor = _KeptLogProbs.apply(model.logits(hidden), targets, heat, allowed)
    return found


class _KeptLogProbs(torch.autograd.Function):
    """`kept_log_probs`, with the gradient of a softmax: (1 - p) / T for the target, -p / T for what else is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: Tensor, allowed: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, targets, temperature, allowed)
        return kept_log_probs(logits, targets, temperature, allowed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, temperature, allowed = ctx.saved_tensors
        scores = kept_scores(logits, temperature, allowed)
        slope = -(scores - log_sum_exp(scores)[:, None]).exp()
        slope.scatter_add_(1, targets[:, None], torch.ones_like(slope[:, :1]))
        return (slope * (grads[0] / temperature)[:, None]).to(logits.dtype), None, None, None
