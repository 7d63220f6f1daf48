"""Rollouts as the model reads them for an update: one after another, each prompt once for the answers to it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from liaoyuan.models import BranchedContext, branched_context
from liaoyuan.tuning.rollout import Rollouts

MICROBATCH_TOKENS = 4096  # rollouts are packed up to so many tokens a forward pass


@dataclass(frozen=True)
class PackedRollouts:
    """M rollouts of R generated tokens in N tokens that the model reads.

    tokens, positions: int64 [N]; context: which sees which.
    rows: int64 [R], the row after which each generated token comes. targets: int64 [R], these tokens.
    rollout_log_probs, advantages: fp32 [R]. boundaries: int64 [M + 1], of the rollouts among the R.
    values, returns: fp32 [R], of a critic, if there is one: what it expected, and what it is to learn to expect.
    allowed: which tokens could have been drawn, as bits, int32 [R, ceil(V / 32)]; None: all of them.
    """

    tokens: Tensor
    positions: Tensor
    context: BranchedContext
    rows: Tensor
    targets: Tensor
    rollout_log_probs: Tensor
    advantages: Tensor
    boundaries: Tensor
    allowed: Tensor | None
    values: Tensor | None = None
    returns: Tensor | None = None


Packs = list[list[PackedRollouts]]  # of each minibatch


def pack(rollouts: Rollouts, advantages: Tensor, kept: Tensor, device: torch.device) -> Iterator[PackedRollouts]:
    """Yield the kept rollouts, packed; advantages fp32 [P, G], kept bool [P, G]."""
    chosen = [place for place, kept_ in enumerate(kept.flatten().tolist()) if kept_]
    for run in _runs(chosen, rollouts):
        yield _pack(run, rollouts, advantages.flatten(), device)


def _pack(chosen: Sequence[int], rollouts: Rollouts, advantages: Tensor, device: torch.device) -> PackedRollouts:
    tokens, rows, groups = list[int](), list[int](), []
    for problem, places in groupby(chosen, lambda place: place // rollouts.group):
        prompt, answers = rollouts.prompts[problem], [rollouts.completions[place].tokens for place in places]
        groups.append((len(prompt), [len(answer) - 1 for answer in answers]))
        tokens += prompt
        last = len(tokens) - 1
        for answer in answers:
            rows += [last, *range(len(tokens), len(tokens) + len(answer) - 1)]
            tokens += answer[:-1]
    positions, context = branched_context(groups, device)
    drawn = [rollouts.completions[place] for place in chosen]
    sizes = torch.tensor([len(one.tokens) for one in drawn])
    allowed = [mask for one in drawn for mask in one.masks]
    log_probs = [value for one in drawn for value in one.logprobs]
    return PackedRollouts(
        tokens=torch.tensor(tokens, device=device),
        positions=positions,
        context=context,
        rows=torch.tensor(rows, device=device),
        targets=torch.tensor([token for one in drawn for token in one.tokens], device=device),
        rollout_log_probs=torch.tensor(log_probs, dtype=torch.float32, device=device),
        advantages=advantages[list(chosen)].repeat_interleave(sizes).to(device),
        boundaries=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).to(device),
        allowed=torch.from_numpy(np.stack(allowed)).to(device) if allowed else None,
    )


def _runs(chosen: Sequence[int], rollouts: Rollouts) -> Iterator[list[int]]:
    """Cut the chosen places into runs that the model reads at once."""
    run, total, problem = list[int](), 0, -1
    for place in chosen:
        answer, prompt = len(rollouts.completions[place].tokens), len(rollouts.prompts[place // rollouts.group])
        added = answer + (prompt if place // rollouts.group != problem else 0)
        if run and total + added > MICROBATCH_TOKENS:
            yield run
            run, total, added = [], 0, answer + prompt
        run.append(place)
        total, problem = total + added, place // rollouts.group
    if run:
        yield run
