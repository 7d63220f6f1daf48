"""Units: conversions and sums of lengths, weights, times and volumes, all of whole numbers."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from liaoyuan.tasks.generated import Wording, Written, content_of, phrase
from liaoyuan.tasks.problem import Problem, Score

KINDS = (  # of units, the largest first, each with how many of the next it is
    (("km", 1000), ("m", 100), ("cm", 10), ("mm", 1)),
    (("t", 1000), ("kg", 1000), ("g", 1)),
    (("d", 24), ("h", 60), ("min", 60), ("s", 1)),
    (("l", 1000), ("ml", 1)),
)
LARGEST = 99  # number before the larger unit
WORDS = (
    *(
        ("km", "kilometres", "千米"),
        ("m", "metres", "米"),
        ("cm", "centimetres", "厘米"),
        ("mm", "millimetres", "毫米"),
    ),
    *(("t", "tonnes", "吨"), ("kg", "kilograms", "千克"), ("g", "grams", "克")),
    *(("d", "days", "天"), ("h", "hours", "小时"), ("min", "minutes", "分"), ("s", "seconds", "秒")),
    *(("l", "litres", "升"), ("ml", "millilitres", "毫升")),
)
NAMES: dict[str, dict[str, str]] = {
    "en": {unit: name for unit, name, _ in WORDS},
    "zh": {unit: name for unit, _, name in WORDS},
}
UNITS = {spelling: row[0] for row in WORDS for spelling in (*row, row[1].removesuffix("s"))}  # one kilometre
AMOUNT = re.compile(r"(0|[1-9][0-9]{0,8}) ?([a-z]+|[\u4e00-\u9fff]+)?(?:,? (?:and )?|(?<=[a-z\u4e00-\u9fff])|$)")
PHRASES = {
    "convert": {
        "compact": ("{sum}=?{unit}",),
        "en": ("How many {unit} are {sum}?", "Convert {sum} to {unit}.", "Express {sum} in {unit}."),
        "zh": ("{sum}等于多少{unit}？", "把{sum}换算成{unit}。", "{sum}一共是多少{unit}？"),
    },
    "split": {
        "compact": ("{sum}=?{large}?{small}",),
        "en": (
            "How many {large} and {small} are {sum}? Answer like {form}.",
            "Write {sum} in {large} and {small}, such as {form}.",
        ),
        "zh": ("{sum}是多少{large}多少{small}？请写成“{form}”的形式。", "把{sum}写成{large}和{small}，例如{form}。"),
    },
}


class Units:
    """By level: "7km=?m", "3m45cm=?cm", "3m45cm+2m80cm=?cm", "155min=?h?min", "3h45min+1h50min=?h?min".

    The thought multiplies and adds: "3*100=300;300+45=345;".
    """

    name = "units"
    levels = range(1, 7)

    def make(self, chance: random.Random, level: int) -> "Amounts":
        kind = chance.choice(KINDS)
        place = chance.randrange(len(kind) - 1)
        (large, factor), (small, _) = kind[place], kind[place + 1]
        return Amounts(large, small, factor, level, tuple(_terms(chance, level, factor)))

    def check(self, problem: Problem, text: str) -> Score:
        found, right = _read(text.strip()), _read(problem.answer)
        if found is None or right is None:
            return Score(0.0, None, "no amount")
        asked = content_of(problem).partition("=?")[2]
        if len(found) == 1 and found[0][1] in ("", asked):
            found = [(found[0][0], "")]
        is_right = found == right
        shown = " ".join(f"{number}{unit}" for number, unit in found)
        return Score(float(is_right), shown, "" if is_right else f"not {problem.answer}")


def _terms(chance: random.Random, level: int, factor: int) -> Iterator[tuple[int, int]]:
    """Yield (of the larger unit, of the smaller one) of each term."""
    if level == 1:
        yield chance.randint(1, LARGEST), 0
    elif level == 4:
        yield 0, chance.randrange(factor + 1, 20 * factor)
    else:
        for _ in range({2: 1, 3: 2, 5: 2, 6: 3}[level]):
            yield chance.randint(1, 20), chance.randrange(1, factor)


def _read(text: str) -> list[tuple[int, str]] | None:
    """Return the one or two amounts of a text, (number, unit in its short form, or nothing); None if it is no such."""
    found, place = list[tuple[int, str]](), 0
    while place < len(text) and len(found) < 2:
        part = AMOUNT.match(text, place)
        if not part or (part[2] or "") not in UNITS | {"": ""}:
            return None
        found.append((int(part[1]), UNITS.get(part[2] or "", "")))
        place = part.end()
    whole = place == len(text) and found and not text.endswith((" ", ","))
    return found if whole and (len(found) == 1 or all(unit for _, unit in found)) else None


@dataclass(frozen=True)
class Amounts:
    """Terms of two units, of which the larger is `factor` of the smaller; from level 4 on the answer has both."""

    large: str
    small: str
    factor: int
    level: int
    terms: tuple[tuple[int, int], ...]

    @property
    def content(self) -> str:
        return f"{self._sum('compact')}=?{self.small if self.level < 4 else f'{self.large}?{self.small}'}"

    def written(self, wording: Wording, chance: random.Random) -> Written:
        large, small = self._name(self.large, wording), self._name(self.small, wording)
        total = sum(one * self.factor + other for one, other in self.terms)
        mixed = divmod(total, self.factor)
        question = phrase(
            PHRASES["convert" if self.level < 4 else "split"],
            wording,
            chance,
            sum=self._sum(wording),
            unit=small,
            large=large,
            small=small,
            form=self._term((2, 5), wording),
        )
        steps = list(self._steps(total))
        if self.level < 4:
            return Written(question, str(total), tuple(steps))
        times = mixed[0] * self.factor
        steps += [f"{mixed[0]}*{self.factor}={times};", f"{total}-{times}={mixed[1]};"]
        return Written(question, self._term(mixed, wording, zero=True), tuple(steps))

    def _steps(self, total: int) -> Iterator[str]:
        """Yield how the terms add up in the smaller unit."""
        done = 0
        for place, (one, other) in enumerate(self.terms):
            if one:
                yield f"{one}*{self.factor}={one * self.factor};"
                if place:
                    yield f"{done}+{one * self.factor}={done + one * self.factor};"
                done += one * self.factor
            if other and done:
                yield f"{done}+{other}={done + other};"
            done += other

    def _sum(self, wording: Wording) -> str:
        between = {"compact": "+", "en": " plus ", "zh": "加"}[wording]
        return between.join(self._term(term, wording) for term in self.terms)

    def _term(self, term: tuple[int, int], wording: Wording, zero: bool = False) -> str:
        """Return an amount such as "3m45cm"; a part that is 0 is left out, unless `zero`."""
        names = [self._name(unit, wording) for unit in (self.large, self.small)]
        parts = [(number, name) for number, name in zip(term, names, strict=True) if number or zero]
        if wording != "en":
            return "".join(f"{number}{name}" for number, name in parts)
        return " ".join(f"{number} {name if number != 1 else name[:-1]}" for number, name in parts)

    def _name(self, unit: str, wording: Wording) -> str:
        return unit if wording == "compact" else NAMES[wording][unit]
