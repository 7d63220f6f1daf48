"""Whether the final answer has the very words of the right one."""

import unicodedata
from dataclasses import dataclass

from liaoyuan.tasks.problem import Score
from liaoyuan.tasks.reward import Rollout
from liaoyuan.tasks.rewards.marks import final_answers


@dataclass(frozen=True)
class ExactReward:
    """1 if the final answer is the right one but for width, case and spaces, else 0; no value for an empty gold."""

    name: str = "exact"

    def __call__(self, rollout: Rollout) -> Score:
        if rollout.flaw:
            return Score(0.0, None, rollout.flaw)
        gold = _same_form(rollout.problem.answer)
        if not gold:
            return Score(None, None, "the right answer is empty")
        # A text that is right as it stands needs no mark, and may have in it what looks like one.
        whole = _same_form(rollout.text)
        found = {whole} if whole == gold else {_same_form(content) for content in final_answers(rollout.text)[1]}
        if len(found) != 1:
            return Score(0.0, None, "several answers" if found else "no answer")
        answer = found.pop()
        return Score(float(answer == gold), answer, "" if answer == gold else f"not {gold}")


def _same_form(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".。").rstrip()
