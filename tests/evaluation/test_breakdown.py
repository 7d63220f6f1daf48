"""The table of an evaluation: pass@k without bias, unjudged answers left out, parts and levels apart."""

import itertools

import numpy as np
import pytest

from liaoyuan.evaluation import Answers, breakdown, pass_at
from liaoyuan.tasks import Problem, Rollout, Score


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples() -> None:
    """Against counting: of every k of the n samples, whether one is right."""
    right = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=bool)
    for k in (1, 2, 3, 5):
        counted = [np.mean([any(row[list(some)]) for some in itertools.combinations(range(5), k)]) for row in right]
        assert pass_at(right, np.ones_like(right), k) == pytest.approx(counted)


def test_samples_that_were_not_judged_do_not_count() -> None:
    right = np.array([[1, 0, 0, 0], [1, 0, 0, 0]], dtype=bool)
    judged = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=bool)
    assert pass_at(right, judged, 1).tolist() == [0.5, 1.0]
    assert pass_at(right, judged, 2).tolist() == [1.0]  # the second problem has no two samples
    assert pass_at(right, judged, 3).tolist() == []


def test_lines_of_parts_and_levels() -> None:
    problems = [
        Problem("one", "", "7", "", 1, "a"),
        Problem("one", "", "7", "", 2, "b"),
        Problem("two", "", "7", "", 2, "c"),
    ]
    values: list[list[Score]] = [
        [Score(1.0, "7"), Score(1.0, "7"), Score(0.0, "8")],
        [Score(0.0, None, "cut off"), Score(None, None, "?"), Score(0.0, None)],
        [Score(None, None, "?"), Score(None), Score(None)],
    ]
    lines = {line.name: line for line in breakdown(answers(problems, values), [2])}
    assert list(lines) == ["all", "one", "two", "level 1", "level 2"]
    whole = lines["all"]
    assert (whole.problems, whole.answers, whole.unjudged, whole.unparsed) == (3, 9, 4, 2)
    assert whole.greedy is not None and whole.greedy.mean == 0.5  # of the two that were judged
    assert whole.sampled is not None and whole.sampled.mean == 0.25
    assert whole.passes[2] is not None and whole.passes[2].mean == 1.0
    assert lines["two"].greedy is None and lines["two"].passes[2] is None and lines["two"].length == 5.0
    assert lines["level 1"].greedy is not None and lines["level 1"].greedy.mean == 1.0


def answers(problems: list[Problem], values: list[list[Score]]) -> Answers:
    """Return answers whose first score is the greedy one's, the others those of samples."""
    greedy, sampled = [row[0] for row in values], [score for row in values for score in row[1:]]
    samples = len(values[0]) - 1
    shape = (len(problems), samples)
    rollouts = [Rollout(problem, "", "", length=5) for problem in problems]
    return Answers(
        greedy=np.array([score.is_right for score in greedy]),
        sampled=np.array([score.is_right for score in sampled]).reshape(shape),
        levels=np.array([problem.level for problem in problems]),
        thought_lengths=np.zeros(len(problems)),
        thoughts=[],
        texts=[],
        greedy_judged=np.array([score.value is not None for score in greedy]),
        sampled_judged=np.array([score.value is not None for score in sampled]).reshape(shape),
        rollouts=rollouts,
        scores=greedy,
        sampled_rollouts=[rollout for rollout in rollouts for _ in range(samples)],
        sampled_scores=sampled,
    )
