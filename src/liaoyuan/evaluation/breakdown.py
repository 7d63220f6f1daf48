"""What a model can do, as a table: all problems, each part, each level; with intervals, and what was not judged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from liaoyuan.evaluation.accuracy import Answers
from liaoyuan.evaluation.intervals import Interval, bootstrap
from liaoyuan.tasks import Score


@dataclass(frozen=True)
class Line:
    """A line of the table; an interval is None where no answer could be judged.

    passes: for each k, the share of problems of which one of k samples is right. unjudged, unparsed: answers, greedy
        and sampled. length: mean tokens of an answer, its thought included.
    """

    name: str
    problems: int
    greedy: Interval | None
    sampled: Interval | None
    passes: dict[int, Interval | None]
    answers: int
    unjudged: int
    unparsed: int
    length: float


def breakdown(answers: Answers, ks: Sequence[int]) -> list[Line]:
    """Return the line of all problems, and those of parts and of levels where there are several."""
    problems = [rollout.problem for rollout in answers.rollouts]
    lines = [_line("all", answers, np.arange(len(problems)), ks)]
    columns = ([problem.task for problem in problems], [f"level {problem.level}" for problem in problems])
    for column in columns:
        for name in sorted(set(column)) if len(set(column)) > 1 else ():
            places = np.array([place for place, one in enumerate(column) if one == name])
            lines.append(_line(name, answers, places, ks))
    return lines


def pass_at(right: np.ndarray, judged: np.ndarray, k: int) -> np.ndarray:
    """Return for each problem the chance that one of k of its n samples is right, float [P'].

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1): 1 - C(n - c, k) / C(n, k) of c right ones.
    right, judged: bool [P, n]; samples that were not judged do not count, problems with fewer than k others are out.
    """
    counts = judged.sum(1), (right & judged).sum(1)
    pairs = [(int(n), int(c)) for n, c in zip(*counts, strict=True) if n >= k]
    return np.array([1.0 - math.comb(n - c, k) / math.comb(n, k) for n, c in pairs])


def is_unparsed(score: Score) -> bool:
    """Whether no answer could be read, which counts as wrong."""
    return score.value is not None and score.parsed is None


def _line(name: str, answers: Answers, places: np.ndarray, ks: Sequence[int]) -> Line:
    right, judged = answers.sampled[places], answers.sampled_judged[places]
    samples = answers.sampled.shape[1]
    chosen = [(answers.rollouts[place], answers.scores[place]) for place in places]
    for place in places:
        run = slice(place * samples, (place + 1) * samples)
        chosen += zip(answers.sampled_rollouts[run], answers.sampled_scores[run], strict=True)
    return Line(
        name,
        len(places),
        _interval(answers.greedy[places][answers.greedy_judged[places]]),
        _interval(pass_at(right, judged, 1)),
        {k: _interval(pass_at(right, judged, k)) for k in ks},
        len(chosen),
        sum(score.value is None for _, score in chosen),
        sum(is_unparsed(score) for _, score in chosen),
        sum(rollout.length for rollout, _ in chosen) / max(1, len(chosen)),
    )


def _interval(values: np.ndarray) -> Interval | None:
    return bootstrap(values) if len(values) else None
