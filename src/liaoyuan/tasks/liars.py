"""Truth-tellers and liars: everybody says one thing, and exactly one assignment agrees with all that is said."""

import functools
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from liaoyuan.tasks.generated import Wording, Written, phrase
from liaoyuan.tasks.problem import Problem, Score

PEOPLE = (3, 4, 5, 6)  # level by level
CANONICAL = 4  # up to so many people, puzzles that differ in their names and their order alone are one puzzle
MARKS = "ABCDEF"
NAMES = {"en": ("Ann", "Bob", "Cid", "Dora", "Eve", "Finn"), "zh": tuple("甲乙丙丁戊己")}
ANSWER = re.compile(r"[TL真假](?:[ ,、]{0,2}[TL真假]){1,7}")
PLAIN = str.maketrans("真假", "TL", " ,、")
PHRASES = {
    "compact": ("{said}",),
    "en": (
        "Everyone here either always tells the truth or always lies. {said} Who tells the truth (T), and who lies (L)? "
        "Answer with a letter for each of {names}, such as {form}.",
        "{names} are each a truth-teller or a liar. {said} Write T (truth) or L (lie) for each of them in this order, "
        "such as {form}.",
        "On an island some always lie and all others never do. {said} What are {names}? "
        "Answer with T for truth and L for lie, such as {form}.",
    ),
    "zh": (
        "这里的每个人要么总说真话，要么总说假话。{said}{names}各是哪一种？依次写“真”或“假”，例如{form}。",
        "{names}每人不是只说真话，就是只说假话。{said}请按顺序用“真”和“假”写出每个人的情况，例如{form}。",
        "岛上有人只说真话，其余的人只说假话。{said}判断{names}说的是真是假，按顺序写，例如{form}。",
    ),
}
SAYS = {
    "en": {
        "+": "“{0} tells the truth.”",
        "-": "“{0} lies.”",
        "=": "“{0} and {1} are of the same kind.”",
        "/": "“{0} and {1} are of different kinds.”",
        "#": "“The number of liars among us is {2}.”",
    },
    "zh": {
        "+": "“{0}说真话。”",
        "-": "“{0}说假话。”",
        "=": "“{0}和{1}是同一种人。”",
        "/": "“{0}和{1}不是同一种人。”",
        "#": "“我们当中恰好有{2}个人说假话。”",
    },
}

Statement = tuple[str, int, int]  # kind, and two people, or a number; see `holds`


class Liars:
    """ "A:B-,B:A=C,C:#2"; the answer is "TLT": A and C tell the truth, B lies.

    B- (or B+): B lies (or does not). A=C, A/C: they are of the same kind, of different kinds. #2: exactly two lie.
    The thought supposes one kind after another, and where somebody's words do not agree with it, names him: "LT!B,".
    """

    name = "liars"
    levels = range(1, len(PEOPLE) + 1)

    def make(self, chance: random.Random, level: int) -> "Puzzle":
        count = PEOPLE[level - 1]
        tables = [list(masks.items()) for masks in _tables(count)]
        while True:
            drawn = [chance.choice(table) for table in tables]
            left = functools.reduce(int.__and__, (mask for _, mask in drawn))
            if left.bit_count() == 1:
                return Puzzle(tuple(statement for statement, _ in drawn), left.bit_length() - 1)

    def check(self, problem: Problem, text: str) -> Score:
        if not ANSWER.fullmatch(text.strip()):
            return Score(0.0, None, "no row of T and L")
        found, right = (answer.strip().translate(PLAIN) for answer in (text, problem.answer))
        return Score(float(found == right), found, "" if found == right else f"not {right}")


def holds(statement: Statement, kinds: Sequence[bool]) -> bool:
    """Return whether a statement is true where kinds[i] says whether person i tells the truth."""
    kind, first, second = statement
    if kind == "#":
        return sum(not one for one in kinds) == first
    if kind in "+-":
        return kinds[first] == (kind == "+")
    return (kinds[first] == kinds[second]) == (kind == "=")


