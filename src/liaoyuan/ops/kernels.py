"""Where kernels come from: the C++ library for CPUs, Triton for CUDA and Ascend."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops.build import find_library
from liaoyuan.ops.operator import Kernel

DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1"}


def _native(name: str, device: str) -> Callable[[bool], None]:
    reason = _load_library()
    if reason is not None:
        raise LiaoyuanError(reason)
    return functools.partial(torch.ops.liaoyuan_native.use, name)


@functools.cache
def _load_library() -> str | None:
    """Load the native library; return why it cannot be, or None."""
    try:
        torch.ops.load_library(find_library())
    except LiaoyuanError as error:
        return str(error)
    except OSError as error:
        return f"The compiled kernels cannot be loaded, so the references are used: {error}"
    return None


NATIVE = Kernel("native", ("cpu",), _native)  # compiled from ops/native/
NATIVE_INEXACT = replace(NATIVE, exact=False)


def triton(module: str, exact: bool = True) -> Kernel:
    """Return the Triton kernel in `liaoyuan.ops.triton.<module>`.

    The module has functions called like the operator and its backward side, with the arguments of their schemas.
    """

    def load(name: str, device: str) -> Callable[[bool], None]:
        if not importlib.util.find_spec("triton"):
            raise LiaoyuanError("Triton is not installed: accelerators use plain PyTorch (pip install triton).")
        return functools.partial(_put_behind, importlib.import_module(f"liaoyuan.ops.triton.{module}"), name, device)

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return Kernel("triton", ("cuda", "npu"), load, dtypes, exact)


_behind: dict[tuple[str, str], torch.library.Library] = {}


def _put_behind(module: ModuleType, name: str, device: str, on: bool) -> None:
    """Register a module's functions as those that compute the operator on a device, or take them away."""
    if not on:
        library = _behind.pop((name, device), None)
        if library is not None:
            library._destroy()
        return
    library = torch.library.Library("liaoyuan", "IMPL")
    for function in (name, f"{name}_backward"):
        if hasattr(module, function):
            library.impl(function, getattr(module, function), DISPATCH_KEYS[device])
    _behind[name, device] = library
