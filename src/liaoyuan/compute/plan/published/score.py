"""How well published runs are predicted: by source, signed, with the worst rows, beside two baselines.

Twice: calibrated (on at most three rows of the source, which are not scored) and unseen (no row of the source is used,
only calibration rows of others). Medians are of a source, then over sources, so that no source with many rows rules.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from liaoyuan.compute.plan.published.baselines import constant_rate, roofline
from liaoyuan.compute.plan.published.calibrate_rows import Belief, Linear, believed, chosen, linear
from liaoyuan.compute.plan.published.cases import NAMES, Case, case_of
from liaoyuan.compute.plan.published.plausible import uniforms
from liaoyuan.compute.plan.published.rows import Refused, read_rows
from liaoyuan.compute.plan.span import Z90
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Progress, Report, silent

WORST = 3


@dataclass(frozen=True)
class Predicted:
    """A row that is scored. error: of the time, relative, positive if it is predicted to be slower than it was; low
    and high: what the interval allows of it; known: whether a row of the same model on as many cards calibrated its
    source; baselines: their errors.
    """

    line: int
    source: str
    model: str
    cards: int
    error: float
    low: float
    high: float
    known: bool
    baselines: dict[str, float]

    @property
    def inside(self) -> bool:
        """Whether the measured time lies in the 90% interval."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Outcome:
    """Rows scored in one way, and the lines that they were calibrated by."""

    rows: tuple[Predicted, ...]
    calibrated_by: tuple[int, ...]


@dataclass(frozen=True)
class Validation:
    """All that is known of how far predictions are to be trusted."""

    calibrated: Outcome
    unseen: Outcome
    refused: tuple[Refused, ...]
    totals: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """Return it with the keys that `plan validate --json` prints."""
        return {
            **figures(self.calibrated.rows),
            "rows_scored": len(self.calibrated.rows),
            "rows_calibrated": len(self.calibrated.calibrated_by),
            "rows_refused": len(self.refused),
            "refused": [asdict(one) for one in self.refused],
            "new_models_and_sizes": figures([row for row in self.calibrated.rows if not row.known]),
            "unseen": {**figures(self.unseen.rows), "rows_scored": len(self.unseen.rows)},
            "sources": [self._source(name) for name in self.totals],
        }

    def _source(self, name: str) -> dict[str, Any]:
        rows = [row for row in self.calibrated.rows if row.source == name]
        unseen = [row for row in self.unseen.rows if row.source == name]
        refused = sum(one.source == name for one in self.refused)
        worst = sorted(rows or unseen, key=lambda row: -abs(row.error))[:WORST]
        return {
            "source": name,
            "rows": self.totals[name],
            "rows_scored": len(rows),
            "rows_calibrated": self.totals[name] - len(rows) - refused,
            "rows_refused": refused,
            **(figures(rows) if rows else {}),
            "unseen": figures(unseen) if unseen else {},
            "worst": [asdict(row) for row in worst],
        }


def figures(rows: Sequence[Predicted]) -> dict[str, Any]:
    """Return errors and intervals of rows: medians of each source, then over sources."""
    names = sorted({name for row in rows for name in row.baselines})
    return {
        **_errors([(row.source, row.error) for row in rows]),
        "coverage_90": _mean([float(row.inside) for row in rows]),
        "mean_interval_width": _mean([row.high - row.low for row in rows]),
        "baselines": {name: _errors([(row.source, row.baselines[name]) for row in rows]) for name in names},
    }


def _errors(errors: Sequence[tuple[str, float]]) -> dict[str, float | None]:
    by_source = dict[str, list[float]]()
    for source, error in errors:
        by_source.setdefault(source, []).append(error)
    if not by_source:
        return {"median_absolute_error": None, "signed_bias": None}
    absolute = [statistics.median(abs(value) for value in values) for values in by_source.values()]
    return {
        "median_absolute_error": statistics.median(absolute),
        "signed_bias": statistics.median(statistics.median(values) for values in by_source.values()),
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def validate(path: Path, report: Report = silent) -> Validation:
    """Return how well the rows of a file are predicted.

    Raises:
        LiaoyuanError: it is no such file, or none of its rows can be scored.
    """
    rows, refused = read_rows(path)
    if not rows:
        reason = f" The first: line {refused[0].line}, {refused[0].reason}." if refused else ""
        raise LiaoyuanError(f"No row of {path} can be scored.{reason}")
    chances, seen = uniforms(), dict[str, Any]()
    cases = [case_of(row, chances, seen) for row in rows]
    near = linear(cases, np.zeros((len(cases), len(NAMES))))
    used = np.array(chosen(near, cases), dtype=int)
    report(Progress(1, 3, "part"))
    totals = dict[str, int]()
    told = [(row.line, row.source) for row in rows] + [(one.line, one.source) for one in refused]
    for _, source in sorted(told):
        totals[source] = totals.get(source, 0) + 1
    calibrated = _calibrated(cases, near, used)
    report(Progress(2, 3, "part"))
    unseen = _unseen(cases, near, used)
    return Validation(calibrated, unseen, refused, totals)


def _calibrated(cases: Sequence[Case], near: Linear, used: np.ndarray) -> Outcome:
    scored = [index for index in range(len(cases)) if index not in set(used.tolist())]
    return _outcome(cases, believed(near, cases, used, scored), scored, dict.fromkeys(scored, used), used)


def _unseen(cases: Sequence[Case], near: Linear, used: np.ndarray) -> Outcome:
    mean, sigma, others = np.zeros(len(cases)), np.zeros(len(cases)), dict[int, np.ndarray]()
    for source in dict.fromkeys(case.row.source for case in cases):
        own = [index for index, case in enumerate(cases) if case.row.source == source]
        rest = np.array([index for index in used if index not in set(own)], dtype=int)
        belief = believed(near, cases, rest, own, rounds=1)
        mean[own], sigma[own] = belief.mean, belief.sigma
        others |= dict.fromkeys(own, rest)
    return _outcome(cases, Belief(mean, sigma), list(range(len(cases))), others, used)


def _outcome(
    cases: Sequence[Case], belief: Belief, scored: Sequence[int], fitted: dict[int, np.ndarray], used: np.ndarray
) -> Outcome:
    found = list[Predicted]()
    for place, index in enumerate(scored):
        case, rest = cases[index], [cases[other] for other in fitted[index]]
        same = [(other.row.model, other.row.cards) for other in rest if other.row.source == case.row.source]
        apart = belief.mean[place] - case.measured
        reach = Z90 * belief.sigma[place]
        found.append(
            Predicted(
                case.row.line,
                case.row.source,
                case.row.model,
                case.row.cards,
                float(np.expm1(apart)),
                float(np.expm1(apart - reach)),
                float(np.expm1(apart + reach)),
                (case.row.model, case.row.cards) in same,
                {
                    "constant_rate": float(np.expm1(constant_rate(case, rest) - case.measured)),
                    "roofline": float(np.expm1(roofline(case) - case.measured)),
                },
            )
        )
    return Outcome(tuple(found), tuple(cases[index].row.line for index in used))
