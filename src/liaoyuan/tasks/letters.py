"""Counting a letter in a word that is spelt letter by letter."""

import random
import re
from dataclasses import dataclass

from liaoyuan.tasks.generated import Wording, Written, phrase
from liaoyuan.tasks.problem import Problem, Score, matches

LENGTHS = (4, 6, 9, 12, 16, 24)  # letters of a word, level by level
CONSONANTS, VOWELS = "bdlmnrst", "aeio"  # few, so that letters come again
ABSENT = 0.1  # share of questions for a letter that the word may lack
NUMBER = re.compile(r"[0-9]{1,2}")
PHRASES = {
    "compact": ("{letter} in {word}=?",),
    "en": (
        "How many times does the letter {letter} occur in {word}?",
        "Count the letter {letter} in the word {word}.",
        "How many {letter}'s are there in “{word}”?",
    ),
    "zh": (
        "{word}里有几个字母{letter}？",
        "数一数，单词{word}中字母{letter}出现了几次？",
        "字母{letter}在“{word}”这个词里出现多少次？",
    ),
}


class Letters:
    """ "r in barerib=?"; the thought spells the word and counts along: "b0a0r1e1r2i2b2"."""

    name = "letters"
    levels = range(1, len(LENGTHS) + 1)

    def make(self, chance: random.Random, level: int) -> "Letter":
        begin = chance.randrange(2)
        kinds = (CONSONANTS, VOWELS)
        word = "".join(chance.choice(kinds[(begin + place) % 2]) for place in range(LENGTHS[level - 1]))
        return Letter(word, chance.choice(CONSONANTS + VOWELS if chance.random() < ABSENT else word))

    def check(self, problem: Problem, text: str) -> Score:
        return matches(problem, text, NUMBER)


@dataclass(frozen=True)
class Letter:
    """A word, and the letter to be counted in it."""

    word: str
    letter: str

    @property
    def content(self) -> str:
        return f"{self.letter} in {self.word}"

    def written(self, wording: Wording, chance: random.Random) -> Written:
        question = phrase(PHRASES, wording, chance, word=self.word, letter=self.letter)
        steps = (f"{letter}{self.word[: place + 1].count(self.letter)}" for place, letter in enumerate(self.word))
        return Written(question, str(self.word.count(self.letter)), tuple(steps))
