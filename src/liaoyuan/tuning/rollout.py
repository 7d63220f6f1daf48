"""Rollouts: what the policy answers to fresh problems, in the engine, on the weights that are trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liaoyuan.data import Tokenizer
from liaoyuan.evaluation import completions_of, prompt_of, read_rollout
from liaoyuan.inference import Completion, Engine, SamplingParams
from liaoyuan.rundir import silent
from liaoyuan.tasks import Problem, Reward, Rollout, Score, score_all


@dataclass(frozen=True)
class Rollouts:
    """P problems with G completions each (problem-major), and their rewards fp32 [P, G].

    answers and scores: of each completion, as it was read and what it was worth. A reward is its score's value, less
    what its length costs; 0 where the score has none, which `judged` tells.
    """

    problems: list[Problem]
    prompts: list[tuple[int, ...]]
    completions: list[Completion]
    answers: list[Rollout]
    scores: list[Score]
    rewards: Tensor

    @property
    def group(self) -> int:
        return self.rewards.shape[1]

    @property
    def judged(self) -> Tensor:
        """Which completions have a score with a value, bool [P, G]; the others teach nothing."""
        return torch.tensor([score.value is not None for score in self.scores]).view_as(self.rewards)

    @property
    def right(self) -> Tensor:
        """Which completions are right, bool [P, G]."""
        return torch.tensor([score.is_right for score in self.scores]).view_as(self.rewards)

    @property
    def prompt_tokens(self) -> int:
        return self.group * sum(map(len, self.prompts))

    @property
    def generated_tokens(self) -> int:
        return sum(len(completion.tokens) for completion in self.completions)


def roll_out(
    engine: Engine,
    tokenizer: Tokenizer,
    reward: Reward,
    problems: list[Problem],
    group: int,
    seed: int,
    max_tokens: int,
    sampling: SamplingParams | None = None,
    overlong_tokens: int = 0,
    first: int = 0,
) -> Rollouts:
    """Answer every problem `group` times, and reward the answers.

    sampling: how; at temperature 1 with nothing filtered if None. overlong_tokens: see `overlong_penalty`.
    first: see `completions_of`.
    """
    drawn = sampling or SamplingParams()
    completions = completions_of(
        engine, tokenizer, problems, group, drawn.temperature, True, seed, max_tokens, silent, drawn, first
    )
    answers = [read_rollout(tokenizer, problems[place // group], one) for place, one in enumerate(completions)]
    (scores,) = score_all([reward], answers)
    rewards = torch.tensor([score.value or 0.0 for score in scores])
    if overlong_tokens:
        lengths = torch.tensor([len(one.tokens) for one in completions])
        rewards += overlong_penalty(lengths, max_tokens, overlong_tokens)
    prompts = [prompt_of(tokenizer, problem) for problem in problems]
    return Rollouts(problems, prompts, completions, answers, scores, rewards.view(len(problems), group))


def overlong_penalty(lengths: Tensor, most: int, margin: int) -> Tensor:
    """Return what the length of answers costs, fp32 in [-1, 0]: nothing up to most - margin tokens, then linearly more.

    Soft overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13).
    """
    return ((most - margin - lengths) / margin).clamp(-1.0, 0.0)


def join(parts: Sequence[Rollouts]) -> Rollouts:
    """Return several draws of rollouts as one."""
    if len(parts) == 1:
        return parts[0]
    names = ("problems", "prompts", "completions", "answers", "scores")
    lists = {name: [item for part in parts for item in getattr(part, name)] for name in names}
    return Rollouts(**lists, rewards=torch.cat([part.rewards for part in parts]))
