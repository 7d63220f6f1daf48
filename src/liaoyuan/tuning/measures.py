"""What the rollouts of a step show, as numbers of `metrics.jsonl`: pure functions of rollouts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from liaoyuan.models import Decoder
from liaoyuan.tuning.losses import kl_estimate
from liaoyuan.tuning.packing import pack
from liaoyuan.tuning.policy_log_probs import policy_log_probs
from liaoyuan.tuning.recipe import ReinforceConfig
from liaoyuan.tuning.rollout import Rollouts
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
    pairs = zip(_given(rollouts), rollouts.answers, strict=True)
    usual = Counter(given for given, answer in pairs if given and given != answer.problem.answer).most_common(1)
    return usual[0][1] / len(rollouts.answers) if usual else 0.0


def copied(rollouts: Rollouts) -> float:
    """Return the share of rollouts whose answer stands in the question, where the right one does not."""
    pairs = zip(_given(rollouts), (answer.problem for answer in rollouts.answers), strict=True)
    are = [given and given in problem.question and problem.answer not in problem.question for given, problem in pairs]
    return sum(map(bool, are)) / len(are)


def _given(rollouts: Rollouts) -> list[str]:
    """Return what the reward read as the answers, or what was written where it read nothing."""
    pairs = zip(rollouts.scores, rollouts.answers, strict=True)
    return [(score.parsed or answer.text).strip() for score, answer in pairs]


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
        total += float(kl_estimate(part.rollout_log_probs, log_probs).sum())
        count += len(part.rows)
    return total / max(1.0, count)


def solved_shares(rollouts: Rollouts) -> list[float]:
    """Return the share of each group's judged samples that is right; nan where none could be judged."""
    judged = rollouts.judged.sum(1)
    found: Sequence[float] = (rollouts.right.sum(1) / judged).tolist()
    return list(found)
