"""Reinforcement learning on fresh problems, rewarded by the checked answer alone.

GRPO (Shao et al. 2024, arXiv 2402.03300): a few minibatch updates per batch of rollouts with the clipped ratio, no KL
term, groups without signal dropped, of the others the most different rollouts learned from, and levels of difficulty
drawn by what they teach (see `curriculum`). Rollouts come from the inference engine on the weights that are trained;
whether its log-probabilities have the very bits of those of training is proven at the start (`inference.prove`), and
how far they are apart is measured at every step. What happens in a step is a
function of the seed, the step and the state, so a killed run ends with the same weights bit for bit.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from liaoyuan.checkpoint.training_state import load_state, save_state
from liaoyuan.config import Config
from liaoyuan.data import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import QUICK, prove
from liaoyuan.models import Decoder
from liaoyuan.rundir import Lock, Metrics, Progress, Report, silent
from liaoyuan.tasks import Problem, Right, Task
from liaoyuan.tasks.seen import Seen
from liaoyuan.training import TrainConfig, make_optimiser
from liaoyuan.training.optimiser import Optimiser
from liaoyuan.tuning.curriculum import draw_levels, follow
from liaoyuan.tuning.losses import group_advantages, has_signal, most_different, policy_gradient_loss
from liaoyuan.tuning.rollout import Rollouts, pack, roll_out
from liaoyuan.tuning.validation import Best, tuning_engine

METRICS = "metrics.jsonl"
STATE = "state"


class ReinforceConfig(Config):
    """What a run of reinforcement learning does; a resumed run must be given the same.

    learning_rate: 8e-4 with linear decay is best for a model of 1M parameters (docs/notes/regime.md).
    minimum_groups: a step with fewer groups that carry signal changes nothing (sparse rewards and Adam: noise).
    """

    levels: tuple[int, ...] = Field((2, 3, 4), min_length=1)
    steps: int = Field(200, gt=0)
    problems: int = Field(32, gt=0)  # of one step
    group: int = Field(8, gt=1)  # rollouts of each problem
    update_group: int = Field(4, gt=1)  # of these that are learned from at most, see `most_different`
    minibatches: int = Field(4, gt=0)  # into which a step's groups are cut at most, an update each
    minibatch_groups: int = Field(6, gt=0)  # that a minibatch has at least: an update from fewer is mostly noise
    max_tokens: int = Field(48, gt=0)
    optimiser: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(8e-4, gt=0)
    warmup_steps: int = Field(10, ge=0)
    decay: float = Field(0.9, ge=0, le=1)  # share of the learning rate that is gone, linearly, at the last step
    clip: float = Field(0.5, gt=0)  # of the gradient's norm
    clip_low: float = Field(0.2, gt=0)  # of the ratio, see `policy_gradient_loss`
    clip_high: float = Field(0.28, gt=0)
    normalise: bool = True  # divide advantages by the group's deviation
    minimum_groups: int = Field(2, ge=1)
    seed: int = 0
    validate_every: int = Field(20, gt=0)
    checkpoint_every: int = Field(20, gt=0)


@dataclass(frozen=True)
class ReinforceResult:
    """What a run did so far, killed and resumed parts together. Seconds leave validation out."""

    steps: int = 0
    updates: int = 0  # steps in which enough groups carried signal
    generated_tokens: int = 0
    trained_tokens: int = 0  # rows of the update, prompts included
    rollout_seconds: float = 0.0
    cpu_seconds: float = 0.0
    flops: float = 0.0
    drawn: tuple[tuple[int, ...], ...] = ()  # levels of each step's problems
    exact: bool = False  # whether rollouts were proven to have the log-probabilities of training, bit for bit
    signal: tuple[float, ...] = ()  # share of each level's recent groups that taught something

    @property
    def rollout_tokens_per_second(self) -> float:
        return self.generated_tokens / self.rollout_seconds if self.rollout_seconds else 0.0


def reinforce(
    model: Decoder,
    tokenizer: Tokenizer,
    task: Task,
    config: ReinforceConfig,
    folder: Path,
    report: Report = silent,
    validate: Best | None = None,
    until: int | None = None,
) -> ReinforceResult:
    """Train `model` in place for `config.steps` steps (or only up to step `until`), going on from `folder`.

    Raises:
        LiaoyuanError: the state in `folder` is of a run with another config, or another process writes there.
    """
    settings = TrainConfig(steps=config.steps, optimiser=config.optimiser, weight_decay=0.0)
    optimiser = make_optimiser(model, settings)
    lock = Lock(folder)
    lock.take()
    done = _resume(model, optimiser, config, folder)
    metrics = Metrics(folder / METRICS, resume_from=done.steps)
    done = replace(done, exact=prove(model.eval(), QUICK).exact)
    engine = tuning_engine(model, config.max_tokens)
    end, seen = min(config.steps, until or config.steps), Seen(folder)
    while done.steps < end:
        step, start = done.steps, time.process_time()
        levels = draw_levels(done.signal, config.levels, config.problems, f"levels/{config.seed}/{step}")
        problems = problems_of(task, config, step, levels)
        seen.add(problems)
        rollouts = roll_out(
            engine, tokenizer, Right(task), problems, config.group, sample_seed(config, step), config.max_tokens
        )
        rolled = time.process_time()
        trained, values = _update(model, optimiser, rollouts, config, step)
        signal = follow(done.signal, config.levels, levels, has_signal(rollouts.rewards).tolist())
        done = replace(done, drawn=(*done.drawn, tuple(levels)), signal=signal)
        done = _add(done, rollouts, trained, rolled - start, time.process_time() - start, model)
        values |= {"level": sum(levels) / len(levels), "cpu_seconds": round(done.cpu_seconds, 3), "flops": done.flops}
        values["rollout_tokens_per_second"] = round(rollouts.generated_tokens / max(rolled - start, 1e-9), 1)
        if validate and (done.steps % config.validate_every == 0 or done.steps == end):
            values |= validate(model)
        metrics.write(step, **values)
        if done.steps % config.checkpoint_every == 0 or done.steps == end:
            save_state(folder / STATE, done.steps, model, optimiser, _extra(done, config))
        report(Progress(done.steps, config.steps, "step", f"reward {values['reward']:.3f}", values["reward"]))
    metrics.close()
    lock.release()
    return done


def problems_of(task: Task, config: ReinforceConfig, step: int, levels: Sequence[int]) -> list[Problem]:
    """Return the fresh training problems of a step, one of each of `levels`."""
    first = step * config.problems
    return [task.problem(config.seed, first + place, level, "train") for place, level in enumerate(levels)]


def sample_seed(config: ReinforceConfig, step: int) -> int:
    """Return the seed of a step's samples."""
    return (config.seed + 1) * 100_003 + step


