"""A task whose problems come from a file: public sets, or a user's own prompts with answers, in any layout of `data`.

A hash of the question decides the split, after width, case and idle spaces are made alike: near copies fall together,
and are drawn once. The same question is a test problem in every set that has it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from liaoyuan.data import Record, read_examples
from liaoyuan.data.formats import LAYOUTS, OWN
from liaoyuan.data.permutation import permutation
from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.tasks.problem import Problem, Score, Split, split_of
from liaoyuan.tasks.reward import Reward, Rollout, score_all
from liaoyuan.tasks.rewards.numbers import read_number
from liaoyuan.tasks.seen import normalised

TESTED = "code"  # the check whose right answer is tests: nothing that anybody should say
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
    skip_bad: bool,
    check: str,
    instruction: str,
    find_reward: Callable[[str], Reward],
) -> DataTask:
    """Read the problems of a file.

    path: problems for all three splits. test: a file whose problems are all for the test; whatever is like one of
        them is left out of the other.
    kind: the layout that the files have to have, or records made of it; empty: any, recognised row by row.
    skip_bad: leave bad rows out. check: what judges answers, if not what the layout says.
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
        for record in _records(file, kind, skip_bad, left_out) if file else ():
            judged = check or record.task or _guessed(record.answer)
            problem = _problem(name, record, instruction, judged)
            if _is_new(seen, problem, left_out):
                checks[problem.key] = judged
                splits[problem.key] = "test" if fixed else split_of(problem.key)
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


def _records(path: Path, kind: str, skip_bad: bool, left_out: Counter[str]) -> Iterator[Record]:
    """Yield the records that pose a problem: one question of the user's, with an answer."""
    names = [OWN, *(layout.name for layout in LAYOUTS)]
    if kind and kind not in names:
        raise LiaoyuanError(f"{path}: there is no layout '{kind}' ({', '.join(names)}){nearest(kind, names)}")
    records, tally = read_examples(path, skip_bad)
    others = sorted(tally.layouts.keys() - {kind, OWN}) if kind else []
    if others:
        raise LiaoyuanError(
            f"{path} has rows of the layout '{others[0]}', not '{kind}': change `kind`, or leave it out."
        )
    left_out.update({f"expected {expected}": places.count for expected, places in tally.bad.items()})
    for record in records:
        asked = [message for message in record.messages if message.role != "assistant"]
        if len(asked) == 1 and asked[0].role == "user" and asked[0].content.strip() and record.answer.strip():
            yield record
        else:
            left_out["no single question of the user's with an answer"] += 1


def _problem(name: str, record: Record, instruction: str, check: str) -> Problem:
    question = next(message.content for message in record.messages if message.role == "user")
    said, thought = next(((one.content, one.think) for one in record.messages if one.role == "assistant"), ("", ""))
    is_shown = record.kind == "chat" and said != record.answer
    solution = (said if is_shown else "") if check == TESTED else None
    asked = f"{question}\n{instruction}" if instruction else question
    key = normalised(question)  # what all near copies of a question share
    return Problem(name, asked, record.answer, thought, record.level, key, (), record.source, record.licence, solution)


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


def _guessed(answer: str) -> str:
    """Return what checks an answer of which nothing is said: a number is compared as one, other text word for word."""
    return "number" if read_number(answer) else "exact"


def _grouped(problems: Sequence[Problem], splits: Mapping[str, Split]) -> dict[tuple[int, Split], tuple[Problem, ...]]:
    groups: dict[tuple[int, Split], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.level, splits[problem.key]), []).append(problem)
    return {place: tuple(found) for place, found in groups.items()}
