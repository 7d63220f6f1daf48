"""What is wrong with a run of reinforcement learning while it runs, and what to do about it.

Each check is a pure function of the rows of `metrics.jsonl` so far, the newest last. A finding is told once, until it
becomes worse or has been gone for a while; all of them are rows of `findings.jsonl`.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from liaoyuan.rundir import Metrics, read_metrics

FINDINGS = "findings.jsonl"
WINDOW = 10  # steps whose mean counts as "now"; so many at the beginning count as "then"
Severity = Literal["note", "warning", "error"]
Row = dict[str, Any]

COLLAPSED = 0.3  # entropy now, as a share of what it was
STEADY = 0.03  # change of a share over a window that counts as none
GROWN = 1.3  # length of wrong answers now, as a multiple of what it was
LONGER = 1.2  # and as a multiple of that of right ones
GAP = 0.02  # nats between rollout and training, 99th percentile (about 2% of the probability)
SPIKE = 8.0  # gradient norm as a multiple of the median before
FAR = 0.5  # nats a token from the start policy
APART = 0.3  # nats a token between student and teacher
LONG_RUN = 1800.0  # seconds left from which it is worth saying


@dataclass(frozen=True)
class Finding:
    """What is wrong (`what`, with its figures) and what to do (`do`). `name` stays the same from run to run."""

    name: str
    severity: Severity
    what: str
    do: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.what} {self.do}"


class Doctor:
    """Looks at each row of a run, and writes `findings.jsonl`; a resumed run has told what the killed one had told."""

    def __init__(self, folder: Path, resume_from: int = 0) -> None:
        rows = read_metrics(folder / "metrics.jsonl")
        self._rows = list[Row]()
        self._told = dict[str, tuple[Severity, int]]()  # the severity told, and the last step at which it held
        for row in rows:
            if row["step"] < resume_from:
                self._fresh(row)
        self._file = Metrics(folder / FINDINGS, resume_from)

    def look(self, row: Row) -> list[Finding]:
        """Return what is new with this row."""
        found = self._fresh(row)
        for finding in found:
            self._file.write(row["step"], **asdict(finding))
        return found

    def close(self) -> None:
        self._file.close()

    def _fresh(self, row: Row) -> list[Finding]:
        self._rows.append(row)
        fresh, step = [], int(row["step"])
        for finding in diagnose(self._rows):
            told, last = self._told.get(finding.name, ("note", -2 * WINDOW))
            is_worse = RANKS.index(finding.severity) > RANKS.index(told)
            if step - last > WINDOW or is_worse:
                fresh.append(finding)
            self._told[finding.name] = (finding.severity if is_worse or step - last > WINDOW else told, step)
        return fresh


RANKS: tuple[Severity, ...] = ("note", "warning", "error")


def diagnose(rows: Sequence[Row]) -> list[Finding]:
    """Return all that holds of a run whose rows are these."""
    found = (check(rows) for check in CHECKS)
    return [finding for finding in found if finding is not None]


@dataclass(frozen=True)
class Limit:
    """A share, averaged over a window, of which there is a finding from `least` on, and a graver one above `grave`.

    name: of the column, and of the finding. what: the words around the share, `{}`.
    """

    name: str
    least: float
    grave: float
    what: str
    do: str
    severities: tuple[Severity, Severity] = ("warning", "error")

    def check(self, rows: Sequence[Row]) -> Finding | None:
        share = _now(rows, self.name)
        if share is None or share < self.least:
            return None
        return Finding(self.name, self.severities[share > self.grave], self.what.format(_percent(share)), self.do)


LIMITS = (
    Limit(
        "all_wrong", 0.6, 0.9, "{} of the groups are all wrong.",
        "Lower rl.levels, give SFT more steps or more solutions first, or raise rl.group.",
    ),
    Limit(
        "all_right", 0.6, 0.9, "{} of the groups are all right: there is little left to learn.",
        "Add harder levels to rl.levels, or stop here.",
        ("note", "warning"),
    ),
    Limit(
        "truncated", 0.1, 0.5, "{} of the answers meet the limit of tokens and are not whole.",
        "Raise rl.max_tokens; or have thoughts closed by rl.thought_tokens, or long answers cost by "
        "rl.overlong_tokens.",
    ),
    Limit(
        "unparsed", 0.2, 0.8, "In {} of the whole answers no answer was found.",
        "Look at their reasons in rollouts/; teach the form by SFT, or reward it.",
    ),
    Limit(
        "unjudged", 0.05, 0.5, "The reward gave no value to {} of the rollouts, which teach nothing.",
        "Their reasons are in rollouts/: a reward that raises or ends late, or problems that cannot be checked.",
    ),
    Limit(
        "one_answer", 0.3, 0.8, "{} of the rollouts give one and the same answer where another is right.",
        "See that the reward does not pay it; lower rl.learning_rate.",
    ),
    Limit(
        "copied", 0.2, 0.8, "{} of the answers are copied from the question, in which the right one does not stand.",
        "See that the reward does not pay it; teach the form by SFT.",
    ),
)  # fmt: skip


def no_update(rows: Sequence[Row]) -> Finding | None:
    share = _now([{"idle": float(row.get("updates", 0) == 0)} for row in rows[-WINDOW:]], "idle")
    if share is None or share < 0.5:
        return None
    what = f"{_percent(share)} of the last {WINDOW} steps changed nothing: too few groups had signal."
    do = "Raise rl.problems or rl.further_draws, or choose levels that are solved now and then."
    return Finding("no_update", "error" if share == 1.0 else "warning", what, do)


def entropy_collapse(rows: Sequence[Row]) -> Finding | None:
    now, then, reward = _now(rows, "entropy"), _then(rows, "entropy"), _now(rows, "reward")
    if now is None or then is None or reward is None or now > COLLAPSED * then or reward > 0.8:
        return None
    before = _mean([row["reward"] for row in rows[-3 * WINDOW : -2 * WINDOW] if "reward" in row])
    if before is None or reward > before + STEADY:
        return None  # it becomes sure of what is right
    what = f"Entropy fell from {then:.3f} to {now:.3f} nats a token, and the reward stays at {reward:.2f}."
    do = "Raise rl.clip_high (0.28) or lower rl.learning_rate; begin again from an earlier checkpoint."
    return Finding("entropy_collapse", "warning", what, do)


def wrong_answers_grow(rows: Sequence[Row]) -> Finding | None:
    now, then = _now(rows, "length_wrong"), _then(rows, "length_wrong")
    right = _now(rows, "length_right") or 0.0
    if now is None or then is None or now < GROWN * then or now < LONGER * right:
        return None  # or they are as long as right ones: it thinks more
    what = f"Wrong answers have grown from {then:.0f} to {now:.0f} tokens (right ones: {right:.0f})."
    do = "Set rl.aggregation = 'constant' and rl.advantage = 'dr_grpo', or rl.overlong_tokens."
    return Finding("wrong_answers_grow", "warning", what, do)


def ratio_gap(rows: Sequence[Row]) -> Finding | None:
    row = rows[-1]
    if row.get("exact") and row.get("log_prob_gap", 0.0) > 0.0 and not row.get("corrected"):
        what = f"A rollout was {row['log_prob_gap']:.1e} nats from training, though the two were proven equal."
        return Finding("ratio_gap", "error", what, "See liaoyuan doctor --exact; rl.importance = 'on' corrects for it.")
    if row.get("gap_p99", 0.0) < GAP:
        return None
    what = f"Rollouts are up to {row['log_prob_gap']:.3f} nats from training (99% within {row['gap_p99']:.3f})."
    do = "Set exact = true, or leave rl.importance at 'auto', which corrects for it."
    return Finding("ratio_gap", "note" if row.get("corrected") else "warning", what, do)


def corrected(rows: Sequence[Row]) -> Finding | None:
    row = rows[-1]
    if not row.get("corrected"):
        return None
    why = "one step old" if row.get("staleness") else "not proven to have training's bits"
    what = f"Rollouts are {why}: truncated importance weights are on (gap {row.get('log_prob_gap', 0.0):.1e} nats)."
    return Finding(
        "corrected", "note", what, "With exact = true none are needed; log_prob_gap in metrics.jsonl shows it."
    )


def gradient_spike(rows: Sequence[Row]) -> Finding | None:
    norms = [row["grad_norm"] for row in rows[-3 * WINDOW :] if "grad_norm" in row]
    if len(norms) <= WINDOW or "grad_norm" not in rows[-1]:
        return None
    usual = statistics.median(norms[:-1])
    if norms[-1] < SPIKE * usual:
        return None
    what = f"The gradient's norm is {norms[-1]:.2f}, where {usual:.2f} is usual."
    do = "It was clipped (rl.clip); if it comes again, lower rl.learning_rate or raise rl.problems."
    return Finding("gradient_spike", "warning", what, do)


def far_from_start(rows: Sequence[Row]) -> Finding | None:
    now = _now(rows, "kl_start")
    if now is None or now < FAR:
        return None
    what = f"The policy is {now:.2f} nats a token from the one that the run began with."
    return Finding(
        "far_from_start", "warning", what, "Look at the rollouts; lower rl.learning_rate if they degenerate."
    )


def far_from_teacher(rows: Sequence[Row]) -> Finding | None:
    now, then = _now(rows, "teacher_divergence"), _then(rows, "teacher_divergence")
    if now is None or then is None or now < APART or now < 0.9 * then:
        return None
    what = f"The student is {now:.2f} nats a token from its teacher, and was {then:.2f}: it hardly comes nearer."
    do = (
        "See that the two have one chat template; raise rl.learning_rate; or let it first learn the teacher's own "
        "answers (liaoyuan tune sample, then tune sft)."
    )
    return Finding("far_from_teacher", "warning", what, do)


def blind_critic(rows: Sequence[Row]) -> Finding | None:
    now = _now(rows, "explained_variance")
    if now is None or len(rows) < 2 * WINDOW or now > 0.0:
        return None
    what = f"The critic explains {_percent(now)} of the rewards' variance: their mean would say as much."
    do = "Raise rl.critic_learning_rate or rl.problems; rl.advantage = 'grpo' or 'rloo' needs no critic."
    return Finding("blind_critic", "warning", what, do)


def reward_without_accuracy(rows: Sequence[Row]) -> Finding | None:
    """The reward rises while what is checked on validation problems falls."""
    checked = [row for row in rows if "validation_sampled" in row and "reward" in row]
    if len(checked) < 3:
        return None
    best = max(checked[:-1], key=lambda row: float(row["validation_sampled"]))
    rewards = [_mean([row["reward"] for row in rows[max(0, at - WINDOW) : at + 1] if "reward" in row]) or 0.0
               for at in (rows.index(best), len(rows) - 1)]  # fmt: skip
    fall = best["validation_sampled"] - checked[-1]["validation_sampled"]
    if checked[-1] is not rows[-1] or fall < 2 * STEADY or rewards[1] < rewards[0] + STEADY:
        return None
    what = (
        f"The reward rose from {rewards[0]:.2f} to {rewards[1]:.2f} while validation fell by {_percent(fall)}: "
        "it may be earned by something else than right answers."
    )
    return Finding("reward_without_accuracy", "error", what, "Read the best-paid rollouts, and mend the reward.")


def reward_falls(rows: Sequence[Row]) -> Finding | None:
    windows = [rows[at : at + WINDOW] for at in range(0, len(rows) - WINDOW + 1, WINDOW)]
    means = [_mean([row["reward"] for row in window if "reward" in row]) for window in windows]
    known = [mean for mean in means if mean is not None]
    if len(known) < 3 or max(known) < 0.1 or known[-1] > 0.5 * max(known):
        return None
    if (_now(rows, "level") or 0.0) > (_then(rows, "level") or 0.0) + 0.25:
        return None  # harder problems lower it by themselves
    what = f"The reward fell from {max(known):.2f} to {known[-1]:.2f}."
    do = "Lower rl.learning_rate, or raise rl.problems; the best checkpoint is kept."
    return Finding("reward_falls", "error", what, do)


def time_left(rows: Sequence[Row]) -> Finding | None:
    left = rows[-1].get("seconds_left", 0.0)
    if len(rows) < WINDOW or left < LONG_RUN:
        return None
    what = f"At this speed the run takes {left / 3600:.1f} hours more."
    return Finding("time_left", "note", what, "Ctrl-C saves; the same command goes on.")


CHECKS: tuple[Callable[[Sequence[Row]], Finding | None], ...] = (
    reward_without_accuracy,
    reward_falls,
    *(limit.check for limit in LIMITS),
    no_update,
    entropy_collapse,
    wrong_answers_grow,
    ratio_gap,
    corrected,
    gradient_spike,
    far_from_start,
    far_from_teacher,
    blind_critic,
    time_left,
)


def _now(rows: Sequence[Row], key: str) -> float | None:
    """Return the mean over the last `WINDOW` rows; None before there are so many."""
    return _mean([row[key] for row in rows[-WINDOW:] if key in row]) if len(rows) >= WINDOW else None


def _then(rows: Sequence[Row], key: str) -> float | None:
    """Return the mean over the first `WINDOW` rows; None before there are twice so many."""
    return _mean([row[key] for row in rows[:WINDOW] if key in row]) if len(rows) >= 2 * WINDOW else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
