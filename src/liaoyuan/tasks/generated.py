"""Tasks that make their problems themselves: what a problem is about is one thing, how it is worded another.

A generator draws an exercise; the exercise writes itself in the compact notation, in English or in Chinese. The same
numbers give the same exercise in every wording, and its `content`, in which no word of a language stands, decides the
split: a problem that was for the test in one language is for the test in the other.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from liaoyuan.tasks.problem import Problem, Score, Split, half_width, split_of

Wording = Literal["compact", "en", "zh"]
Phrases = Mapping[str, Sequence[str]]  # of each wording, sentences that ask the same
WORDINGS: tuple[Wording, ...] = ("compact", "en", "zh")
ATTEMPTS = 10_000  # draws until a problem falls in the wanted split; one in ten does
LONGEST = 256  # characters of an answer that is read at all


@dataclass(frozen=True)
class Written:
    """An exercise in one wording: question, answer, and a worked solution in steps, each with the sign that ends it."""

    question: str
    answer: str
    steps: tuple[str, ...]


class Exercise(Protocol):
    """What a problem is about."""

    @property
    def content(self) -> str:
        """Identify the exercise in every wording. Exercises that differ in nothing but names or order may share it."""
        ...

    def written(self, wording: Wording, chance: random.Random) -> Written: ...


class Generator(Protocol):
    """Draws exercises and judges answers."""

    @property
    def name(self) -> str: ...

    @property
    def levels(self) -> range: ...

    def make(self, chance: random.Random, level: int) -> Exercise: ...

    def check(self, problem: Problem, text: str) -> Score: ...


@dataclass(frozen=True)
class Generated:
    """The task of a generator in one wording, called "maze" in the compact notation, else "maze-en" or "maze-zh"."""

    generator: Generator
    wording: Wording = "compact"

    @property
    def name(self) -> str:
        return self.generator.name if self.wording == "compact" else f"{self.generator.name}-{self.wording}"

    @property
    def levels(self) -> range:
        return self.generator.levels

    def problem(self, seed: int, index: int, level: int, split: Split = "train") -> Problem:
        place = f"{seed}/{index}/{level}/{split}"
        chance = random.Random(f"{self.generator.name}/{place}")  # a text seed is hashed with SHA-512
        for _ in range(ATTEMPTS):
            exercise = self.generator.make(chance, level)
            key = f"{self.generator.name}:{exercise.content}"
            if split_of(key) == split:
                break
        else:
            raise ValueError(f"{self.generator.name} has no {split} problem of level {level}")
        written = exercise.written(self.wording, random.Random(f"{self.name}/{place}/words"))
        return Problem(self.name, written.question, written.answer, "".join(written.steps), level, key, written.steps)

    def check(self, problem: Problem, text: str) -> Score:
        """Judge a text. Digits, letters and signs of full width count as their plain forms in Chinese alone."""
        if len(text) > LONGEST:
            return Score(0.0, None, "too long for an answer")
        return self.generator.check(problem, half_width(text) if self.wording == "zh" else text)


def phrase(phrases: Phrases, wording: Wording, chance: random.Random, **values: Any) -> str:
    """Return one of the wording's sentences with its blanks filled in."""
    sentences = phrases[wording]
    return (sentences[0] if len(sentences) == 1 else chance.choice(sentences)).format(**values)


def content_of(problem: Problem) -> str:
    """Return what the problem's key says it is about: verifiers read this, never the sentence."""
    return problem.key.partition(":")[2]
