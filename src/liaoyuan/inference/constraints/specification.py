"""A constraint as JSON, for another process: what it demands, not where an answer is.

Whoever gets it builds it anew over the same tokenizer, and lets it begin with the prompt as any other.
"""

from collections.abc import Callable, Mapping
from typing import Any

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.constraints.constraint import Constraint
from liaoyuan.inference.constraints.grammar import CompiledGrammar, Grammars, Vocabulary
from liaoyuan.inference.constraints.thinking import AfterThinking, ThinkMarks

Words = Mapping[str, Any]


def constraint_to_json(constraint: Constraint) -> dict[str, Any]:
    """Return what a constraint demands.

    Raises:
        LiaoyuanError: it is of a kind that only its own process knows.
    """
    if isinstance(constraint, CompiledGrammar):
        return {**_vocabulary(constraint.vocabulary), "grammar": constraint.text}
    if isinstance(constraint, AfterThinking):
        return {
            **_vocabulary(constraint.vocabulary),
            "marks": [constraint.marks.open, constraint.marks.close],
            "inner": constraint.inner and constraint_to_json(constraint.inner),
            "budget": constraint.budget,
            "may_open": constraint.may_open,
        }
    raise LiaoyuanError(
        f"A constraint of the kind {type(constraint).__name__} cannot go to another process: only grammars and "
        "budgets of thoughts can."
    )


class Constraints:
    """Builds constraints from what they demand, for one tokenizer; grammars that were used last are kept."""

    def __init__(self, tokenizer: Callable[[], Tokenizer]) -> None:
        """tokenizer: loads it, once it is needed."""
        self._tokenizer = tokenizer
        self._grammars: dict[tuple[int, ...], Grammars] = {}

    def build(self, words: Words) -> Constraint:
        """Undo `constraint_to_json`; it may take a while the first time.

        Raises:
            LiaoyuanError: it is no constraint, or the model's folder has no tokenizer.
        """
        try:
            grammars = self._of(int(words["size"]), tuple(words["ends"]))
            if "grammar" in words:
                return grammars.tried(words["grammar"])
            inner = words["inner"] and self.build(words["inner"])
            marks, vocabulary = ThinkMarks(*words["marks"]), grammars.vocabulary
            return AfterThinking(inner, marks, vocabulary, words["budget"], words["may_open"])
        except (KeyError, TypeError, ValueError) as error:
            raise LiaoyuanError(f"This is no constraint: {error}.") from error

    def _of(self, size: int, ends: tuple[int, ...]) -> Grammars:
        key = (size, *ends)
        if key not in self._grammars:
            self._grammars[key] = Grammars(self._tokenizer(), size, ends)
        return self._grammars[key]


def _vocabulary(vocabulary: Vocabulary) -> dict[str, Any]:
    return {"size": vocabulary.size, "ends": list(vocabulary.ends)}
