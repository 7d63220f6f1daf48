"""Policy gradients on bandits whose optimum is known, against closed forms, and against finite differences."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from liaoyuan.tuning.losses import (
    batch_advantages,
    cispo_losses,
    clipped_losses,
    generalised_advantages,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    sequence_log_ratio,
    spread,
    sums,
    token_weights,
    truncated_weights,
    value_loss,
)

REWARDS = torch.tensor([0.2, 0.8, 0.5], dtype=torch.float64)  # of each arm
ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "grpo": group_advantages,
    "dr_grpo": lambda rewards: group_advantages(rewards, normalise=False),
    "rloo": leave_one_out_advantages,
    "reinforce++": batch_advantages,
}


def gspo_losses(log_probs: Tensor, before: Tensor, advantages: Tensor) -> Tensor:
    """GSPO on answers of one token."""
    mask, boundaries = torch.ones_like(log_probs), torch.arange(len(log_probs) + 1)
    return clipped_losses(sequence_log_ratio(log_probs, before, mask, boundaries), advantages, 0.1, 0.1)


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "token": lambda log_probs, before, advantages: clipped_losses(log_probs - before, advantages),
    "sequence": gspo_losses,
    "cispo": cispo_losses,
}


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("advantages", ADVANTAGES)
def test_a_bandit_learns_its_best_arm_from_several_updates_of_each_batch(advantages: str, surrogate: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(3, requires_grad=True)
    for _ in range(60):
        before = logits.detach().log_softmax(0)
        arms = torch.multinomial(before.exp(), 32, replacement=True, generator=generator)
        rewards = torch.bernoulli(REWARDS[arms].float(), generator=generator).view(4, 8)
        found = ADVANTAGES[advantages](rewards).flatten()
        for _ in range(3):  # the second and third are off policy
            losses = SURROGATES[surrogate](logits.log_softmax(0)[arms], before[arms], found)
            (gradient,) = torch.autograd.grad(losses.mean(), logits)
            with torch.no_grad():
                logits -= 0.5 * gradient
    assert logits.argmax() == 1
    assert logits.softmax(0)[1] > 0.85


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_of_equal_rewards_teaches_nothing(name: str) -> None:
    for value, size in itertools.product((0.0, 1.0, 0.1, 0.7), (2, 3, 7)):
        assert not ADVANTAGES[name](torch.full((3, size), value)).any()


@pytest.mark.parametrize(("name", "share"), [("rloo", 1.0), ("dr_grpo", 2 / 3)])
def test_the_expected_gradient_is_that_of_the_expected_reward(name: str, share: float) -> None:
    """Over all 27 groups of three samples. Dr. GRPO's baseline has a sample's own reward in it: (G - 1) / G of it."""
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    policy = logits.log_softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for arms in itertools.product(range(3), repeat=3):
        chosen = policy[list(arms)]
        found = ADVANTAGES[name](REWARDS[list(arms)][None])[0]
        losses = clipped_losses(chosen - chosen.detach(), found)
        total = total + chosen.detach().sum().exp() * losses.mean()
    (gradient,) = torch.autograd.grad(total, logits)
    p = policy.detach().exp()
    expected = p * (REWARDS - (p * REWARDS).sum())  # of E[r] by each logit
    torch.testing.assert_close(-gradient, share * expected)


def test_truncated_weights_leave_no_bias_below_the_cap() -> None:
    """Rollouts by q, training by p: the weighted gradient's expectation under q is that under p."""
    logits = torch.tensor([0.2, 0.0, -0.4], dtype=torch.float64, requires_grad=True)
    behaviour = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    policy = logits.log_softmax(0)
    ratio = (policy - behaviour).detach()

    def expected(weights: Tensor) -> Tensor:
        losses = -policy * REWARDS
        return torch.autograd.grad((behaviour.exp() * weights * losses).sum(), logits, retain_graph=True)[0]

    (on_policy,) = torch.autograd.grad((policy.detach().exp() * -policy * REWARDS).sum(), logits, retain_graph=True)
    torch.testing.assert_close(expected(truncated_weights(ratio, 2.0)), on_policy)
    assert not torch.allclose(expected(torch.ones(3, dtype=torch.float64)), on_policy, rtol=1e-2)
    top = ratio.exp().max()
    assert truncated_weights(ratio, float(top) / 2).max() == top / 2


def test_corrected_samples_of_another_policy_teach_the_best_arm_where_uncorrected_ones_do_not() -> None:
    """The rollouts' policy hardly ever draws the best arm, and without a baseline the drawn ones win."""
    behaviour = torch.tensor([0.85, 0.15])
    rewards = torch.tensor([0.5, 1.0])
    ends = {}
    for corrected in (True, False):
        generator, logits = torch.Generator().manual_seed(0), torch.zeros(2, requires_grad=True)
        for _ in range(300):
            arms = torch.multinomial(behaviour, 64, replacement=True, generator=generator)
            policy = logits.log_softmax(0)[arms]
            ratio = policy.detach() - behaviour.log()[arms]
            weights = truncated_weights(ratio, 8.0) if corrected else torch.ones(64)
            losses = clipped_losses(policy - policy.detach(), weights * rewards[arms])
            (gradient,) = torch.autograd.grad(losses.mean(), logits)
            with torch.no_grad():
                logits -= gradient
        ends[corrected] = float(logits.detach().softmax(0)[1])
    assert ends[True] > 0.9 and ends[False] < 0.3