@functools.cache
def _tables(count: int) -> tuple[dict[Statement, int], ...]:
    """Return for each person what he may say, with a mask of the assignments (bit i: the i-th) that agree with it."""
    everything: list[Statement] = [("#", liars, 0) for liars in range(count + 1)]
    everything += [(kind, one, 0) for kind in "+-" for one in range(count)]
    pairs = itertools.combinations(range(count), 2)
    everything += [(kind, *pair) for pair in pairs for kind in "=/"]
    tables = []
    for speaker in range(count):
        others = [one for one in everything if one[0] == "#" or speaker != one[1]]
        masks = {}
        for statement in others:
            agrees = (kinds[speaker] == holds(statement, kinds) for kinds in _assignments(count))
            masks[statement] = sum(1 << place for place, true in enumerate(agrees) if true)
        tables.append(masks)
    return tuple(tables)


@functools.cache
def _assignments(count: int) -> tuple[tuple[bool, ...], ...]:
    return tuple(itertools.product((True, False), repeat=count))


@dataclass(frozen=True)
class Puzzle:
    """What each person says, and which assignment is the only one that agrees with it all."""

    statements: tuple[Statement, ...]
    solution: int

    @property
    def content(self) -> str:
        orders = itertools.permutations(range(len(self.statements)))
        return min(map(self._renamed, orders)) if len(self.statements) <= CANONICAL else self._notation(MARKS)

    def written(self, wording: Wording, chance: random.Random) -> Written:
        names = NAMES.get(wording, MARKS)[: len(self.statements)]
        kinds = _assignments(len(names))[self.solution]
        letters = "真假" if wording == "zh" else "TL"
        said = self._notation(MARKS) if wording == "compact" else self._said(wording, names)
        form = "".join(letters[place % 2] for place in range(len(names)))
        listed = "、".join(names) if wording == "zh" else f"{', '.join(names[:-1])} and {names[-1]}"
        question = phrase(PHRASES, wording, chance, said=said, names=listed, form=form)
        answer = "".join(letters[not kind] for kind in kinds)
        return Written(question, answer, tuple(self._steps(letters, [name[0] for name in names])))

    def _steps(self, letters: str, names: Sequence[str]) -> Iterator[str]:
        """Yield what is supposed, one person after another, T first, until all agrees; that is the answer."""
        waiting: list[tuple[bool, ...]] = [(False,), (True,)]
        while waiting:
            kinds = waiting.pop()
            wrong = [place for place in range(len(kinds)) if self._disagrees(place, kinds)]
            if not wrong and len(kinds) == len(self.statements):
                return
            supposed = "".join(letters[not kind] for kind in kinds)
            yield f"{supposed}!{names[wrong[0]]}," if wrong else f"{supposed},"
            waiting += [] if wrong else [(*kinds, False), (*kinds, True)]

    def _disagrees(self, speaker: int, kinds: Sequence[bool]) -> bool:
        """Return whether the speaker's words, where enough is supposed to judge them, do not agree with his kind."""
        kind, first, second = self.statements[speaker]
        needed = len(self.statements) if kind == "#" else 1 + max(first, second)
        return len(kinds) >= needed and kinds[speaker] != holds(self.statements[speaker], kinds)

    def _renamed(self, order: Sequence[int]) -> str:
        """Return the notation after person i has become person order[i]."""
        said = [self.statements[0]] * len(order)
        for speaker, (kind, first, second) in enumerate(self.statements):
            pair = (
                sorted((order[first], order[second])) if kind in "=/" else [order[first] if kind != "#" else first, 0]
            )
            said[order[speaker]] = (kind, pair[0], pair[1])
        return Puzzle(tuple(said), 0)._notation(MARKS)

    def _notation(self, names: Sequence[str]) -> str:
        written = {"#": "#{2}", "+": "{0}+", "-": "{0}-", "=": "{0}={1}", "/": "{0}/{1}"}
        return ",".join(f"{name}:{said}" for name, said in zip(names, self._filled(written, names), strict=False))

    def _said(self, wording: Wording, names: Sequence[str]) -> str:
        verb, end = ("说：", "") if wording == "zh" else (" says: ", " ")
        each = zip(names, self._filled(SAYS[wording], names), strict=True)
        return end.join(f"{name}{verb}{said}" for name, said in each)

    def _filled(self, forms: dict[str, str], names: Sequence[str]) -> Iterator[str]:
        for kind, first, second in self.statements:
            one, other = (names[first], names[second]) if kind != "#" else ("", "")
            yield forms[kind].format(one, other, first)
