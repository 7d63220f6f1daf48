"""Whether the final answer is the right one of several choices: a letter, or a word such as yes, no, unknown."""

import re
import unicodedata
from dataclasses import dataclass

from liaoyuan.tasks.problem import Score
from liaoyuan.tasks.reward import Rollout
from liaoyuan.tasks.rewards.marks import final_answers

WORDS = {  # other ways to say the same
    "yes": ("true", "correct", "是", "是的", "对", "正确"),
    "no": ("false", "incorrect", "否", "不是", "不对", "错", "错误"),
    "unknown": ("uncertain", "undetermined", "cannot be determined", "无法确定", "不确定", "未知"),
}
_SAME = {other: word for word, others in WORDS.items() for other in (word, *others)}
_DRESSING = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|rm)\b|[${}*_`\"'“”]|\\[()\[\]]")
_LETTER = re.compile(
    r"(?:option|choice|选项|选)?\s*(?:\(\s*([A-J])\s*\)|\[\s*([A-J])\s*\]|([A-J])(?![A-Za-z0-9]))\s*(?:选?项)?\s*[.:：、),]?\s*",
    re.IGNORECASE,
)
_HEDGED = re.compile(  # another letter, but for the article of "A red one"
    r"\([A-Za-z]\)|(?<![A-Za-z])(?:[B-J](?![A-Za-z'])|A(?!\s+[a-z]|[A-Za-z']))|\b(?:or|OR|Or|both|either)\b|或"
)
FORMULA = re.compile(r"\$+[^$]+\$+|\\\(.*?\\\)")


@dataclass(frozen=True)
class ChoiceReward:
    """1 if the final answer is the right letter (its option's text may follow) or word, and no other, else 0.

    No value where the right answer is neither a letter nor a word.
    """

    name: str = "choice"

    def __call__(self, rollout: Rollout) -> Score:
        if rollout.flaw:
            return Score(0.0, None, rollout.flaw)
        gold = read_choice(rollout.problem.answer)
        if gold is None:
            return Score(None, None, f"the right answer '{rollout.problem.answer[:60]}' is no choice")
        mark, contents = final_answers(rollout.text)
        found = [read_choice(content) for content in contents]
        if mark == "phrase":  # "the answer is 79, so the answer is C": what is no choice is a step on the way
            found = [choice for choice in found if choice] or found
        if not found or found[-1] is None:
            what = "no marked answer, and the text is no choice" if mark == "whole" else "what is marked is no choice"
            return Score(0.0, None, what)
        if len(set(found)) > 1:
            return Score(0.0, None, "several answers")
        return Score(float(found[0] == gold), found[0], "" if found[0] == gold else f"not {gold}")


def read_choice(text: str) -> str | None:
    """Return the letter (upper case) or the word (as in `WORDS`) that a text chooses; None if none or several."""
    text = text.strip()
    if not text.startswith(("$", "\\")):
        text = FORMULA.sub(" ", text)  # of the option's text, in which letters are names of quantities
    text = unicodedata.normalize("NFKC", _DRESSING.sub(" ", text)).strip().rstrip(".。!").strip()
    word = _SAME.get(" ".join(text.casefold().split()))
    if word:
        return word
    text = re.sub(r"^\(((?:option|choice) [^()]*)\)$", r"\1", text, flags=re.IGNORECASE)
    match = _LETTER.match(text)
    if not match:
        return None
    rest = text[match.end() :]
    # Behind a letter may stand its option's text, which is a sentence of its own if the letter was closed by a mark.
    closed = match[0].rstrip()[-1:] in ".:：、),]项"
    if rest and (not closed or _HEDGED.search(rest)):
        return None
    return next(filter(None, match.groups())).upper()