def learning_rate_of(config: ReinforceConfig, step: int) -> float:
    """Return the learning rate of a step: it rises over the warm-up, and falls linearly over the whole run."""
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * rise * (1.0 - config.decay * step / config.steps)


def _update(
    model: Decoder, optimiser: Optimiser, rollouts: Rollouts, config: ReinforceConfig, step: int
) -> tuple[int, dict[str, Any]]:
    """Learn from the groups with signal, a minibatch an update; return how many rows were trained on, and metrics."""
    kept = has_signal(rollouts.rewards)
    values: dict[str, Any] = {
        "reward": float(rollouts.rewards.mean()),
        "no_signal": float((~kept).float().mean()),
        "length": rollouts.generated_tokens / len(rollouts.completions),
        "entropy": _entropy(rollouts),
    }
    if int(kept.sum()) < config.minimum_groups:
        return 0, values
    samples = most_different(rollouts.rewards, min(config.update_group, config.group))
    advantages = group_advantages(rollouts.rewards, config.normalise, samples)
    rate, trained = learning_rate_of(config, step), 0
    for place, chosen in enumerate(_minibatches(kept, config.minibatches, config.minibatch_groups)):
        rows, gap = _add_gradients(model, optimiser, rollouts, advantages, samples & chosen[:, None], config)
        values |= {"grad_norm": optimiser.step(rate, config.clip), "learning_rate": rate}
        if place == 0:  # later minibatches meet weights that have moved on
            values["log_prob_gap"] = gap
        trained += rows
    return trained, values


