"""Losses of preferences, one value a pair [P], or an answer [A].

`chosen` and `rejected` are log-probabilities of whole answers in nats: sums over their tokens, or means where it is
said; `reference_*` are the same of the model that training starts from.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

SURE = -1e-6  # a mean log-probability above it counts as this one: the odds of certainty are infinite


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return DPO's loss (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) of sums of log-probabilities.

    -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h), h = log(pi(c)/ref(c)) - log(pi(r)/ref(r)); s > 0 is the
    share of pairs that are taken to be the wrong way round (conservative DPO, Mitchell 2023), and then the loss is
    least at a finite h, where sigmoid(beta h) = 1 - s.
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -(1.0 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def ipo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, tau: float = 0.1
) -> Tensor:
    """Return IPO's loss (Azar et al. 2023, arXiv 2310.12036, eq. 17): (h - 1 / (2 tau))^2, h as in `dpo_loss`.

    Also of means of log-probabilities, as is common since long answers would else hardly move.
    """
    h = (chosen - reference_chosen) - (rejected - reference_rejected)
    return (h - 1.0 / (2.0 * tau)).square()


def kto_loss(
    log_probs: Tensor,
    reference: Tensor,
    liked: Tensor,
    divergence: Tensor | float,
    beta: float = 0.1,
    liked_weight: float = 1.0,
    disliked_weight: float = 1.0,
) -> Tensor:
    """Return KTO's loss (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8) of answers that are liked or not, bool [A].

    lambda (1 - sigmoid(+-beta (r - z))), + for those that are liked; r = log(pi / ref), z the `divergence`
    KL(pi || ref), which is no part of the gradient: it is estimated from answers to other prompts and never negative.
    """
    sign = torch.where(liked, 1.0, -1.0)
    value = torch.sigmoid(sign * beta * (log_probs - reference - divergence))
    return torch.where(liked, liked_weight, disliked_weight) * (1.0 - value)


def log_odds(log_probs: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log p; 1 - p is taken without cancellation (Maechler 2012, log1mexp)."""
    x = log_probs.clamp(max=SURE)
    near = x > -math.log(2.0)
    # Each branch is given what is harmless to it where the other one counts: 0 * inf is no gradient.
    small = torch.log(-torch.expm1(x.clamp(min=-math.log(2.0))))
    large = torch.log1p(-torch.exp(x.clamp(max=-math.log(2.0))))
    return x - torch.where(near, small, large)


def orpo_loss(chosen: Tensor, rejected: Tensor, weight: float = 0.1) -> Tensor:
    """Return ORPO's loss (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7) of means of log-probabilities.

    -log p(c) - weight log sigmoid(log odds(c) - log odds(r)): fine-tuning on what is chosen, away from the other.
    """
    return -chosen - weight * logsigmoid(log_odds(chosen) - log_odds(rejected))


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 2.0, margin: float = 1.0) -> Tensor:
    """Return SimPO's loss (Meng et al. 2024, arXiv 2405.14734, eq. 6) of means of log-probabilities.

    -log sigmoid(beta (log p(c) - log p(r)) - margin), without a reference.
    """
    return -logsigmoid(beta * (chosen - rejected) - margin)


def reward_model_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the loss of rewards under the model of Bradley and Terry (1952): -log sigmoid(r(c) - r(r)).

    Ouyang et al. 2022, arXiv 2203.02155, eq. 1.
    """
    return -logsigmoid(chosen - rejected)
