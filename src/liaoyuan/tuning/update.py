"""What a step learns from its rollouts: minibatches of groups, an update each, and the measures of these updates."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liaoyuan.models import Decoder
from liaoyuan.training.optimiser import Optimiser
from liaoyuan.tuning.critic import Critic
from liaoyuan.tuning.losses import (
    batch_advantages,
    cispo_losses,
    clipped_losses,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    most_different,
    sequence_log_ratio,
    token_weights,
    truncated_weights,
)
from liaoyuan.tuning.packing import PackedRollouts, Packs, pack
from liaoyuan.tuning.policy_log_probs import log_probs_of, policy_hidden, policy_log_probs
from liaoyuan.tuning.recipe import ReinforceConfig
from liaoyuan.tuning.rollout import Rollouts
from liaoyuan.tuning.teacher import divergences


@dataclass(frozen=True)
class Lesson:
    """What of P groups is learned: the groups bool [P], their samples bool [P, G], the advantages fp32 [P, G]."""

    groups: Tensor
    samples: Tensor
    advantages: Tensor


def teaches(rollouts: Rollouts, config: ReinforceConfig) -> Tensor:
    """Return which groups teach something, bool [P]: those whose judged samples do not all have one reward.

    REINFORCE++ has its baseline over the whole batch, so that every judged group teaches if any does. A critic learns
    from every judged group, and a teacher has something to say of every one.
    """
    judged, rewards = rollouts.judged, rollouts.rewards
    if config.teacher_weight:
        return torch.ones(len(judged), dtype=torch.bool)
    if config.advantage == "gae":
        return judged.any(1)
    high, low = (torch.where(judged, rewards, fill) for fill in (-torch.inf, torch.inf))
    differ = high.max(1).values > low.min(1).values
    if config.advantage == "reinforce_pp" and judged.any():
        return judged.any(1) & bool(high.max() > low.min())
    return differ


def lesson_of(rollouts: Rollouts, config: ReinforceConfig) -> Lesson:
    """Return what rollouts teach. What could not be judged leaves its group, unless there is a teacher, who does not
    ask; one judged sample teaches nothing. Of a group the most different are learned, but with a critic all: it would
    else expect the mean of extremes.
    """
    rewards, groups = rollouts.rewards, teaches(rollouts, config)
    useful = torch.ones_like(rollouts.judged) if config.teacher_weight else rollouts.judged
    samples, counts = torch.zeros_like(useful), useful.sum(1)
    for count in counts[groups].unique().tolist():  # as a rule there is one: all are judged
        rows = groups & (counts == count)
        own = useful[rows]
        most = count if config.advantage == "gae" else min(config.update_group, count)
        best = most_different(rewards[rows][own].view(-1, count), most)
        samples[rows] = torch.zeros_like(own).masked_scatter(own, best)
    return Lesson(groups, samples, advantages_of(rewards, samples & rollouts.judged, config))


def advantages_of(rewards: Tensor, samples: Tensor, config: ReinforceConfig) -> Tensor:
    """Return the advantages of the samples bool [P, G] over each other, fp32 [P, G]; 0 for all else.

    For a critic they are what the samples earned, of which it makes advantages of tokens.
    """
    if config.advantage == "gae":
        return torch.where(samples, rewards, 0.0)
    if config.advantage == "none":
        return torch.zeros_like(rewards)
    if config.advantage == "reinforce_pp" and samples.any():
        values = batch_advantages(rewards[samples][None])
        return torch.zeros_like(rewards).masked_scatter(samples, values)
    found, counts = torch.zeros_like(rewards), samples.sum(1)
    for count in counts[counts > 1].unique().tolist():
        rows = counts == count
        own = samples[rows]
        within = rewards[rows][own].view(-1, count)
        if config.advantage == "rloo":
            values = leave_one_out_advantages(within)
        else:
            values = group_advantages(within, config.advantage == "grpo")
        found[rows] = torch.zeros_like(found[rows]).masked_scatter(own, values)
    return found


def packs_of(rollouts: Rollouts, lesson: Lesson, config: ReinforceConfig, device: torch.device) -> Packs:
    """Return what is learned, packed, of each minibatch; nothing if too few groups have signal."""
    if int(lesson.groups.sum()) < config.minimum_groups:
        return []
    parts = minibatches(lesson.groups, config.minibatches, config.minibatch_groups)
    return [list(pack(rollouts, lesson.advantages, lesson.samples & part[:, None], device)) for part in parts]


def by_token(lesson: Lesson, packs: Packs) -> Lesson:
    """Return the lesson with the mean advantage of each answer's tokens as its own, where tokens have one each."""
    if not packs:
        return lesson
    parts = [part for minibatch in packs for part in minibatch]
    answers = [own for part in parts for own in part.advantages.split(part.boundaries.diff().tolist())]
    means = torch.stack([own.mean() for own in answers]).cpu()
    return replace(lesson, advantages=lesson.advantages.masked_scatter(lesson.samples, means))


