"""Calls of operators that are made once from Python and then again without it: what graphs are on a device."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from liaoyuan.ops.kernels import has_native

Function = Callable[[], tuple[Tensor, ...]]


class Recording:
    """A function whose first call notes the operators that it calls, and whose later calls make just those calls again.

    It must do the same each time: read its inputs from tensors that stay, and decide nothing by their values. What it
    returns must be made by its own calls. A function that cannot be recorded, as an operator gives it a number, or for
    want of the native library, is called each time.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._number: int | None = None
        self._can = has_native()

    def __call__(self) -> tuple[Tensor, ...]:
        if self._number is not None:
            return tuple(torch.ops.liaoyuan_native.replay(self._number))
        if not self._can:
            return self._function()
        native = torch.ops.liaoyuan_native
        native.record()
        results: tuple[Tensor, ...] = ()
        try:
            results = self._function()
        finally:
            try:
                number = native.recorded(results)
            except RuntimeError:  # some call cannot be made again
                self._can = False
        if self._can:
            self._number = number
            weakref.finalize(self, native.forget, number).atexit = False
        return results

    def follow(self, steps: Tensor, now: Tensor, tokens: Tensor, drawn: Tensor) -> list[Tensor]:
        """Make the calls of a recorded decode step some times, each with the tokens that the one before it drew.

        The function gives logits, then tokens int64 [R] and both their log-probabilities fp32 [R], see
        `ops.sample_tokens`. Returns the logits of each step.

        Args:
            steps: uint8 [n, bytes], what each reads in `now` uint8 [1, bytes], where it is written before.
            tokens: int64 [R], what it reads the tokens in. drawn: fp64 [>= n, 3, R], where all that is drawn is
                written; -1 as token 0.
        """
        return list(torch.ops.liaoyuan_native.follow(self._number, steps, now, tokens, drawn))

    @property
    def is_recorded(self) -> bool:
        """Whether later calls are made without Python."""
        return self._number is not None
