"""What preference tuning minimises, and what it shows of every step."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from liaoyuan.config import Config
from liaoyuan.data import Batch
from liaoyuan.parallel import Losses, Program, World
from liaoyuan.tuning.losses import (
    dpo_loss,
    ipo_loss,
    kto_loss,
    log_odds,
    orpo_loss,
    reward_model_loss,
    simpo_loss,
    sums,
)
from liaoyuan.tuning.preference_batches import AnswerBatch

Name = Literal["dpo", "ipo", "kto", "orpo", "simpo", "reward"]
BETAS: dict[str, float] = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0, "reward": 1.0}
OWN = {"label_smoothing": "dpo", "margin": "simpo", "liked_weight": "kto", "disliked_weight": "kto"}


class PreferenceLoss(Config):
    """The section `[preference]`; the equations are in `losses.preference`.

    beta: of DPO, KTO and SimPO; IPO's tau; the weight of ORPO's second term. None: what the papers use.
    """

    loss: Name = "dpo"
    beta: float | None = Field(None, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)  # of DPO: the share of pairs that are the wrong way round
    margin: float = Field(1.0, ge=0)  # of SimPO, its gamma
    liked_weight: float = Field(1.0, gt=0)  # of KTO
    disliked_weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _refuse_what_has_no_effect(self) -> "PreferenceLoss":
        for key, loss in OWN.items():
            if key in self.model_fields_set and self.loss != loss and getattr(self, key) != _default(key):
                raise ValueError(f"{key} is a setting of {loss}, not of {self.loss}")
        return self

    @property
    def strength(self) -> float:
        return BETAS[self.loss] if self.beta is None else self.beta

    @property
    def has_reference(self) -> bool:
        """Whether the loss looks at the model to begin with."""
        return self.loss in ("dpo", "ipo", "kto")

    @property
    def is_paired(self) -> bool:
        return self.loss != "kto"

    def rewards(self, total: Tensor, size: Tensor, reference: Tensor) -> Tensor:
        """Return what the loss takes each answer to be worth [A], given the sum of its tokens' log-probabilities, how
        many they are, and the reference's sum.
        """
        if self.loss == "ipo":
            return self.strength * (total - reference) / size
        if self.has_reference:
            return self.strength * (total - reference)
        if self.loss == "simpo":
            return self.strength * total / size
        return log_odds(total / size)


def _default(key: str) -> Any:
    return PreferenceLoss.model_fields[key].default


class PreferenceObjective:
    """The mean of a preference loss over pairs (KTO: over answers); a `training.Objective`.

    paired: whether all answers come in pairs.
    """

    def __init__(self, settings: PreferenceLoss, paired: bool = True) -> None:
        self.settings, self.paired = settings, paired

    def count(self, batch: Batch) -> float:
        """Return how many pairs, or answers, are in a microbatch."""
        assert isinstance(batch, AnswerBatch)
        return len(batch.documents) / (2 if self.settings.is_paired else 1)

    def losses(self, program: Program, batches: Sequence[Batch], world: World) -> Losses:
        """Return the loss of this step; KTO's needs the policy's divergence over all of it first."""
        divergence = 0.0
        if self.settings.loss == "kto":
            divergence = _divergence(program, batches, world)
        return lambda log_probs, batch: self._sums(log_probs, batch, divergence)

    def values(self, means: Sequence[float]) -> dict[str, float]:
        """Return the reward margin, accuracy, log-probabilities of both sides (nats an answer), and an estimate of
        the divergence from the model to begin with, in nats a token.
        """
        good, bad, chosen, rejected, liked, disliked, right, compared, drift, tokens, divergence, answers = means
        found = {"accuracy": right / compared if compared else 0.0}
        if liked and disliked:
            found["margin"] = good / liked - bad / disliked
        found |= {"chosen_log_prob": chosen / liked} if liked else {}
        found |= {"rejected_log_prob": rejected / disliked} if disliked else {}
        found |= {"kl": drift / tokens} if self.settings.has_reference else {}
        return found | ({"kto_divergence": divergence / answers} if self.settings.loss == "kto" else {})

    def _sums(self, log_probs: Tensor, batch: Batch, divergence: float) -> Tensor:
        assert isinstance(batch, AnswerBatch)
        place = log_probs.device
        cuts, weights, documents, liked, reference = (
            x.to(place) for x in (batch.boundaries, batch.weights, batch.documents, batch.liked, batch.reference)
        )
        total, size = sums(log_probs * weights, cuts)[documents], sums(weights, cuts)[documents]
        loss = self._loss(total, size, reference, liked, divergence)
        with torch.no_grad():
            rewards = self.settings.rewards(total, size, reference)
            right = rewards[0::2] > rewards[1::2] if self.paired else (rewards > 0) == liked
            by_side = [x[side].sum() for x in (rewards, total) for side in (liked, ~liked)]
            shown = [*by_side, liked.sum(), (~liked).sum(), right.sum(), torch.ones_like(right).sum()]
            shown += [(reference - total).sum(), size.sum(), total.new_tensor(divergence * len(liked))]
            shown += [total.new_tensor(len(liked))]
        return torch.stack([loss, *(value.to(loss.dtype) for value in shown)])

    def _loss(self, total: Tensor, size: Tensor, reference: Tensor, liked: Tensor, divergence: float) -> Tensor:
        """Return the loss summed over pairs, or answers."""
        one, beta = self.settings, self.settings.strength
        if one.loss == "kto":
            weights = (one.liked_weight, one.disliked_weight)
            return kto_loss(total, reference, liked, divergence, beta, *weights).sum()
        (chosen, rejected), (first, second) = _sides(total), _sides(reference)
        if one.loss == "dpo":
            return dpo_loss(chosen, rejected, first, second, beta, one.label_smoothing).sum()
        chosen, rejected, first, second = (
            x / n for x, n in zip((*_sides(total), first, second), 2 * _sides(size), strict=True)
        )
        if one.loss == "ipo":
            return ipo_loss(chosen, rejected, first, second, beta).sum()
        if one.loss == "orpo":
            return orpo_loss(chosen, rejected, beta).sum()
        if one.loss == "simpo":
            return simpo_loss(chosen, rejected, beta, one.margin).sum()
        return reward_model_loss(log_odds(chosen), log_odds(rejected)).sum()


def _sides(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values of the better and of the worse answers of pairs."""
    return x[0::2], x[1::2]


def _divergence(program: Program, batches: Sequence[Batch], world: World) -> float:
    """Return KTO's z0: how much more the policy says strangers' answers than the reference, on average, at least 0."""
    total = reference = count = 0.0
    for batch in batches:
        assert isinstance(batch, AnswerBatch) and batch.strangers
        total -= float(program.loss(batch.strangers))
        reference += batch.strangers_reference * world.counts
        count += batch.strangers_count * world.counts
    total, reference, count = world.sum_numbers(total, reference, count)
    return max(0.0, (total - reference) / max(1.0, count))
