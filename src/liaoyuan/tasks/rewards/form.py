"""Rewards for the form of an answer: a thought and then an answer, its length, its language."""

import re
import unicodedata
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, model_validator

from liaoyuan.config import Config
from liaoyuan.tasks.problem import Score
from liaoyuan.tasks.reward import Rollout
from liaoyuan.tasks.rewards.marks import final_answers

THINK_MARK = re.compile(r"</?\s*(?:think|thinking|thought)\s*>|<\|?(?:im_start|im_end|endoftext)\|?>", re.IGNORECASE)
FORMULA = re.compile(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+|```.*?```|`[^`]*`", re.DOTALL)
WORD = re.compile(r"[^\W\d_]+")
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")


class FormatConfig(Config):
    """thought: least characters of the thought (0: it may be missing). mark: what must mark the answer, once."""

    thought: int = Field(1, ge=0)
    mark: Literal["", "boxed", "hashes", "phrase"] = ""


@dataclass(frozen=True)
class FormatReward:
    """1 for a whole answer of one thought and one text after it, each without marks of the other's, else 0."""

    config: FormatConfig = field(default_factory=FormatConfig)
    name: str = "format"

    def __call__(self, rollout: Rollout) -> Score:
        why = self._flaw(rollout)
        return Score(0.0, None, why) if why else Score(1.0)

    def _flaw(self, rollout: Rollout) -> str:
        if rollout.flaw:
            return rollout.flaw
        if len(rollout.thought.strip()) < self.config.thought:
            return "no thought" if not rollout.thought.strip() else "its thought is too short"
        if not rollout.text.strip():
            return "no answer after the thought"
        for part, text in (("thought", rollout.thought), ("answer", rollout.text)):
            if THINK_MARK.search(text):
                return f"a mark of thoughts or turns within its {part}"
        mark, contents = final_answers(rollout.text)
        if self.config.mark and (mark != self.config.mark or len(contents) != 1):
            return f"its answer is not marked once ({self.config.mark})"
        return ""


class LengthConfig(Config):
    """limit: tokens that cost nothing less; soft: tokens before it over which the punishment grows to 1.

    of: the whole answer, or its thought alone (a thinking budget).
    """

    limit: int = Field(gt=0)
    soft: int = Field(gt=0)
    of: Literal["whole", "thought"] = "whole"

    @model_validator(mode="after")
    def _fits(self) -> "LengthConfig":
        if self.soft > self.limit:
            raise ValueError(f"soft must be at most limit ({self.limit})")
        return self


@dataclass(frozen=True)
class LengthReward:
    """The soft overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13).

    0 up to `limit - soft` tokens, then falling linearly to -1 at `limit`, and -1 beyond.
    """

    config: LengthConfig
    name: str = "length"

    def __call__(self, rollout: Rollout) -> Score:
        length = rollout.thought_length if self.config.of == "thought" else rollout.length
        over = length - (self.config.limit - self.config.soft)
        value = -min(1.0, max(0.0, over / self.config.soft))
        return Score(value or 0.0, str(length), f"{length} tokens" if over > 0 else "")


class LanguageConfig(Config):
    """language: the wanted one. of: where it is wanted; share: below which the value is 0."""

    language: Literal["en", "zh"]
    of: Literal["text", "thought", "both"] = "both"
    share: float = Field(0.0, ge=0, le=1)


@dataclass(frozen=True)
class LanguageReward:
    """The share of words in the wanted language's script: each Han character is a word, and each run of other letters.

    Formulas, code, digits and single letters (names of quantities) have no language; where nothing else is there, the
    value is 1. After the language consistency reward of DeepSeek-R1 (arXiv 2501.12948, 2.3.2).
    """

    config: LanguageConfig
    name: str = "language"

    def __call__(self, rollout: Rollout) -> Score:
        texts = {"text": rollout.text, "thought": rollout.thought}
        if self.config.of != "both":
            texts = {self.config.of: texts[self.config.of]}
        chinese, latin, other = words_by_script("\n".join(texts.values()))
        total = chinese + latin + other
        if not total:
            return Score(1.0, None, "no words")
        share = (chinese if self.config.language == "zh" else latin) / total
        value = share if share >= self.config.share else 0.0
        return Score(value, f"{share:.3f}", f"{share:.0%} {self.config.language}")


def words_by_script(text: str) -> tuple[int, int, int]:
    """Return how many words are Chinese, Latin, and of other scripts."""
    text = unicodedata.normalize("NFKC", FORMULA.sub(" ", text))
    chinese = len(HAN.findall(text))
    words = [word for word in WORD.findall(HAN.sub(" ", text)) if len(word) > 1]
    latin = sum(all(unicodedata.name(letter, "").startswith("LATIN") for letter in word) for word in words)
    return chinese, latin, len(words) - latin
