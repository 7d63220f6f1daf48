"""The sign and size of policy gradients, first on a bandit whose best arm is known."""

import itertools

import torch

from liaoyuan.tuning import ReinforceConfig
from liaoyuan.tuning.losses import clipped_losses, group_advantages, has_signal, most_different
from liaoyuan.tuning.update import advantages_of


def test_a_bandit_learns_its_best_arm() -> None:
    generator = torch.Generator().manual_seed(0)
    chances = torch.tensor([0.2, 0.8, 0.5])
    logits = torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.SGD([logits], lr=0.5)
    for _ in range(200):
        policy = logits.log_softmax(0)
        arms = torch.multinomial(policy.exp().detach(), 16, replacement=True, generator=generator)
        rewards = torch.bernoulli(chances[arms], generator=generator)[None]
        advantages = group_advantages(rewards)[0]
        loss = clipped_losses(policy[arms] - policy[arms].detach(), advantages).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert logits.argmax() == 1
    assert logits.softmax(0)[1] > 0.8


def test_on_policy_gradient_is_reinforce() -> None:
    log_probs = torch.randn(10).requires_grad_()
    advantages, mask = torch.randn(10), (torch.arange(10) > 3).float()
    (clipped_losses(log_probs - log_probs.detach(), advantages) * mask).sum().backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, -advantages * mask)


def test_clipping_stops_the_gradient_only_where_the_policy_has_gone_far_enough() -> None:
    before = torch.zeros(4)
    log_probs = torch.tensor([1.0, 1.0, -1.0, -1.0], requires_grad=True)  # ratios 2.7 and 0.37
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    clipped_losses(log_probs - before, advantages).sum().backward()
    assert log_probs.grad is not None
    assert (log_probs.grad != 0).tolist() == [False, True, True, False]


def test_advantages_of_groups() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    found = group_advantages(rewards)
    torch.testing.assert_close(found[0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[0].pow(2).mean(), torch.tensor(1.0))
    assert found[1].tolist() == [0.0] * 4
    assert has_signal(rewards).tolist() == [True, False]
    torch.testing.assert_close(group_advantages(rewards, normalise=False)[0, 0], torch.tensor(0.75))


def test_the_most_different_samples_have_the_largest_variance() -> None:
    rewards = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
    for count in (2, 3, 4, 7):
        chosen = most_different(rewards, count)
        assert chosen.sum(1).tolist() == [count] * 6
        for row, mask in zip(rewards, chosen, strict=True):
            best = max(row[list(places)].var(correction=0) for places in itertools.combinations(range(7), count))
            torch.testing.assert_close(row[mask].var(correction=0), best)


def test_both_kinds_of_answers_are_kept_and_compared_with_each_other_alone() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0, 1.0, 0.0], [1.0] * 6])
    chosen = most_different(rewards, 4)
    assert [int(row[mask].sum()) for row, mask in zip(rewards, chosen, strict=True)] == [1, 2, 4]
    advantages = advantages_of(rewards, chosen, ReinforceConfig())
    torch.testing.assert_close(advantages[0, 2], torch.tensor(3.0).sqrt())  # (1 - 1/4) / sqrt(3/16)
    torch.testing.assert_close(advantages[1][chosen[1]].abs(), torch.ones(4))
    assert not advantages[2].any()
