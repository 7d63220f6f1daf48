"""Losses of policy gradients, in four parts that go together freely: advantages, a surrogate of the ratio, weights of
tokens, and corrections for rollouts whose log-probabilities are not those of training.

Tokens are packed: [N], in documents whose `boundaries`, int [M + 1], rise from 0 to N. `mask` is 1 where a token was
generated. Losses are sums, which the caller divides by what the whole update has; see `token_weights`.

`generalised_advantages` and `value_loss` are what PPO has beside these, for its critic.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from liaoyuan.tuning.losses.sums import spread, sums

Aggregation = Literal["token", "sequence", "constant"]


def group_advantages(rewards: Tensor, normalise: bool = True) -> Tensor:
    """Return each sample's advantage over its group: rewards [P, G] -> [P, G], zero for a group of equal rewards.

    A = (r - mean(r)) / std(r), GRPO (Shao et al. 2024, arXiv 2402.03300, sec. 4.1.2); without the division it is
    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, sec. 3.2), which gives hard and easy problems their own weight.
    """
    # A mean of equal numbers may be off in its last bit, which the division would make much of.
    centred = torch.where(has_signal(rewards)[:, None], rewards - rewards.mean(1, keepdim=True), 0.0)
    return centred / rewards.std(1, keepdim=True, correction=0).clamp(min=1e-6) if normalise else centred


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """Return each sample's reward less the mean of the others of its group: rewards [P, G] -> [P, G].

    RLOO (Ahmadian et al. 2024, arXiv 2402.14740, sec. 2.3; Kool et al. 2019): an unbiased baseline.
    """
    group = rewards.shape[1]
    return group_advantages(rewards, normalise=False) * (group / (group - 1))


def batch_advantages(rewards: Tensor) -> Tensor:
    """Return rewards [P, G] normalised over the whole batch, zero if all are equal.

    REINFORCE++ (Hu 2025, arXiv 2501.03262, sec. 3): A = (r - mean) / std, both over all samples.
    """
    return group_advantages(rewards.view(1, -1)).view_as(rewards)


def generalised_advantages(
    rewards: Tensor, values: Tensor, boundaries: Sequence[int], discount: float = 1.0, decay: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, both [N], of generated tokens with rewards [N] and a critic's values [N].

    GAE (Schulman et al. 2015, arXiv 1506.02438, eq. 16): A_t = sum over l of (discount decay)^l delta_{t + l},
    delta_t = r_t + discount V_{t + 1} - V_t, and nothing follows a document's last token. Returns are A + V.
    """
    gains, expected = rewards.double().tolist(), values.detach().double().tolist()
    found = [0.0] * len(gains)
    for begin, end in itertools.pairwise(boundaries):
        advantage = following = 0.0
        for place in reversed(range(begin, end)):
            delta = gains[place] + discount * following - expected[place]
            advantage = delta + discount * decay * advantage
            found[place], following = advantage, expected[place]
    advantages = torch.tensor(found, dtype=rewards.dtype, device=rewards.device)
    return advantages, advantages + values.detach()


def has_signal(rewards: Tensor) -> Tensor:
    """Return which groups teach something, bool [P]: not all of a group's rewards are equal.

    Dynamic sampling of DAPO (Yu et al. 2025, arXiv 2503.14476, sec. 3.2) without drawing again.
    """
    return rewards.max(1).values > rewards.min(1).values


