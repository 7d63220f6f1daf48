"""Who lives where with what (a zebra puzzle, also called Einstein's riddle): clues that leave exactly one grid.

That there is no other is proven by asking every grid. The worked solution fills the houses from left to right.
"""

import functools
import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from liaoyuan.tasks.generated import Wording, Written, phrase
from liaoyuan.tasks.ordering import TRUE, may_hold
from liaoyuan.tasks.problem import Problem, Score

LEVELS = ((3, 2), (3, 3), (4, 2), (4, 3))  # how many houses, and what is asked of each: people and pets, or drinks too
KINDS = "=^|&<"
MARKS = ("ABCD", "abcd", "wxyz")
NAMES = {
    "compact": tuple(tuple(marks) for marks in MARKS),
    "en": (("Ann", "Bob", "Cid", "Dora"), ("cat", "dog", "fish", "owl"), ("tea", "milk", "juice", "water")),
    "zh": (tuple("甲乙丙丁"), tuple("猫狗鱼鸟"), tuple("茶奶水酒")),
}
WHO = {  # how somebody is called by his name, his pet or his drink
    "compact": ("{}", "{}", "{}"),
    "en": ("{}", "the owner of the {}", "the drinker of {}"),
    "zh": ("{}", "养{}的人", "喝{}的人"),
}
SAID = {
    "compact": {kind: "{0}" + kind + "{1}" for kind in KINDS},
    "en": {
        "=": "{0} is {1}.",
        "^": "{0} is not {1}.",
        "|": "{0} lives directly to the left of {1}.",
        "&": "{0} and {1} are neighbours.",
        "<": "{0} lives somewhere to the left of {1}.",
    },
    "zh": {
        "=": "{0}就是{1}。",
        "^": "{0}不是{1}。",
        "|": "{0}住在{1}左边的隔壁。",
        "&": "{0}和{1}是邻居。",
        "<": "{0}住在{1}的左边。",
    },
}
OF_HOUSES = {
    "compact": SAID["compact"],
    "en": {"=": "{0} lives in house {1}.", "^": "{0} does not live in house {1}."},
    "zh": {"=": "{0}住在{1}号房子。", "^": "{0}不住在{1}号房子。"},
}
KEPT = {
    "compact": ("", ""),
    "en": ("each with a pet of their own ({0})", ", each with a drink of their own ({0})"),
    "zh": ("每人养一种不同的动物（{0}）", "，喝一种不同的饮料（{0}）"),
}
PHRASES = {
    "compact": ("{row}: {clues}",),
    "en": (
        "{names} live in {count} houses in a row, numbered from left to right, {kept}. {clues} "
        "Who lives where, and with what? Write the first letters, house by house, such as {form}.",
        "In a street there are {count} houses, number 1 on the left. {names} live there, {kept}. {clues} "
        "Say who and what is in each house by first letters, from left to right, such as {form}.",
    ),
    "zh": (
        "{names}住在一排{count}座房子里，从左到右编号，{kept}。{clues}每座房子里是谁、有什么？从左到右写，例如{form}。",
        "街上有{count}座房子，最左边是1号。{names}各住一座，{kept}。{clues}请从左到右写出每座房子里的人和东西，例如{form}。",
    ),
}
SEPARATORS = str.maketrans("", "", " ,;、，；")
ANSWER = re.compile(r"[A-D甲乙丙丁a-z猫狗鱼鸟茶奶水酒 ,;、，；]+")

Clue = tuple[str, int, int]  # a key of TRUE, and two of: people, pets, drinks, houses, numbered in this order


class Zebra:
    """ "ABC abc: A|b,c=3,B^a"; the answer is each house from left to right: "Aa Cb Bc".

    A=b: they are in one house; A=2: in the second; A^b: not in one; A|b: directly to the left; A&b: next door; A<b:
    somewhere to the left. The thought fills house after house, as far as no clue is against it.
    """

    name = "zebra"
    levels = range(1, len(LEVELS) + 1)

    def make(self, chance: random.Random, level: int) -> "Street":
        count, kinds = LEVELS[level - 1]
        grids = _grids(count, kinds)
        places = grids[:, chance.randrange(grids.shape[1])]
        known = _true_clues(count, kinds, places.tolist())
        clues: dict[Clue, np.ndarray] = {}
        left = np.ones(grids.shape[1], dtype=bool)
        while left.sum() > 1:
            kind, one, other = clue = chance.choice(known[chance.choice(KINDS)])
            holds = np.asarray(TRUE[kind](grids[one], grids[other]))
            if not np.all(holds[left]):
                clues[clue] = holds
                left &= holds
        return Street(count, kinds, tuple(places.tolist()), tuple(_needed(clues)))

    def check(self, problem: Problem, text: str) -> Score:
        if not ANSWER.fullmatch(text.strip()):
            return Score(0.0, None, "no row of houses")
        found, right = (answer.translate(SEPARATORS) for answer in (text.strip(), problem.answer))
        return Score(float(found == right), text.strip(), "" if found == right else f"not {problem.answer}")


