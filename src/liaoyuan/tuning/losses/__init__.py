"""The algorithms of tuning as pure functions of log-probabilities, rewards and masks; see the papers they name.

`preference` learns which of two answers is better, `policy` what is rewarded, `distillation` from another model.
"""

from liaoyuan.tuning.losses.distillation import generalised_divergence, teacher_advantages
from liaoyuan.tuning.losses.policy import (
    batch_advantages,
    cispo_losses,
    clipped_losses,
    generalised_advantages,
    group_advantages,
    has_signal,
    kl_estimate,
    leave_one_out_advantages,
    most_different,
    sequence_log_ratio,
    token_weights,
    truncated_weights,
    value_loss,
)
from liaoyuan.tuning.losses.preference import (
    dpo_loss,
    ipo_loss,
    kto_loss,
    log_odds,
    orpo_loss,
    reward_model_loss,
    simpo_loss,
)
from liaoyuan.tuning.losses.sums import spread, sums

__all__ = [
    "batch_advantages",
    "cispo_losses",
    "clipped_losses",
    "dpo_loss",
    "generalised_advantages",
    "generalised_divergence",
    "group_advantages",
    "has_signal",
    "ipo_loss",
    "kl_estimate",
    "kto_loss",
    "leave_one_out_advantages",
    "log_odds",
    "most_different",
    "orpo_loss",
    "reward_model_loss",
    "sequence_log_ratio",
    "simpo_loss",
    "spread",
    "sums",
    "teacher_advantages",
    "token_weights",
    "truncated_weights",
    "value_loss",
]
