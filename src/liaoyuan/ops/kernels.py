"""Where kernels come from: the C++ library for CPUs, Triton for CUDA and Ascend, Ascend's own operators, PyTorch's."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops.build import find_library
from liaoyuan.ops.operator import Kernel

ACCELERATOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1"}


def _native(name: str, device: str) -> Callable[[bool], None]:
    reason = _load_library()
    if reason is not None:
        raise LiaoyuanError(reason)
    return functools.partial(torch.ops.liaoyuan_native.use, name)


def has_native() -> bool:
    """Whether the C++ library can be loaded here."""
    return _load_library() is None


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


def triton(module: str, exact: bool = True, fallback: bool = False) -> Kernel:
    """Return the Triton kernel in `liaoyuan.ops.triton.<module>`.

    The module has functions called like the operator and its backward side, with the arguments of their schemas.
    fallback: whether the reference is faster, so that it is for exactness alone.
    """

    def load(name: str, device: str) -> Callable[[bool], None]:
        if not importlib.util.find_spec("triton"):
            raise LiaoyuanError("Triton is not installed: accelerators use plain PyTorch (pip install triton).")
        return functools.partial(_put_behind, importlib.import_module(f"liaoyuan.ops.triton.{module}"), name, device)

    return Kernel("triton", ("cuda", "npu"), load, ACCELERATOR_DTYPES, exact, fallback)


def _ascend(name: str, device: str) -> Callable[[bool], None]:
    if not importlib.util.find_spec("torch_npu"):
        raise LiaoyuanError("torch_npu is not installed: Ascend's own operators cannot be had (pip install torch_npu).")
    try:
        module = importlib.import_module("liaoyuan.ops.ascend")
    except Exception as error:  # it loads libraries of the driver, which fail in their own ways
        raise LiaoyuanError(f"torch_npu cannot be imported ({error}): Ascend's own operators cannot be had.") from error
    return functools.partial(_put_behind, module, name, device)


# torch_npu's fused operators; of the bits of their rows nothing is documented
ASCEND = Kernel("npu", ("npu",), _ascend, ACCELERATOR_DTYPES, exact=False)


def _tiled(name: str, device: str) -> Callable[[bool], None]:
    module = importlib.import_module("liaoyuan.ops.tiled")
    module.check()
    return functools.partial(_put_behind, module, name, device)


TILED = Kernel("tiled", ("cpu",), _tiled, fallback=True)  # PyTorch's operators, on tiles of one shape

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
