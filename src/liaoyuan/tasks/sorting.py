"""Sorting by insertion: one number after another is put into the part that is sorted already."""

import bisect
import random
import re
from dataclasses import dataclass

from liaoyuan.tasks.generated import Wording, Written, content_of, phrase
from liaoyuan.tasks.problem import Problem, Score

SIZES = ((3, 1), (4, 1), (5, 1), (5, 2), (7, 2), (9, 2), (10, 3))  # how many numbers of how many digits at most
ANSWER = re.compile(r"(?:0|[1-9][0-9]{0,3})(?:(?: ?[,、] ?| )(?:0|[1-9][0-9]{0,3})){1,15}")
BETWEEN = {"compact": " ", "en": ", ", "zh": "、"}
PHRASES = {
    "compact": ("sort {numbers}",),
    "en": (
        "Sort these numbers from the smallest to the largest: {numbers}.",
        "Put {numbers} in ascending order.",
        "Write the numbers {numbers} again, the smallest first.",
    ),
    "zh": (
        "把下列各数从小到大排列：{numbers}。",
        "请将{numbers}按从小到大的顺序写出来。",
        "将{numbers}重新排列，最小的在前。",
    ),
}


class Sorting:
    """ "sort 5 2 9 1"; the thought shows the sorted part after each insertion: "2 5;2 5 9;". The last is the answer."""

    name = "sorting"
    levels = range(1, len(SIZES) + 1)

    def make(self, chance: random.Random, level: int) -> "Numbers":
        count, digits = SIZES[level - 1]
        return Numbers(tuple(chance.randrange(10**digits) for _ in range(count)))

    def check(self, problem: Problem, text: str) -> Score:
        if not ANSWER.fullmatch(text.strip()):
            return Score(0.0, None, "no list of numbers")
        found = [int(number) for number in re.findall(r"[0-9]+", text)]
        given = sorted(int(number) for number in content_of(problem).split())
        reason = (
            "" if found == given else "not sorted" if sorted(found) == given else "other numbers than the given ones"
        )
        return Score(float(not reason), " ".join(map(str, found)), reason)


@dataclass(frozen=True)
class Numbers:
    """What is to be sorted."""

    numbers: tuple[int, ...]

    @property
    def content(self) -> str:
        return " ".join(map(str, self.numbers))

    def written(self, wording: Wording, chance: random.Random) -> Written:
        between = BETWEEN[wording]
        question = phrase(PHRASES, wording, chance, numbers=between.join(map(str, self.numbers)))
        done, steps = [self.numbers[0]], []
        for number in self.numbers[1:]:
            bisect.insort(done, number)
            steps.append(" ".join(map(str, done)) + ";")
        return Written(question, between.join(map(str, done)), tuple(steps[:-1]))
