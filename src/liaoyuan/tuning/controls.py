"""The controls of reinforcement learning: what the same compute gives without it, from the same start.

A: more fine-tuning on the same worked solutions. B: the model's own right answers to the very problems that RL was
given, as many samples of each, learned by fine-tuning (rejection sampling: Yuan et al. 2023, arXiv 2308.01825).
Their budgets are token counts that follow from what RL generated and trained on, never from a clock.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import Field

from liaoyuan.config import Config
from liaoyuan.data import TokenisedRecord, Tokenizer
from liaoyuan.models import Decoder
from liaoyuan.rundir import Progress, Report, silent
from liaoyuan.tasks import Right, Task
from liaoyuan.tuning.recipe import ReinforceConfig, sample_seed
from liaoyuan.tuning.reinforce import ReinforceResult
from liaoyuan.tuning.rejection import Answer, Rule, sift
from liaoyuan.tuning.rollout import Rollouts, roll_out
from liaoyuan.tuning.sources import problems_of
from liaoyuan.tuning.validation import tuning_engine

MARGIN = 1.35  # more than RL's CPU time: cores that others share change their speed between pricing and training
SAMPLING = 0.8  # share of its samples' cost that B is charged for: to its favour


class Prices(Config):
    """CPU time of a token of RL in tokens that a control trains on; the quickstart measures it once.

    generated: by a rollout; updated: a row of RL's update, which is larger and not by Muon.
    """

    generated: float = Field(1.4, gt=0)
    updated: float = Field(1.0, gt=0)


@dataclass(frozen=True)
class OwnSamples:
    """Right answers of the model itself, with what it cost to draw them."""

    records: list[TokenisedRecord]
    solved: int  # problems with at least one right sample
    problems: int
    generated_tokens: int
    cpu_seconds: float
    flops: float


def control_tokens(rl: ReinforceResult, prices: Prices) -> int:
    """Return how many tokens control A trains on: the equivalent of what RL trained on and of its rollouts."""
    return round(MARGIN * (prices.updated * rl.trained_tokens + prices.generated * rl.generated_tokens))


def own_samples_tokens(rl: ReinforceResult, generated: int, prices: Prices) -> int:
    """Return how many tokens control B trains on: as many as A, less what drawing `generated` tokens cost."""
    return max(0, round(control_tokens(rl, prices) - SAMPLING * prices.generated * generated))


def own_samples(
    model: Decoder,
    tokenizer: Tokenizer,
    task: Task,
    config: ReinforceConfig,
    drawn: Sequence[Sequence[int]],
    report: Report = silent,
) -> OwnSamples:
    """Sample the problems of every RL step from `model` as it is, and keep the different right answers.

    drawn: the levels of each step's problems, as RL drew them.
    """
    engine = tuning_engine(model.eval(), config.max_tokens)
    start, records, solved, generated, prompts = time.process_time(), list[TokenisedRecord](), 0, 0, 0
    for step, levels in enumerate(drawn):
        problems = problems_of(task, config, step, levels)
        rollouts = roll_out(
            engine, tokenizer, Right(task), problems, config.group, sample_seed(config, step), config.max_tokens
        )
        records += right_answers(rollouts)
        solved += int(rollouts.right.any(1).sum())
        generated += rollouts.generated_tokens
        prompts += rollouts.prompt_tokens
        report(Progress(step + 1, len(drawn), "step", f"{len(records)} right answers"))
    count = sum(map(len, drawn))
    length = (generated + prompts) / (count * config.group)
    flops = model.config.flops_per_token(length / 2) * (generated + prompts)
    return OwnSamples(records, solved, count, generated, time.process_time() - start, flops)


def right_answers(rollouts: Rollouts) -> Iterator[TokenisedRecord]:
    """Yield the right completions of each problem, each different one once, ready to be learned."""
    for place, prompt in enumerate(rollouts.prompts):
        group = rollouts.completions[place * rollouts.group : (place + 1) * rollouts.group]
        right = zip(group, rollouts.right[place].tolist(), strict=True)
        answers = [Answer(tuple(one.tokens), float(is_right)) for one, is_right in right]
        for one, fate in zip(group, sift(answers, Rule()), strict=True):
            if fate == "kept":
                tokens = tuple(one.tokens)
                yield TokenisedRecord((*prompt, *tokens), (0.0,) * len(prompt) + (1.0,) * len(tokens))
