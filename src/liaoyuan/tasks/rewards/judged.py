"""A reward from a reward model, as `liaoyuan tune reward` makes them: what it thinks of a question with its answer."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from liaoyuan.config import Config, parse
from liaoyuan.data import Message, Record, Tokenizer, tokenise
from liaoyuan.device import select_device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, packed_context, read_config
from liaoyuan.rundir import read_json
from liaoyuan.tasks.problem import Score
from liaoyuan.tasks.reward import Rollout

REWARD_FILE = "liaoyuan_reward.json"  # beside a reward model's weights: a `Reading`
SURE = -1e-6  # a log-probability above it counts as this one: the odds of certainty are infinite
PASS_TOKENS = 4096  # of one forward pass, or one conversation if that is longer


class Reading(Config):
    """How a reward is read from a model: the log-odds of the token `mark` after a whole conversation.

    middle: the mean reward of held-out answers, as many chosen as rejected: only what lies around it means something.
    thoughts: whether the answers that it learned from had thoughts.
    """

    mark: int
    middle: float = 0.0
    thoughts: bool = False


class RewardModelConfig(Config):
    """path: the folder of a reward model. scale: see `ModelReward`. device: on which it computes."""

    path: Path
    scale: Literal["sigmoid", "raw"] = "sigmoid"
    device: str = "auto"


def read_reading(folder: Path) -> Reading:
    """Return how the model in `folder` is read; raises LiaoyuanError if it is no reward model."""
    path = folder / REWARD_FILE
    if (folder / "adapter_config.json").exists():
        raise LiaoyuanError(
            f"{folder} is an adapter: make a model of it first, liaoyuan convert --merge {folder} --model BASE --out "
            "DIR, and name that."
        )
    if not path.is_file():
        raise LiaoyuanError(
            f"{folder} is no reward model: it has no {REWARD_FILE}. Train one with liaoyuan tune reward; its folder "
            "`model` is meant here."
        )
    reading = parse(Reading, read_json(path), str(path))
    size = read_config(folder).vocab_size
    if not 0 <= reading.mark < size:
        raise LiaoyuanError(f"{path}: the mark {reading.mark} is no token of the model, which has {size}.")
    return reading


def log_odds_of(model: Decoder, mark: int, conversations: Sequence[Sequence[int]]) -> list[float]:
    """Return a reward model's reward of each tokenised conversation: the log-odds of `mark` after its last token.

    Higher is better; only differences mean something.
    """
    found: list[float] = []
    for some in _passes(conversations):
        lengths, place = [len(tokens) for tokens in some], model.embed_tokens.weight.device
        positions, context = packed_context(lengths, place)
        tokens = torch.tensor([token for one in some for token in one], device=place)
        rows = torch.tensor(lengths, device=place).cumsum(0) - 1
        with torch.inference_mode():
            log_prob = model(tokens, positions, context, torch.full_like(rows, mark), rows).double().clamp(max=SURE)
            found += (log_prob - torch.log(-torch.expm1(log_prob))).tolist()
    return found


def _passes(conversations: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    some, total = list[Sequence[int]](), 0
    for tokens in conversations:
        if some and total + len(tokens) > PASS_TOKENS:
            yield some
            some, total = [], 0
        some.append(tokens)
        total += len(tokens)
    if some:
        yield some


class ModelReward:
    """What a reward model gives to a question with its answer; and with the thought, if it has learned from thoughts.

    scale: "sigmoid" of the reward less its `middle`: the chance that the answer is preferred to a middling one (Bradley
        and Terry 1952), within 0 and 1 and 0.5 for that one, so that an extreme reward earns hardly more than a high
        one, which is harder to hack (Fu et al. 2025, arXiv 2502.18770). "raw": the difference itself.

    An answer that is not whole is worth 0, as it is elsewhere ("raw" has no such floor: it has no value); one that the
    model cannot read, being too long or refused by its template, has no value. The model is read when it is first
    asked, and by each process for itself.
    """

    name = "model"

    def __init__(self, config: RewardModelConfig) -> None:
        """Raises LiaoyuanError if there is no reward model, or its chat template cannot render an answer."""
        self.config, self.reading = config, read_reading(config.path)
        self._tokenizer = Tokenizer.load(config.path)
        self._model: Decoder | None = None
        self._longest = read_config(config.path).max_position_embeddings
        try:
            (tried,) = tokenise(self._tokenizer, [_conversation("1+1=?", "2", "1 more")])
        except LiaoyuanError as error:
            raise LiaoyuanError(
                f"The reward model {config.path} cannot read a question and an answer: {error}"
            ) from error
        if not any(weight > 0 for weight in tried.weights):
            raise LiaoyuanError(f"The chat template of the reward model {config.path} leaves out what is answered.")

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelReward, (self.config,)

    def __call__(self, rollout: Rollout) -> Score:
        return self.score_all([rollout])[0]

    def score_all(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Judge many answers in few passes."""
        read = self._read(rollouts)
        values = iter(log_odds_of(self._loaded(), self.reading.mark, [one for one in read if not isinstance(one, str)]))
        return [
            self._unread(rollout, one) if isinstance(one, str) else self._score(next(values), rollout)
            for one, rollout in zip(read, rollouts, strict=True)
        ]

    def _read(self, rollouts: Sequence[Rollout]) -> list[Sequence[int] | str]:
        """Return the tokens of each question and answer, or why there are none."""
        whole = [one for one in rollouts if not one.flaw]
        thoughts = [one.thought if self.reading.thoughts else "" for one in whole]
        asked = [
            _conversation(one.problem.question, one.text, thought) for one, thought in zip(whole, thoughts, strict=True)
        ]
        try:
            found = iter([self._fitting(tuple(one.tokens)) for one in tokenise(self._tokenizer, asked)])
        except LiaoyuanError as error:
            if len(rollouts) > 1:  # which of them it is
                return [self._read([rollout])[0] for rollout in rollouts]
            return [str(error)]
        return [one.flaw or next(found) for one in rollouts]

    def _fitting(self, tokens: Sequence[int]) -> Sequence[int] | str:
        if len(tokens) > self._longest:
            return f"too long: {len(tokens)} tokens, and the reward model reads at most {self._longest}"
        return tokens

    def _unread(self, rollout: Rollout, why: str) -> Score:
        return Score(0.0 if rollout.flaw and self.config.scale == "sigmoid" else None, None, why)

    def _score(self, reward: float, rollout: Rollout) -> Score:
        above = reward - self.reading.middle
        if not math.isfinite(above):
            return Score(None, None, f"the model's reward is {reward}")
        value = above if self.config.scale == "raw" else 1.0 / (1.0 + math.exp(-max(-500.0, above)))
        return Score(value, rollout.text, f"reward {above:+.2f}")

    def _loaded(self) -> Decoder:
        from liaoyuan.checkpoint import load_model  # a second of CPU, which no other reward should cost

        if self._model is None:
            self._model = load_model(self.config.path, device=select_device(self.config.device).torch)
        return self._model


def _conversation(question: str, text: str, thought: str) -> Record:
    answer = Message(role="assistant", content=text, think=thought)
    return Record(id="answer", messages=(Message(role="user", content=question), answer))