@functools.cache
def _grids(count: int, kinds: int) -> np.ndarray:
    """Return the place of each thing (a row) in every grid (a column), int8; those of the houses never change."""
    orders = np.array(list(itertools.permutations(range(count))), dtype=np.int8).T
    chosen = np.indices((math.factorial(count),) * kinds).reshape(kinds, -1)
    houses = np.repeat(np.arange(count, dtype=np.int8)[:, None], chosen.shape[1], axis=1)
    return np.concatenate([*(orders[:, choice] for choice in chosen), houses])


def _true_clues(count: int, kinds: int, places: Sequence[int]) -> dict[str, list[Clue]]:
    """Return what may be said of a grid, by kind; two things of one sort are never said to be in one house or not."""
    things = count * kinds
    found: dict[str, list[Clue]] = {kind: [] for kind in KINDS}
    for one, other in itertools.permutations(range(things + count), 2):
        is_house = other >= things
        for kind in KINDS if one < things else "":
            is_odd = (kind in "|&<" and is_house) or (kind in "=^" and one // count == other // count)
            is_twice = kind in "=^&" and one > other
            if not is_odd and not is_twice and TRUE[kind](places[one], places[other]):
                found[kind].append((kind, one, other))
    return {kind: clues or found["="] for kind, clues in found.items()}


def _needed(clues: dict[Clue, np.ndarray]) -> list[Clue]:
    """Return the clues without those that the others make needless."""
    kept = list(clues)
    for clue in clues:
        others = [one for one in kept if one != clue]
        if others and np.logical_and.reduce([clues[one] for one in others]).sum() == 1:
            kept = others
    return kept


@dataclass(frozen=True)
class Street:
    """Houses in a row, in which house each thing is (the houses' own numbers last), and the clues that leave no other
    way.
    """

    count: int
    kinds: int
    places: tuple[int, ...]
    clues: tuple[Clue, ...]

    @property
    def content(self) -> str:
        """The clues, each thing named by its house: puzzles that differ in names alone share it."""
        names = [f"{'ABC1'[thing // self.count]}{place + 1}" for thing, place in enumerate(self.places)]
        said = []
        for kind, one, other in self.clues:
            pair = (names[one], names[other])
            said.append(kind.join(sorted(pair) if kind in "=^&" else pair))
        return ",".join(sorted(said)) + f" of {self.count}x{self.kinds}"

    def written(self, wording: Wording, chance: random.Random) -> Written:
        names = [each[: self.count] for each in NAMES[wording][: self.kinds]]
        marks = [name[0] for each in names for name in each]
        listed = [_listed(wording, each) for each in names]
        kept = "".join(form.format(each) for form, each in zip(KEPT[wording], listed[1:], strict=False))
        row = " ".join("".join(each) for each in names)
        form = self._houses(marks, [(place,) * self.kinds for place in range(self.count)], " ")
        clues = {"compact": ",", "en": " ", "zh": ""}[wording].join(self._said(wording, names))
        question = phrase(
            PHRASES, wording, chance, names=listed[0], count=self.count, kept=kept, clues=clues, row=row, form=form
        )
        order = np.argsort(np.reshape(self.places[: self.count * self.kinds], (self.kinds, -1)), axis=1).T.tolist()
        return Written(question, self._houses(marks, order, " "), tuple(self._steps(marks)))

    def _said(self, wording: Wording, names: Sequence[Sequence[str]]) -> Iterator[str]:
        things = [WHO[wording][sort].format(name) for sort, each in enumerate(names) for name in each]
        for kind, one, other in self.clues:
            is_house = other >= len(things)
            form = (OF_HOUSES if is_house else SAID)[wording][kind]
            said = form.format(things[one], other - len(things) + 1 if is_house else things[other])
            yield said[0].upper() + said[1:] if wording == "en" else said

    def _steps(self, marks: Sequence[str]) -> Iterator[str]:
        """Yield the houses from the left as far as the clues allow, "!" after what cannot go on; the last, the answer,
        is left out.
        """
        waiting: list[tuple[tuple[int, ...], ...]] = [()]
        while waiting:
            row = waiting.pop()
            if len(row) == self.count:
                return
            free = [[name for name in range(self.count) if name not in used] for used in zip(*row, strict=True)]
            every = free or [list(range(self.count))] * self.kinds
            following = [(*row, house) for house in itertools.product(*every) if self._may_be((*row, house))]
            if row:
                yield self._houses(marks, row, "") + ("," if following else "!,")
            waiting += reversed(following)

    def _may_be(self, row: Sequence[Sequence[int]]) -> bool:
        """Return whether every clue may hold where these houses are filled and all else is further right."""
        things = self.count * self.kinds
        places = {things + house: house for house in range(self.count)}
        for place, house in enumerate(row):
            places |= {sort * self.count + name: place for sort, name in enumerate(house)}
        for kind, one, other in self.clues:
            first, second = places.get(one), places.get(other)
            if first is not None and second is not None:
                possible = TRUE[kind](first, second)
            else:
                possible = may_hold(kind, first, second, len(row))
            if not possible:
                return False
        return True

    def _houses(self, marks: Sequence[str], row: Sequence[Sequence[int]], between: str) -> str:
        return between.join(
            "".join(marks[sort * self.count + name] for sort, name in enumerate(house)) for house in row
        )


def _listed(wording: Wording, names: Sequence[str]) -> str:
    return "、".join(names) if wording == "zh" else f"{', '.join(names[:-1])} and {names[-1]}"