def most_different(rewards: Tensor, count: int) -> Tensor:
    """Return which `count` samples of each group differ most in reward: rewards [P, G] -> bool [P, G].

    The subset of largest variance consists of the best and the worst ones (PODS: Xu et al. 2025, arXiv 2504.13818,
    theorem 1); among equals the first count as better, the last as worse. Each group keeps samples of both kinds if
    it has them.
    """
    order = rewards.argsort(dim=1, descending=True, stable=True)
    ranked = rewards.gather(1, order)
    best, variance = torch.zeros_like(rewards, dtype=torch.bool), torch.full_like(rewards[:, :1], -1.0)
    for high in range(count + 1):
        mask = torch.zeros_like(best)
        mask[:, :high] = True
        mask[:, rewards.shape[1] - (count - high) :] = True
        found = ranked.masked_select(mask).view(-1, count).var(1, correction=0)[:, None]
        best = torch.where(found > variance, mask, best)
        variance = torch.maximum(found, variance)
    return torch.zeros_like(best).scatter(1, order, best)


def clipped_losses(log_ratio: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """Return each token's clipped loss [N]; log_ratio is that of the token, or `sequence_log_ratio`.

    -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = exp(log_ratio): PPO's surrogate (Schulman et al. 2017,
    arXiv 1707.06347, eq. 7) with DAPO's wider upper clip (arXiv 2503.14476, eq. 8).
    """
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)


def sequence_log_ratio(log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, boundaries: Tensor) -> Tensor:
    """Return for each token the mean log-ratio of its document's generated tokens, [N].

    GSPO (Zheng et al. 2025, arXiv 2507.18071, eq. 7): log s = log(pi(y|x) / old(y|x)) / |y|. It goes with clips of
    about 3e-4 and 4e-4, and with the weights "sequence".
    """
    total = sums((log_probs - rollout_log_probs) * mask, boundaries)
    return spread(total / sums(mask, boundaries).clamp(min=1.0), boundaries)


def cispo_losses(
    log_probs: Tensor,
    rollout_log_probs: Tensor,
    advantages: Tensor,
    clip_low: float = float("inf"),
    clip_high: float = 0.28,
) -> Tensor:
    """Return each token's loss [N] with a clipped weight: every token keeps a gradient.

    -stop(clip(rho, 1 - clip_low, 1 + clip_high)) A log pi: CISPO (MiniMax 2025, arXiv 2506.13585, eq. 4 and 5), which
    has no lower clip as a rule.
    """
    ratio = (log_probs - rollout_log_probs).detach().exp()
    return -ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages * log_probs


def token_weights(mask: Tensor, boundaries: Tensor, aggregation: Aggregation, constant: float = 1.0) -> Tensor:
    """Return what each token's loss counts in the sum, [N].

    "token": alike; divide the sum by the generated tokens of the update (DAPO, arXiv 2503.14476, eq. 8).
    "sequence": one over its document's generated tokens; divide by the documents (GRPO, arXiv 2402.03300, eq. 3).
    "constant": one over `constant`, the longest answer that is allowed; divide by the documents (Dr. GRPO, arXiv
    2503.20783, sec. 3.2): long wrong answers are not spared.
    """
    if aggregation == "token":
        return mask
    if aggregation == "constant":
        return mask / constant
    return mask * spread(1.0 / sums(mask, boundaries).clamp(min=1.0), boundaries)


def truncated_weights(log_ratio: Tensor, cap: float = 2.0) -> Tensor:
    """Return min(exp(log_ratio), cap), no part of the gradient: truncated importance weights (Ionides 2008).

    log_ratio: of training's log-probability before the update to the rollout's. A token's, or the sum over its
    document's tokens. Without a bias where the ratio is below the cap.
    """
    return log_ratio.detach().exp().clamp(max=cap)


def kl_estimate(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Return an estimate of KL(pi || reference) at each sampled token [N], never negative and unbiased.

    ref / pi - log(ref / pi) - 1 (Schulman 2020; GRPO, arXiv 2402.03300, eq. 4).
    """
    log_ratio = reference - log_probs
    return log_ratio.exp() - log_ratio - 1.0


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2) -> Tensor:
    """Return a critic's loss of each token [N]: half the larger squared error of the value, and of the value kept
    within `clip` of what it was at the rollout (PPO's implementation: Schulman et al. 2017, arXiv 1707.06347).
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())
