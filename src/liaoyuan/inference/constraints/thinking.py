"""Thoughts before an answer: how many tokens they may take, and what may follow them."""

from dataclasses import dataclass

import numpy as np

from liaoyuan.inference.constraints.constraint import Constraint, ConstraintState
from liaoyuan.inference.constraints.grammar import Vocabulary


@dataclass(frozen=True)
class ThinkMarks:
    """The tokens that open and close a thought."""

    open: int
    close: int

    def left_open(self, prompt: tuple[int, ...]) -> bool:
        """Return whether a prompt ends inside a thought (the template has opened one for the answer)."""
        for token in reversed(prompt):
            if token in (self.open, self.close):
                return token == self.open
        return False


class AfterThinking:
    """A `Constraint`: the answer after the thought is held to `inner`, and the thought to a budget of tokens."""

    def __init__(
        self,
        inner: Constraint | None,
        marks: ThinkMarks,
        vocabulary: Vocabulary,
        budget: int | None = None,
        may_open: bool = True,
    ) -> None:
        """inner: None allows any answer. budget: the most tokens of the thought, its closing mark apart; None: any.

        may_open: whether the model itself may open a thought, where the prompt has neither opened nor closed one.
        """
        self.inner, self.marks, self.budget = inner, marks, budget
        self.may_open = may_open and budget != 0
        self.vocabulary = vocabulary
        self.at_once = vocabulary.real_mask & ~vocabulary.mask([marks.open]) if budget == 0 else None
        self.opening = vocabulary.mask([marks.open])
        self.closing = vocabulary.mask([marks.close])
        # An end inside the thought would leave the answer out.
        self.within = vocabulary.real_mask & ~vocabulary.end_mask if inner else None
        self.break_mask = vocabulary.mask(sorted(vocabulary.breaks))

    def begin(self, prompt: tuple[int, ...]) -> "ThinkingState":
        inner = self.inner.begin(prompt) if self.inner else None
        if self.marks.left_open(prompt):
            return ThinkingState(self, inner, "thought")
        return ThinkingState(self, inner, "answer" if self._closed(prompt) else "start")

    def _closed(self, prompt: tuple[int, ...]) -> bool:
        """Return whether a prompt ends with a closed thought (the template's way to say: answer at once)."""
        for token in reversed(prompt):
            if token == self.marks.close:
                return True
            if self.vocabulary.tokens[token].strip():
                return False
        return False


class ThinkingState:
    """A `ConstraintState`. It is at the "start", in the "thought", at the "gap" after it, or in the "answer".

    The gap is a token of line breaks, which models are taught to write after a thought.
    """

    def __init__(self, rules: AfterThinking, inner: ConstraintState | None, place: str, thought: int = 0) -> None:
        self._rules, self._inner, self._place, self._thought = rules, inner, place, thought

    def mask(self) -> np.ndarray | None:
        rules = self._rules
        if self._place == "thought":
            spent = rules.budget is not None and self._thought >= rules.budget
            return rules.closing if spent else rules.within
        after = self._inner.mask() if self._inner else None
        if self._place == "start" and not rules.may_open:
            return rules.at_once if after is None else after
        if after is None or self._place == "answer":
            return after
        return after | (rules.opening if self._place == "start" else rules.break_mask)

    def accept(self, token: int) -> None:
        if self._place == "thought":
            self._thought += 1
            self._place = "gap" if token == self._rules.marks.close else "thought"
        elif self._place == "start" and token == self._rules.marks.open:
            self._place = "thought"
        elif self._place == "gap" and self._is_break(token):
            self._place = "answer"
        else:
            self._place = "answer"
            if self._inner:
                self._inner.accept(token)

    def copy(self) -> "ThinkingState":
        inner = self._inner.copy() if self._inner else None
        return ThinkingState(self._rules, inner, self._place, self._thought)

    def _is_break(self, token: int) -> bool:
        """Whether a token after the thought is but a line break; one that the answer may begin with belongs to it."""
        if token not in self._rules.vocabulary.breaks:
            return False
        after = self._inner.mask() if self._inner else None
        return after is not None and not after[token // 32] >> (token % 32) & 1
