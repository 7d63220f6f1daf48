"""One description of the device that a process computes on; the only file that knows the devices' names.

`select_device` finds the accelerator that torch offers (CUDA, Ascend through `torch_npu`, any other
out-of-tree back end) or the CPU. The rest of Liaoyuan asks the `Device`, never `torch.cuda`.
"""

import importlib.util
import os
import time
from dataclasses import dataclass

import torch

from liaoyuan.errors import LiaoyuanError, nearest

DType = torch.dtype  # inside `Device`, `torch` is its torch device
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
    def collective_backend(self) -> str:
        """Name of the `torch.distributed` back end for this kind of device."""
        return COLLECTIVE_BACKENDS.get(self.type, "gloo")

    @property
    def default_dtype(self) -> DType:
        """bf16 where matrix units compute it fast, else fp32."""
        if self.is_cpu:
            return torch.bfloat16 if has_bf16_matrix_units() else torch.float32
        return torch.bfloat16

    def synchronize(self) -> None:
        """Wait until all queued work is done (nothing to wait for on the CPU)."""
        module = torch.get_device_module(self.type)
        if not self.is_cpu and hasattr(module, "synchronize"):
            module.synchronize()

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
    accelerator = _accelerator()
    if name == "auto":
        return Device(accelerator, _local_rank()) if accelerator else Device("cpu")
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return Device("cpu")
    if kind != accelerator:
        known = ["cpu", "auto", *([accelerator] if accelerator else [])]
        raise LiaoyuanError(
            f"There is no device '{name}' here; torch offers {', '.join(known)}{nearest(kind, known)}"
        )
    return Device(kind, int(index) if index else _local_rank())


def has_bf16_matrix_units() -> bool:
    """Return whether this CPU multiplies bf16 matrices in hardware (AMX or AVX-512 BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def measure_gemm_rate(dtype: torch.dtype, size: int = 1024, seconds: float = 0.3, device: str = "cpu") -> float:
    """Return the best rate of square matrix products of this `dtype`, in FLOP/s, over about `seconds`."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    place = Device(torch.device(device).type)
    return 2 * size**3 / _best_time(lambda: torch.mm(left, right, out=out), place, seconds)


def measure_memory_rate(megabytes: int = 256, seconds: float = 0.3, device: str = "cpu") -> float:
    """Return the best rate of copying a large buffer, in bytes read and written per second."""
    source = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    place = Device(torch.device(device).type)
    return 2 * source.numel() / _best_time(lambda: target.copy_(source), place, seconds)


def _best_time(work, device: Device, seconds: float) -> float:  # type: ignore[no-untyped-def]
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        device.synchronize()
        start = time.perf_counter()
        work()
        device.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _accelerator() -> str | None:
    if importlib.util.find_spec("torch_npu"):
        import torch_npu  # noqa: F401  (registers the device with torch)
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else None


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))  # set by torchrun for every process it starts
