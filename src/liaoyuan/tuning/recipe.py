"""What a run of reinforcement learning does: its config, and the pure functions of config and step."""

from typing import Any, Literal

from pydantic import Field, model_validator

from liaoyuan.config import Config
from liaoyuan.data import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import AfterThinking, Grammars, SamplingParams, ThinkMarks
from liaoyuan.tuning.curriculum import Staging

Advantage = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "gae", "none"]
COMPARED = ("grpo", "dr_grpo", "rloo")  # the advantages for which answers to one problem are compared
KEPT = ("keep_rollouts_every", "keep_rollouts_mb")  # what a resumed run may be given anew: it changes no result


class ReinforceConfig(Config):
    """What a run of reinforcement learning does; a resumed run must be given the same.

    learning_rate: 8e-4 with linear decay is best for a model of 1M parameters (docs/notes/regime.md).
    minimum_groups: a step with fewer groups that carry signal changes nothing (sparse rewards and Adam: noise).
    advantage: "none" lets the reward teach nothing, where a teacher does.
    teacher_weight: of what a teacher thinks of each token, beside the reward; 0 without a teacher. teacher_loss:
        whether it is asked about the tokens that were drawn, or about all that could have been; see
        `losses.distillation`.
    """

    levels: tuple[int, ...] = Field((2, 3, 4), min_length=1)
    steps: int = Field(200, gt=0)
    problems: int = Field(32, gt=0)  # of one step
    group: int = Field(8, gt=0)  # rollouts of each problem
    update_group: int = Field(4, gt=1)  # of these that are learned from at most, see `most_different`
    minibatches: int = Field(4, gt=0)  # into which a step's groups are cut at most, an update each
    minibatch_groups: int = Field(6, gt=0)  # that a minibatch has at least: an update from fewer is mostly noise
    max_tokens: int = Field(48, gt=0)
    optimiser: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(8e-4, gt=0)
    warmup_steps: int = Field(10, ge=0)
    decay: float = Field(0.9, ge=0, le=1)  # share of the learning rate that is gone, linearly, at the last step
    clip: float = Field(0.5, gt=0)  # of the gradient's norm
    clip_low: float = Field(0.2, gt=0)  # of the ratio, see `clipped_losses`
    clip_high: float = Field(0.28, gt=0)
    advantage: Advantage = "grpo"  # see `losses.policy`, as for the next two
    ratio: Literal["token", "sequence", "cispo"] = "token"
    aggregation: Literal["token", "sequence", "constant"] = "token"
    gae_lambda: float = Field(1.0, ge=0, le=1)  # of advantage = "gae", which trains a critic; see `critic`
    critic_learning_rate: float = Field(8e-4, gt=0)
    value_clip: float = Field(0.2, gt=0)
    teacher_weight: float = Field(0.0, ge=0)
    teacher_loss: Literal["sampled", "whole"] = "sampled"
    beta: float = Field(1.0, ge=0, le=1)  # of teacher_loss = "whole": 0 is the forward divergence, 1 the reverse one
    minimum_groups: int = Field(2, ge=1)
    temperature: float = Field(1.0, gt=0)  # of the rollouts, as are the next two; see `SamplingParams`
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    thought_tokens: int = Field(0, ge=0)  # the most of a thought, after which it is closed (0: any)
    overlong_tokens: int = Field(0, ge=0)  # the last so many of `max_tokens` cost reward, see `overlong_penalty`
    staging: Staging = "signal"  # how levels are drawn, see `curriculum`
    solved_between: tuple[float, float] = (0.3, 0.7)  # the bounds of staging = "bounds"
    further_draws: int = Field(0, ge=0)  # of problems in place of those without signal, in one step at most
    importance: Literal["auto", "on", "off"] = "auto"  # truncated weights; auto: where rollouts are not exact
    importance_cap: float = Field(2.0, gt=0)
    workers: int = Field(0, ge=0)  # processes that roll out beside training, a step ahead (0: training does it itself)
    seed: int = 0
    validate_every: int = Field(20, gt=0)
    checkpoint_every: int = Field(20, gt=0)
    measure_kl: bool = True  # to what the run began with: a copy of the weights, or the model without its adapters
    keep_rollouts_every: int = Field(1, ge=0)  # steps whose rollouts are kept in `rollouts/` (0: none)
    keep_rollouts_mb: int = Field(1024, gt=0)  # at most; the oldest give way

    @model_validator(mode="before")
    @classmethod
    def _older(cls, values: Any) -> Any:
        """Read the config of a run that was begun when `advantage` had two forms: normalise = true or false."""
        if not isinstance(values, dict) or "normalise" not in values:
            return values
        rest = {key: value for key, value in values.items() if key != "normalise"}
        return {"advantage": "grpo" if values["normalise"] else "dr_grpo"} | rest

    @model_validator(mode="after")
    def _refuse_what_teaches_nothing(self) -> "ReinforceConfig":
        if self.group < 2 and self.advantage in COMPARED:
            raise ValueError(f"advantage = {self.advantage} compares answers to one problem: group must be 2 or more")
        if self.advantage == "none" and not self.teacher_weight:
            raise ValueError("advantage = none and no teacher: nothing would be learned")
        if self.beta != 1.0 and self.teacher_loss == "sampled":
            raise ValueError("beta is a setting of teacher_loss = whole, not of sampled")
        return self

    @property
    def filters(self) -> bool:
        """Whether rollouts are drawn from fewer tokens than all."""
        return self.top_p < 1.0 or self.top_k > 0 or self.thought_tokens > 0

    @property
    def draws_raw(self) -> bool:
        """Whether rollouts are drawn from the model's own distribution: then its log-probabilities are theirs."""
        return self.temperature == 1.0 and not self.filters


def sampling_of(config: ReinforceConfig, tokenizer: Tokenizer) -> SamplingParams:
    """Return how rollouts are drawn; if not from the model's own distribution, with the masks that training needs.

    Raises:
        LiaoyuanError: thoughts have a budget, and the tokenizer has no tokens that open and close them.
    """
    return SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        constraint=_thought_budget(config.thought_tokens, tokenizer) if config.thought_tokens else None,
        processed_logprobs=not config.draws_raw,
        return_masks=config.filters,
    )


def _thought_budget(tokens: int, tokenizer: Tokenizer) -> AfterThinking:
    if tokenizer.think_ids is None:
        raise LiaoyuanError("rl.thought_tokens needs a tokenizer with tokens for the begin and the end of a thought.")
    vocabulary = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids).vocabulary
    return AfterThinking(None, ThinkMarks(*tokenizer.think_ids), vocabulary, tokens)


def sample_seed(config: ReinforceConfig, step: int, draw: int = 0) -> int:
    """Return the seed of a step's samples, in its first draw of problems or a further one."""
    return (config.seed + 1) * 100_003 + step + 50_000_017 * draw


def learning_rate_of(config: ReinforceConfig, step: int) -> float:
    """Return the learning rate of a step: it rises over the warm-up, and falls linearly over the whole run."""
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * rise * (1.0 - config.decay * step / config.steps)
