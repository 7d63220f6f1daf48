"""Losses and log-probabilities of given tokens from the output head, without its logits.

All are functions of a few numbers of each token's logits, which `logit_statistics` reads in one pass over the head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.log_sum_exp import log_probability
from liaoyuan.ops.loss_head import LOSS_HEAD, keeps, reference
from liaoyuan.ops.shapes import ShapeError, takes_shapes


class LogitStatistics(NamedTuple):
    """What losses need of each token's logits: fp32 [N] (fp64 for hidden states in fp64), differentiable.

    chosen: the target's logit; log_sum_exp: the log of the softmax's denominator.
    entropy: of the softmax, in nats; mean: of the logits. Empty if `moments` were not asked for.
    """

    chosen: Tensor
    log_sum_exp: Tensor
    entropy: Tensor
    mean: Tensor

    @property
    def log_prob(self) -> Tensor:
        """The target's log-probability."""
        return log_probability(self.chosen, self.log_sum_exp)


ReadLogits = Callable[[Tensor, Tensor, Tensor, bool], LogitStatistics]  # of `logit_statistics`


@takes_shapes(hidden="float [N, H]", weight="same [V, H]", targets="int64 [N]")
def logit_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    moments: bool = False,
    first: int = 0,
    vocabulary: int | None = None,
) -> LogitStatistics:
    """Return what losses need of the logits hidden @ weight^T.

    Args:
        hidden: [N, H]; weight: [V, H], same dtype; targets: int64 [N], each in 0 .. vocabulary - 1.
        moments: whether entropy and mean are wanted too.
        first, vocabulary: `weight` holds the rows first .. first + V - 1 of so many. Of a part, `chosen` is 0 where
            the target is elsewhere, and `mean` is this part's share of it.

    Raises:
        ShapeError: the shapes do not fit; RuntimeError or IndexError: a target is not in the vocabulary.
    """
    if not len(weight):
        raise ShapeError(f"logit_statistics: the head {list(weight.shape)} has no token.")
    whole = weight.shape[0] if vocabulary is None else vocabulary
    if takes(LOSS_HEAD, hidden, weight):
        *found, _ = LOSS_HEAD.call(hidden, weight, targets, first, whole, moments, keeps(hidden, weight))
        return LogitStatistics(*found)
    return LogitStatistics(*reference(hidden, weight, targets, first, whole, moments))


def token_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(hidden @ weight^T)[target], fp32 [N]: every loss of the project is a function of it.

    Arguments and errors are those of `logit_statistics`.
    """
    return logit_statistics(hidden, weight, targets).log_prob


@dataclass(frozen=True)
class Penalties:
    """What a loss adds to the cross-entropy of each token.

    z_loss: factor of the squared log-sum-exp, which keeps logits from drifting (Chowdhery et al. 2022, arXiv
        2204.02311, sec. 5: 1e-4).
    label_smoothing: share e of the target distribution that is spread evenly over the vocabulary (Szegedy et al. 2016,
        arXiv 1512.00567, sec. 7): e times what the mean token's logit lacks to the target's.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0

    @property
    def any(self) -> bool:
        return bool(self.z_loss or self.label_smoothing)

    @property
    def moments(self) -> bool:
        """Whether `of` reads entropy or mean."""
        return self.label_smoothing > 0

    def of(self, found: LogitStatistics) -> Tensor:
        """Return what is added for each token, [N]."""
        added = self.z_loss * found.log_sum_exp.square()
        return added + self.label_smoothing * (found.chosen - found.mean) if self.moments else added


class CrossEntropy(NamedTuple):
    """A loss and its parts, each a sum over the tokens times their weights.

    loss: to be minimised, differentiable; cross_entropy, penalty: its two parts, plain numbers for metrics.
    weight: sum of the weights, by which a mean is divided.
    """

    loss: Tensor
    cross_entropy: Tensor
    penalty: Tensor
    weight: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    read: ReadLogits = logit_statistics,
) -> CrossEntropy:
    """Return the cross-entropy of the targets under softmax(hidden @ weight^T), with `Penalties`.

    Args:
        hidden: [N, H]; weight: [V, H], same dtype; targets: int64 [N].
        weights: of the tokens, [N] (1 if None).
        read: another way to read the logits, of a head that is spread over processes for instance.

    Raises:
        ShapeError: the shapes do not fit.
    """
    if weights is not None and weights.shape != targets.shape:
        raise ShapeError(
            f"linear_cross_entropy: there are {list(weights.shape)} weights of {list(targets.shape)} targets."
        )
    penalties = Penalties(z_loss, label_smoothing)
    found = read(hidden, weight, targets, penalties.moments)
    share = torch.ones_like(found.chosen) if weights is None else weights.to(found.chosen.dtype)
    cross_entropy = -(share * found.log_prob).sum()
    penalty = (share * penalties.of(found)).sum()
    loss = cross_entropy + penalty if penalties.any else cross_entropy
    return CrossEntropy(loss, cross_entropy.detach(), penalty.detach(), share.sum())


def merge_statistics(part: LogitStatistics, highest: Callable[[Tensor], Tensor], add: Callable[[Tensor], Tensor]) -> (
    LogitStatistics
):  # fmt: skip
    """Return the statistics of all logits from those of parts of the vocabulary, each in a process of its own.

    Args:
        part: of this process's rows.
        highest: returns the elementwise maximum of a tensor over the processes, without gradient.
        add: returns the sum, whose gradient each process takes for its own.

    The softmax of all is the parts' own ones, weighted with exp(log-sum-exp); its entropy is their mean entropy and
    that of the weights.
    """
    moments = len(part.entropy) == len(part.chosen)
    top = highest(part.log_sum_exp.detach())
    height = part.log_sum_exp - top
    mass = height.exp()
    addends = [part.chosen, mass]
    if moments:
        addends += [part.mean, mass * (part.entropy - height)]
    chosen, total, *more = add(torch.stack(addends)).unbind()
    log_sum_exp = top + total.log()
    if not moments:
        return LogitStatistics(chosen, log_sum_exp, part.entropy, part.mean)
    return LogitStatistics(chosen, log_sum_exp, more[1] / total + total.log(), more[0])
