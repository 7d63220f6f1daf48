"""Rollouts: what the policy answers to fresh problems, in the engine, on the weights that are trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liaoyuan.data import Tokenizer
from liaoyuan.evaluation import completions_of, prompt_of, read_rollout
from liaoyuan.inference import Completion, Engine
from liaoyuan.models import PackedContext, packed_context
from liaoyuan.tasks import Problem, Reward, Rollout, Score

MICROBATCH_TOKENS = 4096  # rollouts are packed up to so many tokens a forward pass


@dataclass(frozen=True)
class Rollouts:
    """P problems with G completions each (problem-major), and their rewards fp32 [P, G].

    answers and scores: of each completion, as it was read and what it was worth.
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
    def prompt_tokens(self) -> int:
        return self.group * sum(map(len, self.prompts))

    @property
    def generated_tokens(self) -> int:
        return sum(len(completion.tokens) for completion in self.completions)


@dataclass(frozen=True)
class PackedRollouts:
    """Rollouts one after another as the model reads them; all tensors [N] but the context.

    mask is 1 where the target was generated; rollout_log_probs and advantages are 0 elsewhere.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    context: PackedContext
    mask: Tensor
    rollout_log_probs: Tensor
    advantages: Tensor


def roll_out(
    engine: Engine,
    tokenizer: Tokenizer,
    reward: Reward,
    problems: list[Problem],
    group: int,
    seed: int,
    max_tokens: int,
) -> Rollouts:
    """Answer every problem `group` times at temperature 1 with nothing filtered, and reward the answers.

    No top-p or top-k: the training log-probabilities are those of the whole vocabulary.
    """
    completions = completions_of(engine, tokenizer, problems, group, 1.0, True, seed, max_tokens)
    answers = [read_rollout(tokenizer, problems[place // group], one) for place, one in enumerate(completions)]
    scores = [reward(answer) for answer in answers]
    rewards = torch.tensor([score.value or 0.0 for score in scores]).view(len(problems), group)
    prompts = [prompt_of(tokenizer, problem) for problem in problems]
    return Rollouts(problems, prompts, completions, answers, scores, rewards)


def pack(rollouts: Rollouts, advantages: Tensor, kept: Tensor, device: torch.device) -> Iterator[PackedRollouts]:
    """Yield the kept rollouts, packed; advantages fp32 [P, G], kept bool [P, G]."""
    chosen = [place for place, kept_ in enumerate(kept.flatten().tolist()) if kept_]
    sizes = [_size(rollouts, place) for place in chosen]
    for run in _runs(sizes):
        yield _pack([chosen[index] for index in run], rollouts, advantages, device)


def _pack(chosen: Sequence[int], rollouts: Rollouts, advantages: Tensor, device: torch.device) -> PackedRollouts:
    tokens, targets, mask, log_probs, values = [], [], [], [], []
    flat = advantages.flatten().tolist()
    for place in chosen:
        prompt, one = rollouts.prompts[place // rollouts.group], rollouts.completions[place]
        ids, silent_ = [*prompt, *one.tokens], len(prompt) - 1
        tokens += ids[:-1]
        targets += ids[1:]
        mask += [0.0] * silent_ + [1.0] * len(one.tokens)
        log_probs += [0.0] * silent_ + one.logprobs
        values += [0.0] * silent_ + [flat[place]] * len(one.tokens)
    positions, context = packed_context([_size(rollouts, place) for place in chosen], device)
    wholes = (torch.tensor(ids, device=device) for ids in (tokens, targets))
    reals = (torch.tensor(column, dtype=torch.float32, device=device) for column in (mask, log_probs, values))
    first, second = wholes
    return PackedRollouts(first, positions, second, context, *reals)


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
