"""What the rollouts of a step show, as numbers of `metrics.jsonl`: pure functions of rollouts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from liaoyuan.models import Decoder
from liaoyuan.tuning.losses import kl_estimate
from liaoyuan.tuning.policy_log_probs import policy_log_probs
from liaoyuan.tuning.recipe import ReinforceConfig
from liaoyuan.tuning.rollout import Rollouts, pack
from liaoyuan.tuning.update import teaches


def measure_rollouts(rollouts: Rollouts, config: ReinforceConfig) -> dict[str, Any]:
    """Return the measures of a step's rollouts; a mean of nothing is left out.

    reward: mean of those that could be judged; `unjudged` is the share of the others. no_signal: share of groups that
    teach nothing; all_right, all_wrong: of all groups, those of them in which all judged answers are right, or none is.
    truncated: share that met the limit of tokens; unparsed: share of the others in which no answer was found. entropy:
    of the policy in nats a token, estimated by the mean of -log p over its own samples.
    """
    judged, right, count = rollouts.judged, rollouts.right, len(rollouts.completions)
    silent = ~teaches(rollouts, config)
    truncated = [one.finish_reason == "length" for one in rollouts.completions]
    unparsed = [score.parsed is None for score in rollouts.scores]
    lengths = torch.tensor([len(one.tokens) for one in rollouts.completions]).view_as(rollouts.rewards).float()
    means = {
        "reward": rollouts.rewards[judged],
        "length_right": lengths[right],
        "length_wrong": lengths[judged & ~right],
    }
    return {name: float(values.mean()) for name, values in means.items() if len(values)} | {
        "unjudged": 1.0 - float(judged.float().mean()),
        "no_signal": float(silent.float().mean()),
        "all_right": float((silent & judged.any(1) & (right | ~judged).all(1)).float().mean()),
        "all_wrong": float((silent & judged.any(1) & ~right.any(1)).float().mean()),
        "truncated": sum(truncated) / count,
        "unparsed": sum(bad and not cut for bad, cut in zip(unparsed, truncated, strict=True)) / count,
        "length": rollouts.generated_tokens / count,
        "thought_length": sum(one.thought_length for one in rollouts.answers) / count,
        "entropy": -sum(sum(one.logprobs) for one in rollouts.completions) / max(1, rollouts.generated_tokens),
        "one_answer": one_answer(rollouts),
        "copied": copied(rollouts),
    }


def one_answer(rollouts: Rollouts) -> float:
    """Return the share of rollouts that give the most usual answer where another one is right."""
    texts = [answer.text.strip() for answer in rollouts.answers]
    given = [text for text, answer in zip(texts, rollouts.answers, strict=True) if text != answer.problem.answer]
    usual = Counter(text for text in given if text).most_common(1)
    return usual[0][1] / len(texts) if usual else 0.0


def copied(rollouts: Rollouts) -> float:
    """Return the share of rollouts whose answer stands in the question, where the right one does not."""
    return sum(
        bool(text := answer.text.strip())
        and text in answer.problem.question
        and answer.problem.answer not in answer.problem.question
        for answer in rollouts.answers
    ) / len(rollouts.answers)


@torch.no_grad()
def kl_to(start: Decoder, rollouts: Rollouts, config: ReinforceConfig) -> float:
    """Return KL(policy || start) in nats a token, estimated on the first sample of each problem.

    The estimator k3, see `kl_estimate`, is never negative.
    """
    chosen = torch.zeros_like(rollouts.judged)
    chosen[:, 0] = True
    total = count = 0.0
    for part in pack(rollouts, torch.zeros_like(rollouts.rewards), chosen, start.embed_tokens.weight.device):
        log_probs = policy_log_probs(start, part, config)
        total += float((kl_estimate(part.rollout_log_probs, log_probs) * part.mask).sum())
        count += float(part.mask.sum())
    return total / max(1.0, count)


def solved_shares(rollouts: Rollouts) -> list[float]:
    """Return the share of each group's judged samples that is right; nan where none could be judged."""
    judged = rollouts.judged.sum(1)
    found: Sequence[float] = (rollouts.right.sum(1) / judged).tolist()
    return list(found)
