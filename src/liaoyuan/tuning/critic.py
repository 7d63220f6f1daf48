"""The critic of PPO (Schulman et al. 2017, arXiv 1707.06347): what an answer is going to earn, before each token.

A trunk that begins as a copy of the policy's, with a linear head, trained beside the policy by an optimiser of its
own. The two are saved as one state, so that a run which is resumed goes on with both of the same step.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from liaoyuan.models import Decoder
from liaoyuan.training import TrainConfig, make_optimiser
from liaoyuan.training.optimiser import Optimiser
from liaoyuan.tuning.losses import batch_advantages, generalised_advantages, value_loss
from liaoyuan.tuning.packing import PackedRollouts, Packs
from liaoyuan.tuning.policy_log_probs import policy_hidden
from liaoyuan.tuning.recipe import ReinforceConfig

POLICY, CRITIC = "policy.", "critic."  # of the names in a state


class ValueModel(nn.Module):
    """Gives a value before each token; all values are 0 at first."""

    def __init__(self, policy: Decoder) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(policy).requires_grad_(True)
        if "lm_head" in self.trunk._modules:
            del self.trunk.lm_head  # of which nothing is asked
        self.head = nn.Linear(policy.config.hidden_size, 1, device=policy.embed_tokens.weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, part: PackedRollouts) -> Tensor:
        """Return the value of what stands before each target, fp32 [R]."""
        found: Tensor = self.head(policy_hidden(self.trunk, part).float())[:, 0]
        return found


class Critic:
    """The value model of a run, and its optimiser."""

    def __init__(self, policy: Decoder, config: ReinforceConfig) -> None:
        self.model, self._config = ValueModel(policy), config
        settings = TrainConfig(steps=config.steps, optimiser="adamw", weight_decay=0.0)
        self.optimiser = make_optimiser(self.model, settings)  # type: ignore[arg-type]

    @torch.no_grad()
    def appraise(self, packs: Packs) -> tuple[Packs, dict[str, float]]:
        """Return minibatches whose tokens have advantages over what the critic expected, normalised over all of them,
        and how much of the rewards it explains (1: all, 0: no more than their mean does).

        packs: whose advantages are the reward of the token's answer, which its last token earns.
        """
        parts = [part for minibatch in packs for part in minibatch]
        if not parts:
            return packs, {}
        values = [self.model(part) for part in parts]
        found = [self._appraised(part, value) for part, value in zip(parts, values, strict=True)]
        whole = batch_advantages(torch.cat([part.advantages for part in found]))
        normal = iter(whole.split([len(part.rows) for part in found]))
        appraised = iter([replace(part, advantages=next(normal)) for part in found])
        earned, expected = torch.cat([part.advantages for part in parts]), torch.cat(values)
        told = explained_variance(earned, expected)
        return [[next(appraised) for _ in minibatch] for minibatch in packs], told

    def _appraised(self, part: PackedRollouts, values: Tensor) -> PackedRollouts:
        cuts = part.boundaries.tolist()
        rewards = torch.zeros_like(part.advantages)
        last = part.boundaries[1:] - 1
        rewards[last] = part.advantages[last]
        advantages, returns = generalised_advantages(rewards, values, cuts, decay=self._config.gae_lambda)
        return replace(part, advantages=advantages, values=values, returns=returns)

    def learn(self, part: PackedRollouts, total: float) -> None:
        """Add the gradient of a part, whose losses are divided by `total`."""
        assert part.values is not None and part.returns is not None
        losses = value_loss(self.model(part), part.values, part.returns, self._config.value_clip)
        (losses.sum() / total).backward()
        self.optimiser.accumulate()

    def step(self, rate: float) -> None:
        """Update, given the policy's learning rate, whose schedule is followed."""
        self.optimiser.step(rate * self._config.critic_learning_rate / self._config.learning_rate, self._config.clip)


def explained_variance(earned: Tensor, expected: Tensor) -> dict[str, float]:
    """Return 1 - Var(earned - expected) / Var(earned); nothing where all earned the same."""
    variance = float(earned.var(correction=0))
    if variance < 1e-12:
        return {}
    return {"explained_variance": 1.0 - float((earned - expected).var(correction=0)) / variance}


class Pair(nn.Module):
    """Policy and value model as a checkpoint sees them."""

    def __init__(self, policy: Decoder, critic: ValueModel) -> None:
        super().__init__()
        self.config, self.policy, self.critic = policy.config, policy, critic


class PairOptimiser:
    """Both optimisers as a checkpoint sees them."""

    def __init__(self, policy: Optimiser, critic: Optimiser) -> None:
        self._parts = {POLICY: policy, CRITIC: critic}

    def describe(self) -> dict[str, Any]:
        return {name + key: value for name, part in self._parts.items() for key, value in part.describe().items()}

    def state(self) -> dict[str, Tensor]:
        return {name + key: value for name, part in self._parts.items() for key, value in part.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, part in self._parts.items():
            part.load({key.removeprefix(name): value for key, value in state.items() if key.startswith(name)})
