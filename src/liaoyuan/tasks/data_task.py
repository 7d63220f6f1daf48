"""A task whose problems come from a file: public sets, or a user's own prompts with answers.

A hash of the question decides the split, after width, case and idle spaces are made alike: near copies fall together,
and are drawn once. The same question is a test problem in every set that has it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from liaoyuan.data.permutation import permutation
from liaoyuan.errors import LiaoyuanError
from liaoyuan.tasks.layouts import Example, read_examples
from liaoyuan.tasks.problem import Problem, Score, Split, split_of
from liaoyuan.tasks.reward import Reward, Rollout, score_all
from liaoyuan.tasks.rewards.numbers import read_number
from liaoyuan.tasks.seen import normalised

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class DataTask:
    """Problems of a file, each judged by what its set is checked with.

    problems: of each (level, split), in the order of the file. checks: by the problems' keys, the name of the reward
        that says what is right. left_out: how many rows made no problem, by reason.
    """

    name: str
    levels: tuple[int, ...]
    problems: Mapping[tuple[int, Split], tuple[Problem, ...]] = field(repr=False)
    checks: Mapping[str, str] = field(repr=False)
    rewards: Mapping[str, Reward]
    left_out: Mapping[str, int]

    def problem(self, seed: int, index: int, level: int, split: Split = "train") -> Problem:
        """Return problem `index` of the stream `seed`: a shuffle of the split, then another one, and so on."""
        found = self.problems.get((level, split), ())
        if not found:
            raise LiaoyuanError(f"{self.name} has no {split} problem of level {level}.")
        turn, place = divmod(index, len(found))
        return found[permutation(len(found), seed, turn, level, SPLITS.index(split))[place]]

    def check(self, problem: Problem, text: str) -> Score:
        return self.check_all([(problem, text)])[0]

    def check_all(self, pairs: Sequence[tuple[Problem, str]]) -> list[Score]:
        """Judge many texts, all that one reward judges together."""
        scores = [Score(None, None, f"{self.name} does not have this problem")] * len(pairs)
        for name, reward in self.rewards.items():
            places = [place for place, (problem, _) in enumerate(pairs) if self.checks.get(problem.key) == name]
            found = score_all([reward], [Rollout(pairs[place][0], "", pairs[place][1]) for place in places])[0]
            for place, score in zip(places, found, strict=True):
                scores[place] = score
        return scores

    def all(self, level: int, split: Split) -> tuple[Problem, ...]:
        """Return every problem once, in the order of the file."""
        return tuple(self.problems.get((level, split), ()))

    def count(self, level: int, split: Split) -> int:
        """Return how many problems there are."""
        return len(self.problems.get((level, split), ()))


def open_data(
    name: str,
    path: Path | None,
    test: Path | None,
    kind: str,
    check: str,
    instruction: str,
    find_reward: Callable[[str], Reward],
) -> DataTask:
    """Read the problems of a file.

    path: problems for all three splits. test: a file whose problems are all for the test; whatever is like one of
        them is left out of the other. check: what judges answers, if not what the layout says.
    instruction: a line that is added to each question; it does not count for what is a copy.
    find_reward: gives the reward of a name that says what is right.

    Raises:
        LiaoyuanError: a file is missing or wrong, or holds no problem that can be used.
    """
    left_out: Counter[str] = Counter()
    seen: dict[str, Problem | None] = {}
    checks: dict[str, str] = {}
    splits: dict[str, Split] = {}
    for file, fixed in ((test, "test"), (path, None)):
        for key, example in _examples(file, kind, left_out) if file else ():
            problem = Problem(name, _asked(example, instruction), example.answer, example.thought, example.level, key)
            if not _is_new(seen, problem, left_out):
                continue
            checks[key] = check or example.check or _guessed(example)
            splits[key] = "test" if fixed else split_of(key)
    kept = [problem for problem in seen.values() if problem]
    if not kept:
        why = "".join(f"; {count} left out: {reason}" for reason, count in left_out.items())
        raise LiaoyuanError(f"{test or path} has no problem that can be used{why}.")
    rewards = {one: find_reward(one) for one in sorted({checks[problem.key] for problem in kept})}
    return DataTask(
        name,
        tuple(sorted({problem.level for problem in kept})),
        _grouped(kept, splits),
        {problem.key: checks[problem.key] for problem in kept},
        rewards,
        dict(left_out),
    )


def _examples(path: Path, kind: str, left_out: Counter[str]) -> Iterable[tuple[str, Example]]:
    for _, example in read_examples(path, kind):
        if isinstance(example, str):
            left_out[example] += 1
        elif not example.question or not example.answer:
            left_out["no question or no answer"] += 1
        else:
            yield normalised(example.question), example  # what all near copies of a question share


def _asked(example: Example, instruction: str) -> str:
    return f"{example.question}\n{instruction}" if instruction else example.question


def _is_new(seen: dict[str, Problem | None], problem: Problem, left_out: Counter[str]) -> bool:
    """Whether a problem is no copy; copies with other answers take the first one out too, as nobody knows the right."""
    if problem.key not in seen:
        seen[problem.key] = problem
        return True
    first = seen[problem.key]
    if first is not None and first.answer != problem.answer:
        seen[problem.key] = None
        left_out["a copy has another answer"] += 2
    else:
        left_out["copy"] += 1
    return False


def _guessed(example: Example) -> str:
    """Return what checks an answer of which nothing is said: a number is compared as one, other text word for word."""
    return "number" if read_number(example.answer) else "exact"


def _grouped(problems: Sequence[Problem], splits: Mapping[str, Split]) -> dict[tuple[int, Split], tuple[Problem, ...]]:
    groups: dict[tuple[int, Split], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.level, splits[problem.key]), []).append(problem)
    return {place: tuple(found) for place, found in groups.items()}
