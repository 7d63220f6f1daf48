"""Preference losses: where they are least, by the papers' closed forms; hand-computed values; TRL's own numbers."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import softplus

from liaoyuan.tuning.losses import (
    dpo_loss,
    ipo_loss,
    kto_loss,
    log_odds,
    orpo_loss,
    reward_model_loss,
    simpo_loss,
)

REFERENCE = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()  # of three answers to one prompt
WORTH = torch.tensor([0.0, 1.0, -0.5], dtype=torch.float64)
WINS = torch.sigmoid(WORTH[:, None] - WORTH)  # [i, j]: how often i is preferred to j
PAIRS = [(i, j) for i in range(3) for j in range(3) if i != j]


def least(expected_loss: object, size: int = 3) -> Tensor:
    """Return the log-probabilities (log-softmax of what is minimised) at which the loss is least."""
    logits = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = expected_loss(logits.log_softmax(0))  # type: ignore[operator]
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach().log_softmax(0)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_dpo_ends_at_the_optimum_of_rewards_under_a_divergence(beta: float) -> None:
    """Preferences of Bradley and Terry with rewards r: pi = ref exp(r / beta) / Z (arXiv 2305.18290, eq. 4)."""

    def expected(policy: Tensor) -> Tensor:
        return sum(WINS[i, j] * dpo_loss(policy[i], policy[j], REFERENCE[i], REFERENCE[j], beta) for i, j in PAIRS)  # type: ignore[return-value]

    torch.testing.assert_close(least(expected), (REFERENCE + WORTH / beta).log_softmax(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_ipo_ends_at_the_optimum_of_being_preferred_under_a_divergence(tau: float) -> None:
    """pi = ref exp(p(y beats another drawn evenly) / tau) / Z (arXiv 2310.12036, eq. 7), whatever p comes from."""
    wins = WINS.clone()
    wins[0, 1], wins[1, 0] = 0.0, 1.0  # always: DPO would run away to an infinite margin, IPO does not

    def expected(policy: Tensor) -> Tensor:
        return sum(wins[i, j] * ipo_loss(policy[i], policy[j], REFERENCE[i], REFERENCE[j], tau) for i, j in PAIRS)  # type: ignore[return-value]

    preferred = wins.mean(1)
    torch.testing.assert_close(least(expected), (REFERENCE + preferred / tau).log_softmax(0), atol=1e-4, rtol=0)


def test_smoothed_dpo_stops_where_it_is_as_sure_as_its_labels() -> None:
    def expected(policy: Tensor) -> Tensor:
        return dpo_loss(policy[0], policy[1], REFERENCE[0], REFERENCE[1], 0.5, label_smoothing=0.1)

    found = least(expected, 2)
    h = (found[0] - REFERENCE[0]) - (found[1] - REFERENCE[1])
    torch.testing.assert_close(torch.sigmoid(0.5 * h), torch.tensor(0.9, dtype=torch.float64), atol=1e-4, rtol=0)


def test_rewards_of_bradley_and_terry_are_found_again() -> None:
    def expected(rewards: Tensor) -> Tensor:
        return sum(WINS[i, j] * reward_model_loss(rewards[i], rewards[j]) for i, j in PAIRS)  # type: ignore[return-value]

    torch.testing.assert_close(least(expected), WORTH.log_softmax(0), atol=1e-4, rtol=0)


def test_at_the_start_dpo_costs_a_bit_and_pushes_both_sides_by_half_beta() -> None:
    chosen, rejected = torch.tensor([-3.0], requires_grad=True), torch.tensor([-5.0], requires_grad=True)
    loss = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.2)
    assert loss.item() == pytest.approx(math.log(2))
    loss.sum().backward()
    assert (float(chosen.grad), float(rejected.grad)) == pytest.approx((-0.1, 0.1))  # type: ignore[arg-type]


def test_kto_by_hand() -> None:
    log_probs = torch.tensor([-4.0, -6.0], requires_grad=True)
    reference, liked = torch.tensor([-5.0, -5.0]), torch.tensor([True, False])
    losses = kto_loss(log_probs, reference, liked, divergence=0.5, beta=0.4, liked_weight=2.0, disliked_weight=3.0)
    good, bad = 1 / (1 + math.exp(-0.4 * (1.0 - 0.5))), 1 / (1 + math.exp(0.4 * (-1.0 - 0.5)))
    assert losses.tolist() == pytest.approx([2 * (1 - good), 3 * (1 - bad)])
    losses.sum().backward()
    expected = [-2 * 0.4 * good * (1 - good), 3 * 0.4 * bad * (1 - bad)]
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx(expected)


def test_kto_is_least_moved_by_what_is_far_better_or_far_worse_already() -> None:
    """Its value saturates on both sides, so answers that are settled, or hopeless, weigh little."""
    ratios = torch.linspace(-40, 40, 81, dtype=torch.float64, requires_grad=True)
    for liked in (True, False):
        losses = kto_loss(ratios, torch.zeros(81), torch.full((81,), liked), 0.0, beta=0.5)
        (gradient,) = torch.autograd.grad(losses.sum(), ratios)
        assert (gradient < 0).all() if liked else (gradient > 0).all()
        assert gradient.abs().argmax() == 40 and gradient.abs()[[0, 80]].max() < 1e-6


def test_orpo_by_hand() -> None:
    p, q = 0.7, 0.2
    chosen, rejected = (torch.tensor([math.log(x)], dtype=torch.float64) for x in (p, q))
    odds = (p / (1 - p)) / (q / (1 - q))
    expected = -math.log(p) - 0.3 * math.log(odds / (1 + odds))
    assert orpo_loss(chosen, rejected, 0.3).item() == pytest.approx(expected)


def test_log_odds_are_those_of_the_probability_from_nearly_never_to_nearly_always() -> None:
    p = torch.tensor([1e-12, 1e-3, 0.3, 0.5, 0.7, 0.999, 1 - 1e-5], dtype=torch.float64)
    torch.testing.assert_close(log_odds(p.log()), torch.logit(p), rtol=1e-9, atol=1e-9)
    sure = torch.tensor([-200.0, -1e-9, 0.0], requires_grad=True)
    log_odds(sure).sum().backward()
    assert sure.grad is not None
    assert torch.isfinite(sure.grad).all() and torch.isfinite(log_odds(sure.detach())).all()


def test_simpo_wants_its_margin() -> None:
    chosen, rejected = torch.tensor([-0.5], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    found = simpo_loss(chosen, rejected, beta=2.0, margin=1.5).item()
    assert found == pytest.approx(float(softplus(torch.tensor(1.5 - 2.0 * 0.5, dtype=torch.float64))))
    assert simpo_loss(chosen, rejected, 2.0, margin=1.0).item() == pytest.approx(math.log(2))  # just reached


def test_every_loss_falls_as_the_chosen_answer_rises_and_the_other_falls() -> None:
    chosen, rejected = torch.full((4,), -0.7, requires_grad=True), torch.full((4,), -0.9, requires_grad=True)
    base = torch.full((4,), -0.8)
    for losses in (
        dpo_loss(chosen, rejected, base, base),
        ipo_loss(chosen, rejected, base, base),
        orpo_loss(chosen, rejected),
        simpo_loss(chosen, rejected),
        reward_model_loss(chosen, rejected),
    ):
        up, down = torch.autograd.grad(losses.sum(), (chosen, rejected))
        assert (up < 0).all() and (down > 0).all()


def test_gradients_are_those_of_finite_differences() -> None:
    chosen, rejected, first, second = -torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = (chosen.requires_grad_(), rejected.requires_grad_())
    assert gradcheck(lambda c, r: dpo_loss(c, r, first, second, 0.5, 0.1), given)
    assert gradcheck(lambda c, r: ipo_loss(c, r, first, second, 0.5), given)
    assert gradcheck(lambda c: kto_loss(c, first, first < second, 0.1), given[:1])
    assert gradcheck(orpo_loss, given)
    assert gradcheck(simpo_loss, given)
    assert gradcheck(reward_model_loss, given)


def test_simpo_and_orpo_are_those_of_trl() -> None:
    cpo = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    orpo = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    chosen, rejected = -torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=2.5,
        simpo_gamma=1.2,
        loss_type="simpo",
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs = cpo.cpo_loss(trainer, chosen, rejected)[0]
    torch.testing.assert_close(simpo_loss(chosen, rejected, 2.5, 1.2), theirs)
    ratio = orpo.odds_ratio_loss(trainer, chosen, rejected)[0]  # beta log sigmoid(log odds)
    torch.testing.assert_close(orpo_loss(chosen, rejected, 2.5), -chosen - ratio)