def documents() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Three documents of 2, 4 and 3 tokens, of which 1, 3 and 3 were generated: log-probs, before, A, mask, cuts."""
    generator = torch.Generator().manual_seed(1)
    log_probs, before, advantages = torch.randn(3, 9, dtype=torch.float64, generator=generator)
    mask = torch.tensor([0.0, 1, 0, 1, 1, 1, 1, 1, 1], dtype=torch.float64)
    return log_probs, before, advantages, mask, torch.tensor([0, 2, 6, 9])


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens() -> None:
    log_probs, before, _, mask, cuts = documents()
    found = sequence_log_ratio(log_probs, before, mask, cuts)
    for begin, end in itertools.pairwise(cuts.tolist()):
        chosen = mask[begin:end].bool()
        ratio = (log_probs - before)[begin:end][chosen].exp()
        expected = ratio.prod() ** (1 / len(ratio))
        torch.testing.assert_close(found[begin:end].exp(), expected.expand(end - begin))


def test_each_loss_has_the_gradient_of_finite_differences() -> None:
    log_probs, before, advantages, mask, cuts = documents()
    weights = token_weights(mask, cuts, "sequence")
    log_probs.requires_grad_()
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda x: (clipped_losses(x - before, advantages) * weights).sum(),
        lambda x: (clipped_losses(sequence_log_ratio(x, before, mask, cuts), advantages) * weights).sum(),
        lambda x: (kl_estimate(x, before) * mask).sum(),
        lambda x: (value_loss(x, before, advantages) * mask).sum(),
        lambda x: (clipped_losses(x - before, advantages) * mask).sum(),
    ]
    for loss in losses:
        assert gradcheck(loss, (log_probs,))


def test_cispo_weighs_every_token_by_its_clipped_ratio() -> None:
    log_probs, before, advantages, _, _ = documents()
    log_probs.requires_grad_()
    (gradient,) = torch.autograd.grad(cispo_losses(log_probs, before, advantages, clip_high=0.28).sum(), log_probs)
    torch.testing.assert_close(gradient, -(log_probs - before).detach().exp().clamp(max=1.28) * advantages)
    assert (log_probs - before).detach().exp().max() > 1.28 and (gradient != 0).all()


def test_tokens_count_alike_or_by_their_answer() -> None:
    _, _, losses, mask, cuts = documents()
    means = [losses[1:2].mean(), losses[3:6].mean(), losses[6:9].mean()]
    total = (losses * mask).sum()
    torch.testing.assert_close((losses * token_weights(mask, cuts, "token")).sum() / mask.sum(), total / 7)
    by_answer = (losses * token_weights(mask, cuts, "sequence")).sum() / 3
    torch.testing.assert_close(by_answer, torch.stack(means).mean())
    torch.testing.assert_close((losses * token_weights(mask, cuts, "constant", 48)).sum() / 3, total / 48 / 3)


def test_generalised_advantages_are_the_rest_of_the_rewards_or_one_step_ahead() -> None:
    rewards, values, _, _, cuts = documents()
    places = cuts.tolist()
    for discount in (1.0, 0.9):
        whole, returns = generalised_advantages(rewards, values, places, discount, decay=1.0)
        step, _ = generalised_advantages(rewards, values, places, discount, decay=0.0)
        for begin, end in itertools.pairwise(places):
            for place in range(begin, end):
                rest = sum(discount ** (later - place) * rewards[later] for later in range(place, end))
                torch.testing.assert_close(whole[place], rest - values[place])
                following = values[place + 1] if place + 1 < end else 0.0
                torch.testing.assert_close(step[place], rewards[place] + discount * following - values[place])
        torch.testing.assert_close(returns, whole + values)


def test_a_chain_of_two_steps_is_learned_by_ppo_with_its_critic() -> None:
    """The first action decides whether the second pays: only what comes later tells the first one its worth."""
    generator = torch.Generator().manual_seed(0)
    logits, critic = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    for _ in range(150):
        before = logits.detach().log_softmax(1)
        actions = torch.stack([torch.multinomial(row.exp(), 32, True, generator=generator) for row in before], 1)
        rewards = torch.stack([torch.zeros(32), (actions == 1).all(1).float()], 1).flatten()
        expected = critic.detach().repeat(32)
        advantages, returns = generalised_advantages(rewards, expected, list(range(0, 65, 2)))
        for _ in range(2):
            log_ratio = logits.log_softmax(1).gather(1, actions.T).T - before.gather(1, actions.T).T
            loss = clipped_losses(log_ratio.flatten(), advantages).mean()
            loss = loss + value_loss(critic.repeat(32), expected, returns).mean()
            gradients = torch.autograd.grad(loss, (logits, critic))
            with torch.no_grad():
                for weight, gradient in zip((logits, critic), gradients, strict=True):
                    weight -= gradient
    assert (logits.softmax(1)[:, 1] > 0.9).all()
    assert critic[1] > 0.7


def test_the_estimate_of_the_divergence_is_unbiased_and_never_negative() -> None:
    policy = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()
    estimate = kl_estimate(policy, reference)
    assert (estimate >= 0).all()
    torch.testing.assert_close((policy.exp() * estimate).sum(), (policy.exp() * (policy - reference)).sum())


def test_sums_of_a_document_do_not_depend_on_what_it_is_packed_with() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    alone = sums(x[7:40], torch.tensor([0, 33]))
    packed = sums(x, torch.tensor([0, 7, 7, 40, 50, 50]))
    assert torch.equal(packed[2], alone[0])
    assert packed[1] == packed[4] == 0.0
    assert spread(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 2, 3])).tolist() == [1.0, 1.0, 3.0]
