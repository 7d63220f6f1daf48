"""Losses of distillation on the student's own answers, one value a token [N]."""

import math

import torch
from torch import Tensor


def teacher_advantages(teacher: Tensor, student: Tensor) -> Tensor:
    """Return what a teacher thinks of each sampled token, log(teacher / student), no part of the gradient.

    Log-probabilities [N] of the tokens under both. Its mean over the student's own tokens is -KL(student || teacher),
    and as their advantage it gives the gradient of that divergence: the single-step part of MiniLLM's policy gradient
    (Gu et al. 2023, arXiv 2306.08543, sec. 2.2), of which on-policy distillation is made.
    """
    return (teacher - student).detach()


def generalised_divergence(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Return the divergence between two whole distributions at each place: log-probabilities [N, V] -> [N].

    beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student: the generalised
    Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv 2306.13649, sec. 2). At 0 it is KL(teacher || student)
    and at 1 KL(student || teacher), its limits but for a factor: the student spreads over all that the teacher might
    write, or keeps to what the teacher would write most likely.
    """
    if beta == 0.0:
        return _divergence(teacher, student)
    if beta == 1.0:
        return _divergence(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _divergence(teacher, mixture) + (1.0 - beta) * _divergence(student, mixture)


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return KL(first || second), [N]."""
    return (first.exp() * (first - second)).sum(-1)