def learn(
    model: Decoder,
    optimiser: Optimiser,
    packs: Packs,
    config: ReinforceConfig,
    rate: float,
    corrected: bool = False,
    teacher: Decoder | None = None,
    critic: Critic | None = None,
) -> dict[str, Any]:
    """Learn from what was packed, a minibatch an update; return measures.

    corrected: weigh each token by the truncated ratio of training's probability before the first update to the
        rollout's, and take the ratio of the loss to the former.
    teacher: whose whole distributions are learned beside, if `config.teacher_loss` says so. critic: learns too.
    """
    if not packs:
        return {"updates": 0}
    before = [[_before(model, one, config) for one in minibatch] for minibatch in packs] if corrected else None
    seen, norms = _Seen(), list[float]()
    for place, minibatch in enumerate(packs):
        total = sum(_share(one, config) for one in minibatch)
        for number, one in enumerate(minibatch):
            hidden = policy_hidden(model, one)
            log_probs = log_probs_of(model, hidden, one, config)
            old = before[place][number] if before else one.rollout_log_probs
            losses = _losses(log_probs, old, one, config, corrected)
            if teacher and config.teacher_loss == "whole":
                apart = divergences(model, hidden, teacher, one, config)
                losses = losses + config.teacher_weight * apart
                seen.note_divergence(apart.detach())
            (_weighed(losses, one, config) / total).backward()
            optimiser.accumulate()
            if critic:
                critic.learn(one, sum(float(len(part.rows)) for part in minibatch))
            seen.note(log_probs.detach(), old, one, config, first=place == 0)
        norms.append(optimiser.step(rate, config.clip))
        if critic:
            critic.step(rate)
    return {"updates": len(packs), "grad_norm": max(norms), "learning_rate": rate, **seen.measures()}


def minibatches(kept: Tensor, most: int, groups: int) -> Iterator[Tensor]:
    """Cut the kept groups, bool [P], in at most `most` parts of at least `groups` (if there are so many), bool [P]."""
    places = torch.nonzero(kept).flatten()
    for part in places.tensor_split(max(1, min(most, len(places) // groups))):
        yield torch.zeros_like(kept).index_fill(0, part, True)


@torch.no_grad()
def _before(model: Decoder, part: PackedRollouts, config: ReinforceConfig) -> Tensor:
    return policy_log_probs(model, part, config)


def _share(part: PackedRollouts, config: ReinforceConfig) -> float:
    """Return by how much the sum of a part's loss is divided: its generated tokens, or its rollouts."""
    return float(len(part.rows)) if config.aggregation == "token" else float(len(part.boundaries) - 1)


def _log_ratio(log_probs: Tensor, old: Tensor, part: PackedRollouts, config: ReinforceConfig) -> Tensor:
    if config.ratio == "sequence":
        return sequence_log_ratio(log_probs, old, torch.ones_like(old), part.boundaries)
    return log_probs - old


def _losses(log_probs: Tensor, old: Tensor, part: PackedRollouts, config: ReinforceConfig, corrected: bool) -> Tensor:
    advantages, low, high = part.advantages, config.clip_low, config.clip_high
    if corrected:
        advantages = advantages * truncated_weights(old - part.rollout_log_probs, config.importance_cap)
    if config.ratio == "cispo":
        return cispo_losses(log_probs, old, advantages, clip_high=high)
    return clipped_losses(_log_ratio(log_probs, old, part, config), advantages, low, high)


def _weighed(losses: Tensor, part: PackedRollouts, config: ReinforceConfig) -> Tensor:
    """Return the sum of the tokens' losses, each by what it counts."""
    counted = torch.ones_like(losses)
    return (losses * token_weights(counted, part.boundaries, config.aggregation, float(config.max_tokens))).sum()


class _Seen:
    """What the updates of a step show, gathered over their tokens."""

    def __init__(self) -> None:
        self._log_ratios = list[Tensor]()  # of training to rollout, before the first update
        self._apart = list[Tensor]()  # of student and teacher
        self._low = self._high = self._tokens = 0.0

    def note(self, log_probs: Tensor, old: Tensor, part: PackedRollouts, config: ReinforceConfig, first: bool) -> None:
        """first: of the step's updates; later ones meet weights that have moved on."""
        ratio, gain = _log_ratio(log_probs, old, part, config).exp(), part.advantages > 0
        self._low += float(((ratio < 1.0 - config.clip_low) & ~gain).sum())
        self._high += float(((ratio > 1.0 + config.clip_high) & gain).sum())
        self._tokens += len(ratio)
        if first:
            self._log_ratios.append(log_probs - part.rollout_log_probs)

    def note_divergence(self, apart: Tensor) -> None:
        self._apart.append(apart)

    def measures(self) -> dict[str, float]:
        log_ratios = torch.cat(self._log_ratios)
        gaps, ratios = log_ratios.abs().cpu().numpy(), log_ratios.exp()
        # In fp64, where a ratio that is hardly not 1 still leaves something of the divergence.
        divergence = kl_estimate(torch.zeros_like(log_ratios, dtype=torch.float64), log_ratios.double())
        return ({"teacher_divergence": float(torch.cat(self._apart).mean())} if self._apart else {}) | {
            "log_prob_gap": float(gaps.max()),
            "gap_mean": float(gaps.mean()),
            "gap_p99": float(np.quantile(gaps, 0.99)),
            "gap_kl": float(divergence.mean()),
            "ratio_min": float(ratios.min()),
            "ratio_max": float(ratios.max()),
            "clipped": (self._low + self._high) / self._tokens,
            "clipped_low": self._low / self._tokens,
            "clipped_high": self._high / self._tokens,
        }
