"""Who stands where in a row: clues that leave exactly one order, which is proven by a search through all of them."""

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from liaoyuan.tasks.generated import Wording, Written, phrase
from liaoyuan.tasks.problem import Problem, Score

LEVELS = ((4, "<|&!=^"), (5, "<|&!=^"), (6, "<|&!=^"), (6, "<&!^"))  # how many people, and which kinds of clues
MARKS = "ABCDEF"
NAMES = {"en": ("Ann", "Bob", "Cid", "Dora", "Eve", "Finn"), "zh": tuple("甲乙丙丁戊己")}
ANSWER = re.compile(r"[A-F甲乙丙丁戊己](?:[ ,、]{0,2}[A-F甲乙丙丁戊己]){2,5}")
PLAIN = str.maketrans("甲乙丙丁戊己", MARKS, " ,、")
PHRASES = {
    "compact": ("{row}: {clues}",),
    "en": (
        "{names} stand in a row. {clues} In which order do they stand, from left to right? "
        "Answer with their first letters, such as {form}.",
        "{names} sit side by side on a bench. {clues} Who sits where? "
        "Write the first letters from left to right, such as {form}.",
        "There is only one way to line up {names} so that all of this is true: {clues} "
        "Give the first letters from left to right, such as {form}.",
    ),
    "zh": (
        "{names}站成一排。{clues}从左到右依次是谁？只写名字，例如{form}。",
        "{names}并排坐在长椅上。{clues}请从左到右写出他们的顺序，例如{form}。",
        "要让{names}排成一排并且满足下面所有的话，只有一种排法：{clues}从左到右写出来，例如{form}。",
    ),
}
SAID = {
    "compact": {"<": "{0}<{1}", "|": "{0}|{1}", "&": "{0}&{1}", "!": "{0}!{1}", "=": "{0}={2}", "^": "{0}^{2}"},
    "en": {
        "<": "{0} is somewhere to the left of {1}.",
        "|": "{0} is directly to the left of {1}.",
        "&": "{0} and {1} are neighbours.",
        "!": "{0} and {1} are not neighbours.",
        "=": "{0} is number {2} from the left.",
        "^": "{0} is not number {2} from the left.",
    },
    "zh": {
        "<": "{0}在{1}的左边。",
        "|": "{0}紧挨着{1}，在{1}的左边。",
        "&": "{0}和{1}相邻。",
        "!": "{0}和{1}不相邻。",
        "=": "{0}在左起第{2}个位置。",
        "^": "{0}不在左起第{2}个位置。",
    },
}
TRUE: dict[str, Callable[[int, int], bool]] = {  # of the places of both people, or of the place and another place
    "<": lambda one, other: one < other,
    "|": lambda one, other: one + 1 == other,
    "&": lambda one, other: abs(one - other) == 1,
    "!": lambda one, other: abs(one - other) > 1,
    "=": lambda one, other: one == other,
    "^": lambda one, other: one != other,
}
PAIRS, PLACES = "<|&!", "=^"  # clues about two people, and about one and a place

Clue = tuple[str, int, int]  # a key of TRUE, a person, and another person or a place


class Ordering:
    """ "ABCD: B<A,A!C,C=2,B|D"; the answer is the order, from left to right.

    B<A: somewhere to the left; B|A: directly; A&C: neighbours; A!C: no neighbours; C=2, C^2: second or not.
    The thought puts one after another in the row, as far as no clue is against it: "A,A!" means nobody may follow A.
    """

    name = "ordering"
    levels = range(1, len(LEVELS) + 1)

    def make(self, chance: random.Random, level: int) -> "Row":
        count, kinds = LEVELS[level - 1]
        order = chance.randrange(len(_orders(count)))
        clues, left = list[Clue](), (1 << len(_orders(count))) - 1
        known = _true_clues(count, order, kinds)
        for clue in chance.sample(known, len(known)):
            if left & (mask := _masks(count)[clue]) != left:
                clues.append(clue)
                left &= mask
            if left.bit_count() == 1:
                break
        return Row(count, order, tuple(_needed(count, clues)))

    def check(self, problem: Problem, text: str) -> Score:
        if not ANSWER.fullmatch(text.strip()):
            return Score(0.0, None, "no row of names")
        found, right = (answer.strip().translate(PLAIN) for answer in (text, problem.answer))
        return Score(float(found == right), found, "" if found == right else f"not {right}")


@functools.cache
def _orders(count: int) -> tuple[tuple[int, ...], ...]:
    return tuple(itertools.permutations(range(count)))


