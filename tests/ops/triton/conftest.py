"""The kernels on a card, or where there is none in Triton's interpreter (see `tests/conftest.py`), on the CPU."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from liaoyuan.ops import choice
from liaoyuan.ops.operator import OPERATORS, Kernel, Operator

CARD = torch.accelerator.is_available()
DEVICE = str(torch.accelerator.current_accelerator()) if CARD else "cpu"
INSTALLED = importlib.util.find_spec("triton") is not None
WITH_TRITON = [name for name, operator in OPERATORS.items() if any(k.name == "triton" for k in operator.kernels)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs Triton where it is not installed."""
    skip = pytest.mark.skip(reason="needs the package triton, which is not installed")
    for item in items:
        if "tests/ops/triton/" in item.path.as_posix() and not INSTALLED:
            item.add_marker(skip)


def triton_kernel(operator: Operator) -> Kernel:
    return next(kernel for kernel in operator.kernels if kernel.name == "triton")


@contextmanager
def products() -> Iterator[None]:
    """Let Triton's interpreter multiply matrices in one order of summation, and bf16, which it takes for integers; and
    spare it what takes half of its time: for each call of a device function it patches the language that the kernel has
    patched, and it computes for each sum whether it overflows, which it then does not look at.
    """
    if CARD:
        yield
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle, interpreter_builder

    def wide(x: Any) -> np.ndarray:
        if x.dtype.scalar == tl.bfloat16:
            return (x.data.astype(np.uint32) << 16).view(np.float32)
        return x.data.astype(np.float32)

    def product(self: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
        return TensorHandle(np.einsum("ik,kj->ij", wide(a), wide(b)) + total.data, total.dtype.scalar)

    call = InterpretedFunction.__call__

    @functools.cache
    def languages(function: Any) -> list[Any]:
        return [lang for lang in (tl, tl.core) if any(value is lang for value in function.__globals__.values())]

    def called(self: Any, *inputs: Any, **named: Any) -> Any:
        if any(tl.core.is_builtin(lang.load) for lang in languages(self.fn)):
            return call(self, *inputs, **named)
        return self.rewrite()(*inputs, **named)

    unseen = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    assert not unseen.debug  # else it would look
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", product)
        patch.setattr(InterpretedFunction, "__call__", called)
        patch.setattr(interpreter_builder, "options", unseen)
        yield


@pytest.fixture
def use() -> Iterator[Callable[[str], Operator]]:
    """A function that puts the Triton kernel of an operator behind it, and returns the operator."""
    choice.forget()
    with ExitStack() as stack:
        stack.enter_context(products())

        @functools.cache
        def put(name: str) -> Operator:
            operator = OPERATORS[name]
            switch = triton_kernel(operator).load(name, DEVICE)
            switch(True)
            stack.callback(switch, False)
            return operator

        yield put
    choice.forget()
