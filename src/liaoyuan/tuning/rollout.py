"""Rollouts: what the policy answers to fresh problems, in the engine, on the weights that are trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from liaoyuan.data import Tokenizer
from liaoyuan.evaluation import completions_of, prompt_of, read_rollout
from liaoyuan.inference import Completion, Engine, SamplingParams
from liaoyuan.models import PackedContext, packed_context
from liaoyuan.rundir import silent
from liaoyuan.tasks import Problem, Reward, Rollout, Score, score_all

MICROBATCH_TOKENS = 4096  # rollouts are packed up to so many tokens a forward pass


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


@dataclass(frozen=True)
class PackedRollouts:
    """Rollouts one after another as the model reads them; all tensors [N] but the context, boundaries and allowed.

    mask is 1 where the target was generated; rollout_log_probs and advantages are 0 elsewhere.
    boundaries: int64 [M + 1] of the M rollouts. allowed: which tokens could have been drawn at each place where the
    mask is 1, as bits, int32 [mask.sum(), ceil(V / 32)]; None: all of them.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    context: PackedContext
    mask: Tensor
    rollout_log_probs: Tensor
    advantages: Tensor
    boundaries: Tensor
    allowed: Tensor | None


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


def pack(rollouts: Rollouts, advantages: Tensor, kept: Tensor, device: torch.device) -> Iterator[PackedRollouts]:
    """Yield the kept rollouts, packed; advantages fp32 [P, G], kept bool [P, G]."""
    chosen = [place for place, kept_ in enumerate(kept.flatten().tolist()) if kept_]
    sizes = [_size(rollouts, place) for place in chosen]
    for run in _runs(sizes):
        yield _pack([chosen[index] for index in run], rollouts, advantages, device)


def _pack(chosen: Sequence[int], rollouts: Rollouts, advantages: Tensor, device: torch.device) -> PackedRollouts:
    tokens, targets, mask, log_probs, values = [], [], [], [], []
    allowed = list[np.ndarray]()
    flat = advantages.flatten().tolist()
    for place in chosen:
        prompt, one = rollouts.prompts[place // rollouts.group], rollouts.completions[place]
        ids, silent_ = [*prompt, *one.tokens], len(prompt) - 1
        tokens += ids[:-1]
        targets += ids[1:]
        mask += [0.0] * silent_ + [1.0] * len(one.tokens)
        log_probs += [0.0] * silent_ + one.logprobs
        values += [0.0] * silent_ + [flat[place]] * len(one.tokens)
        allowed += one.masks
    sizes = [_size(rollouts, place) for place in chosen]
    positions, context = packed_context(sizes, device)
    reals = [torch.tensor(column, dtype=torch.float32, device=device) for column in (mask, log_probs, values)]
    return PackedRollouts(
        tokens=torch.tensor(tokens, device=device),
        positions=positions,
        targets=torch.tensor(targets, device=device),
        context=context,
        mask=reals[0],
        rollout_log_probs=reals[1],
        advantages=reals[2],
        boundaries=torch.tensor([0, *np.cumsum(sizes)], device=device),
        allowed=torch.from_numpy(np.stack(allowed)).to(device) if allowed else None,
    )


def _size(rollouts: Rollouts, place: int) -> int:
    return len(rollouts.prompts[place // rollouts.group]) + len(rollouts.completions[place].tokens) - 1


def _runs(sizes: Sequence[int]) -> Iterator[range]:
    """Yield ranges of places whose sizes add up to at most `MICROBATCH_TOKENS`."""
    begin = total = 0
    for place, size in enumerate(sizes):
        if place > begin and total + size > MICROBATCH_TOKENS:
            yield range(begin, place)
            begin, total = place, 0
        total += size
    if begin < len(sizes):
        yield range(begin, len(sizes))
