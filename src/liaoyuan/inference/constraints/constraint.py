"""What may follow what: the engine asks a constraint which tokens a completion may go on with."""

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """A description that many requests may share, such as a compiled grammar."""

    def begin(self, prompt: tuple[int, ...]) -> "ConstraintState":
        """Return the state of a completion of `prompt` that has no token yet."""
        ...


class ConstraintState(Protocol):
    """Where one completion is. The engine asks for a mask, draws a token, and tells the state of it."""

    def mask(self) -> np.ndarray | None:
        """Return the tokens that may come next as bits, int32 [ceil(V / 32)], the lowest bit first; None: all.

        At least one bit is set; where nothing may follow, the tokens that end the completion are allowed.
        """
        ...

    def accept(self, token: int) -> None:
        """Go on with a token that the mask allowed."""
        ...

    def copy(self) -> "ConstraintState":
        """Return a state that goes its own way (for tokens that are only guessed)."""
        ...
