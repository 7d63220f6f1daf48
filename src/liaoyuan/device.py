"""One description of the device that a process computes on; the only file that knows the devices' names.

`select_device` finds the accelerator that torch offers (CUDA, Ascend through `torch_npu`, any other
out-of-tree back end) or the CPU. The rest of Liaoyuan asks the `Device`, never `torch.cuda`.
"""

import contextlib
import functools
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from liaoyuan.errors import LiaoyuanError, nearest

DType = torch.dtype  # inside `Device`, `torch` is its torch device
FEATURES = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx512_f", "avx2")
GEMM_SHAPES = (
    (512, 512, 512),
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (2048, 512, 2048),
    (4096, 512, 1024),
    (4096, 1024, 1024),
    (8192, 8192, 8192),
)
CAPTURING = ("cuda", "npu")  # kinds whose work can be captured in graphs and replayed
COLLECTIVE_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


@dataclass(frozen=True)
class Device:
    """A device of this process: `type` is torch's name of its kind, `index` its number (None on the CPU)."""

    type: str
    index: int | None = None

    @property
    def torch(self) -> torch.device:
        return torch.device(self.type) if self.index is None else torch.device(self.type, self.index)

    @property
    def is_cpu(self) -> bool:
        return self.type == "cpu"

    @property
    def captures_graphs(self) -> bool:
        """Whether work on it can be captured in graphs and replayed."""
        return self.type in CAPTURING

    @property
    def collective_backend(self) -> str:
        """Name of the `torch.distributed` back end for this kind of device."""
        return COLLECTIVE_BACKENDS.get(self.type, "gloo")

    @property
    def default_dtype(self) -> DType:
        """bf16 where matrix units compute it fast, else fp32."""
        if self.is_cpu:
            return torch.bfloat16 if has_bf16_matrix_units() else torch.float32
        supported = getattr(torch.get_device_module(self.type), "is_bf16_supported", lambda: True)
        return torch.bfloat16 if supported() else torch.float32

    def synchronize(self) -> None:
        """Wait until all queued work is done (nothing to wait for on the CPU)."""
        module = torch.get_device_module(self.type)
        if not self.is_cpu and hasattr(module, "synchronize"):
            module.synchronize()

    def free_memory(self) -> int | None:
        """Return the bytes that are free on the accelerator now; None on the CPU and where it does not say."""
        module = torch.get_device_module(self.type)
        if self.is_cpu or not hasattr(module, "mem_get_info"):
            return None
        return int(module.mem_get_info(self.torch)[0])

    def peak_memory(self) -> int:
        """Return the highest memory use of this process so far, in bytes (resident memory on the CPU)."""
        module = torch.get_device_module(self.type)
        if not self.is_cpu and hasattr(module, "max_memory_allocated"):
            return int(module.max_memory_allocated())
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def select_device(name: str = "auto") -> Device:
    """Return the device called `name`: "auto", "cpu", or an accelerator's type such as "cuda" or "npu:1".

    Raises:
        LiaoyuanError: torch does not offer that device on this machine.
    """
    accelerator = find_accelerator()
    if name == "auto":
        return Device(accelerator, _local_rank()) if accelerator else Device("cpu")
    kind, colon, index = name.partition(":")
    if kind == "cpu" and not colon:
        return Device("cpu")
    if kind != accelerator:
        known = ["cpu", "auto", *([accelerator] if accelerator else [])]
        hint = nearest(kind, known) or "."
        raise LiaoyuanError(f"There is no device '{name}' here; torch offers {', '.join(known)}{hint}")
    if not colon:
        return Device(kind, _local_rank())
    count = torch.accelerator.device_count()
    if not index.isdecimal() or int(index) >= count:
        raise LiaoyuanError(f"There is no device '{name}' here; torch counts {count} of the kind '{kind}', from 0.")
    return Device(kind, int(index))


def find_accelerator() -> str | None:
    """Return the type of the accelerator that torch offers here, or None."""
    if importlib.util.find_spec("torch_npu"):
        with contextlib.suppress(ImportError, OSError):  # installed, but the Ascend toolkit under it is not
            importlib.import_module("torch_npu")  # registers the device with torch
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else None


def list_devices() -> list[str]:
    """Return a line for each device of this machine: its name for `select_device` and what it is."""
    cpu = f"cpu: {cpu_name()}, {torch.get_num_threads()} threads"
    accelerator = find_accelerator()
    if accelerator is None:
        return [cpu]
    module = torch.get_device_module(accelerator)
    kind = getattr(module, "get_device_name", lambda index: "an accelerator")
    return [*(f"{accelerator}:{i}: {kind(i)}" for i in range(torch.accelerator.device_count())), cpu]


def cpu_name() -> str:
    """Return the name of the CPU as the kernel tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Return those instruction sets of this CPU that decide its speed here."""
    capabilities = torch.cpu.get_capabilities()
    return [name for name in FEATURES if capabilities.get(name)]


def has_bf16_matrix_units() -> bool:
    """Return whether this CPU multiplies bf16 matrices in hardware (AMX or AVX-512 BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def measure_gemm_rate(dtype: DType, seconds: float = 1.0, device: str = "cpu") -> float:
    """Return the best rate of matrix products of this `dtype`, in FLOP/s, over shapes as training has them.

    The rate depends on the shape (a square bf16 product of 1024 does not use a second core), so the peak that
    utilisation is measured against is the best of `GEMM_SHAPES`, about `seconds` in all. A shape that would take
    longer than that for one product is left out (bf16 without bf16 instructions).
    """
    place = Device(torch.device(device).type)
    rates: list[float] = []
    for rows, inner, columns in GEMM_SHAPES:
        if rates and 2 * rows * inner * columns / max(rates) > seconds / len(GEMM_SHAPES):
            continue
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        left, right = (matrix.to(device=device, dtype=dtype) for matrix in (left, right))
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        work = functools.partial(torch.mm, left, right, out=out)
        rates.append(2 * rows * inner * columns / _best_time(work, place, seconds / len(GEMM_SHAPES)))
    return max(rates)


def measure_memory_rate(megabytes: int = 256, seconds: float = 0.3, device: str = "cpu") -> float:
    """Return the best rate of copying a large buffer, in bytes read and written per second."""
    source = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    place = Device(torch.device(device).type)
    return 2 * source.numel() / _best_time(lambda: target.copy_(source), place, seconds)


def _best_time(work: Callable[[], object], device: Device, seconds: float) -> float:
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:  # at least once, however busy the machine is
        device.synchronize()
        start = time.perf_counter()
        work()
        device.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))  # set by torchrun for every process it starts