@functools.cache
def _masks(count: int) -> dict[Clue, int]:
    """Return every clue with the orders (bit i: the i-th) in which it is true."""
    pairs = itertools.permutations(range(count), 2)
    clues = [(kind, one, other) for one, other in pairs for kind in PAIRS if kind in "<|" or one < other]
    clues += [(kind, one, place) for kind in PLACES for one in range(count) for place in range(count)]
    masks = dict.fromkeys(clues, 0)
    for bit, order in enumerate(_orders(count)):
        places = [order.index(person) for person in range(count)]
        for kind, one, other in clues:
            if TRUE[kind](places[one], places[other] if kind in PAIRS else other):
                masks[kind, one, other] |= 1 << bit
    return masks


@functools.cache
def _true_clues(count: int, order: int, kinds: str) -> tuple[Clue, ...]:
    return tuple(clue for clue, mask in _masks(count).items() if mask >> order & 1 and clue[0] in kinds)


def _needed(count: int, clues: Sequence[Clue]) -> list[Clue]:
    """Return the clues without those that the others make needless."""
    kept, masks = list(clues), _masks(count)
    for clue in clues:
        others = [one for one in kept if one != clue]
        left = functools.reduce(int.__and__, (masks[one] for one in others), -1)
        if left.bit_count() == 1 and others:
            kept = others
    return kept


@dataclass(frozen=True)
class Row:
    """How many people, the number of their order among all, and the clues that leave no other."""

    count: int
    order: int
    clues: tuple[Clue, ...]

    @property
    def content(self) -> str:
        """The clues with the people numbered from left to right: puzzles that differ in names alone share it."""
        places = {person: place for place, person in enumerate(_orders(self.count)[self.order])}
        return ",".join(sorted(self._said(clue, MARKS, places) for clue in self.clues)) + f" of {self.count}"

    def written(self, wording: Wording, chance: random.Random) -> Written:
        names = NAMES.get(wording, MARKS)[: self.count]
        initials = [name[0] for name in names]
        between = {"compact": ",", "en": " ", "zh": ""}[wording]
        listed = "、".join(names) if wording == "zh" else f"{', '.join(names[:-1])} and {names[-1]}"
        clues = between.join(
            SAID[wording][kind].format(names[one], names[other] if kind in PAIRS else "", other + 1)
            for kind, one, other in self.clues
        )
        question = phrase(
            PHRASES, wording, chance, names=listed, clues=clues, row="".join(initials), form="".join(initials)
        )
        answer = "".join(initials[person] for person in _orders(self.count)[self.order])
        return Written(question, answer, tuple(self._steps(initials)))

    def _steps(self, names: Sequence[str]) -> Iterator[str]:
        """Yield rows from the left as far as the clues allow, "!" after one that cannot go on; the last, the answer,
        is left out.
        """
        waiting: list[tuple[int, ...]] = [
            (person,) for person in reversed(range(self.count)) if self._may_be((person,))
        ]
        while waiting:
            row = waiting.pop()
            if len(row) == self.count:
                return
            others = [person for person in reversed(range(self.count)) if person not in row]
            following = [(*row, person) for person in others if self._may_be((*row, person))]
            yield "".join(names[person] for person in row) + ("," if following else "!,")
            waiting += following

    def _may_be(self, row: Sequence[int]) -> bool:
        """Return whether every clue about those in the row holds, given that all others stand further right."""
        places = {person: place for place, person in enumerate(row)}
        later = len(row)  # the place where the others begin
        for kind, one, other in self.clues:
            first = places.get(one)
            second = places.get(other) if kind in PAIRS else other
            if first is not None and second is not None:
                possible = TRUE[kind](first, second)
            elif kind in PAIRS:
                possible = may_hold(kind, first, second, later)
            else:
                possible = kind == "^" or other >= later
            if not possible:
                return False
        return True

    def _said(self, clue: Clue, names: Sequence[str], places: dict[int, int]) -> str:
        kind, one, other = clue
        first, second = places[one], places[other] if kind in PAIRS else other
        pair = sorted((first, second)) if kind in "&!" else [first, second]
        return SAID["compact"][kind].format(names[pair[0]], names[pair[1]] if kind in PAIRS else "", second + 1)


def may_hold(kind: str, first: int | None, second: int | None, later: int) -> bool:
    """Return whether a clue of which at most one place is known may still hold, the others being from `later` on."""
    if kind in "!^" or (first is None and second is None):
        return True
    if kind == "=":
        return max(place for place in (first, second) if place is not None) >= later
    if first is None:  # the second stands, so the first is further right
        return kind == "&" and second == later - 1
    return kind == "<" or first == later - 1