def _minibatches(kept: Tensor, most: int, groups: int) -> Iterator[Tensor]:
    """Cut the kept groups, bool [P], in at most `most` parts of at least `groups` (if there are so many), bool [P]."""
    places = torch.nonzero(kept).flatten()
    for part in places.tensor_split(max(1, min(most, len(places) // groups))):
        yield torch.zeros_like(kept).index_fill(0, part, True)


def _add_gradients(
    model: Decoder,
    optimiser: Optimiser,
    rollouts: Rollouts,
    advantages: Tensor,
    chosen: Tensor,
    config: ReinforceConfig,
) -> tuple[int, float]:
    """Gather the gradient of the chosen samples, bool [P, G]; return its rows, and the log-probabilities' gap."""
    packs = list(pack(rollouts, advantages, chosen, model.embed_tokens.weight.device))
    total, gap = sum(float(part.mask.sum()) for part in packs), 0.0
    for part in packs:
        log_probs = model(part.tokens, part.positions, part.context, targets=part.targets)
        loss = policy_gradient_loss(
            log_probs, part.rollout_log_probs, part.advantages, part.mask, config.clip_low, config.clip_high
        )
        (loss / total).backward()
        optimiser.accumulate()
        gap = max(gap, float(((log_probs.detach() - part.rollout_log_probs) * part.mask).abs().max()))
    return sum(len(part.tokens) for part in packs), gap


def _entropy(rollouts: Rollouts) -> float:
    """Return an estimate of the policy's entropy in nats per token: the mean of -log p over its own samples."""
    total = sum(sum(completion.logprobs) for completion in rollouts.completions)
    return -total / max(1, rollouts.generated_tokens)


def _add(
    done: ReinforceResult, rollouts: Rollouts, trained: int, rolling: float, seconds: float, model: Decoder
) -> ReinforceResult:
    length = (rollouts.prompt_tokens + rollouts.generated_tokens) / len(rollouts.completions)
    per_token = model.config.flops_per_token(length / 2)
    rolled = rollouts.prompt_tokens + rollouts.generated_tokens
    return replace(
        done,
        steps=done.steps + 1,
        updates=done.updates + (trained > 0),
        generated_tokens=done.generated_tokens + rollouts.generated_tokens,
        trained_tokens=done.trained_tokens + trained,
        rollout_seconds=done.rollout_seconds + rolling,
        cpu_seconds=done.cpu_seconds + seconds,
        flops=done.flops + per_token * (rolled + 3 * trained),
    )


def _resume(model: Decoder, optimiser: Optimiser, config: ReinforceConfig, folder: Path) -> ReinforceResult:
    found = load_state(folder / STATE, model, optimiser)
    if found is None:
        return ReinforceResult(signal=(1.0,) * len(config.levels))
    settings, wanted = found[1]["config"], config.model_dump(mode="json")
    for key, value in wanted.items():
        if settings.get(key) != value:
            raise LiaoyuanError(
                f"{folder} holds a run with {key} = {settings.get(key)}, not {value}: "
                "give the same value to go on with it, or choose another folder."
            )
    return result_of(found[1]["done"])


def result_of(values: dict[str, Any]) -> ReinforceResult:
    """Return the result that `values`, read from JSON, hold; other keys are ignored."""
    known = {key: values[key] for key in ReinforceResult.__dataclass_fields__ if key in values}
    drawn = tuple(tuple(levels) for levels in known["drawn"])
    return ReinforceResult(**known | {"drawn": drawn, "signal": tuple(known["signal"])})


def _extra(done: ReinforceResult, config: ReinforceConfig) -> dict[str, Any]:
    return {"done": asdict(done), "config": config.model_dump(mode="json")}
