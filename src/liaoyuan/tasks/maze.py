"""Mazes: a shortest path through a square grid. Any shortest path is right."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from liaoyuan.tasks.generated import Wording, Written, content_of, phrase
from liaoyuan.tasks.problem import Problem, Score

SIZES = (3, 4, 5, 6, 7, 8)  # of the grid, level by level; its shortest path has at least as many moves
WALLS = 0.3  # share of the fields that are walls
WALL, START, END = "#", "S", "E"
PATH = re.compile(r"[UDLR]{1,64}")
PHRASES = {
    "compact": ("{rows}",),
    "en": (
        "Find a shortest way from S to E; # is a wall. Answer with the moves U, D, L and R, such as RRD.\n{lines}",
        "In this maze you may go up (U), down (D), left (L) or right (R), but not through #. "
        "Write a shortest path from S to E as letters.\n{lines}",
        "{lines}\nHow do you get from S to E in the fewest moves, without entering #? Use the letters U, D, L and R.",
    ),
    "zh": (
        "找出从S到E的最短路线，#是墙。用U（上）、D（下）、L（左）、R（右）写出每一步，例如RRD。\n{lines}",
        "在这个迷宫里可以向上（U）、下（D）、左（L）、右（R）走，不能穿过#。请用字母写出从S到E的一条最短路径。\n{lines}",
        "{lines}\n怎样用最少的步数从S走到E，而且不碰到#？只写字母U、D、L、R。",
    ),
}


class Maze:
    """ "S.#/..#/#.E"; the answer is a path such as "DRDR".

    The thought goes from E field by field to S, a step further with each part ("row column"): "22;21;11;01 10;00;".
    """

    name = "maze"
    levels = range(1, len(SIZES) + 1)

    def make(self, chance: random.Random, level: int) -> "Grid":
        size = SIZES[level - 1]
        while True:
            fields = [WALL if chance.random() < WALLS else "." for _ in range(size * size)]
            start, end = chance.sample(range(size * size), 2)
            fields[start], fields[end] = START, END
            grid = Grid("/".join("".join(fields[row : row + size]) for row in range(0, size * size, size)))
            if len(grid.parts()) > size:
                return grid

    def check(self, problem: Problem, text: str) -> Score:
        path = text.strip()
        if not PATH.fullmatch(path):
            return Score(0.0, None, "no path of the letters U, D, L and R")
        flaw = Grid(content_of(problem)).flaw_of(path)
        return Score(float(not flaw), path, flaw)


@dataclass(frozen=True)
class Grid:
    """The rows of a maze with slashes between them, so that a field is a place in the text and a slash is a wall."""

    content: str

    def written(self, wording: Wording, chance: random.Random) -> Written:
        question = phrase(PHRASES, wording, chance, rows=self.content, lines=self.content.replace("/", "\n"))
        parts, width = self.parts(), self._width
        steps = (" ".join(f"{place // width}{place % width}" for place in part) + ";" for part in parts)
        return Written(question, self._path(parts), tuple(steps))

    def parts(self) -> list[list[int]]:
        """Return the fields at 0, 1, 2, ... moves from the end, up to the start; nothing if it cannot be reached."""
        start, part, found = self.content.index(START), [self.content.index(END)], list[list[int]]()
        seen, offsets = set(part), self._offsets.values()
        while part:
            if start in part:
                return [*found, [start]]
            found.append(part)
            around = {place + offset for place in part for offset in offsets} - seen
            part = sorted(place for place in around if self._is_open(place))
            seen |= around
        return []

    def flaw_of(self, path: str) -> str:
        """Return why a path is no shortest one, or nothing."""
        place, offsets = self.content.index(START), self._offsets
        for move in path:
            place += offsets[move]
            if not self._is_open(place):
                return "it leaves the grid or enters a wall"
        if self.content[place] != END:
            return "it does not end at E"
        return "" if len(path) == len(self.parts()) - 1 else "it is not a shortest path"

    def _path(self, parts: Sequence[Sequence[int]]) -> str:
        """Return the path that goes to a nearer field each time, by the first of U, D, L, R that does."""
        place, path = parts[-1][0], ""
        for part in reversed(parts[:-1]):
            move, place = next(
                (move, place + offset) for move, offset in self._offsets.items() if place + offset in part
            )
            path += move
        return path

    def _is_open(self, place: int) -> bool:
        return 0 <= place < len(self.content) and self.content[place] not in "#/"

    @property
    def _width(self) -> int:
        return self.content.index("/") + 1

    @property
    def _offsets(self) -> dict[str, int]:
        return {"U": -self._width, "D": self._width, "L": -1, "R": 1}
