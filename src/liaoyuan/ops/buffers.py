"""Many tensors as one: in one flat buffer for a collective, and as one number that says whether they are the same."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import NATIVE, triton
from liaoyuan.ops.operator import KERNEL_DTYPES, Operator, register

STEP = 0x9E3779B97F4A7C15 - 2**64  # as int64, like the two factors
FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def pack(tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Return all elements of tensors of one dtype, in order, in one flat buffer (`out` if given).

    Raises:
        LiaoyuanError: the dtypes differ, or `out` has another size.
    """
    if not tensors:
        return torch.empty(0) if out is None else out
    if len({x.dtype for x in tensors}) > 1:
        raise LiaoyuanError(f"A buffer holds one dtype, not {', '.join(sorted({str(x.dtype)[6:] for x in tensors}))}.")
    total = sum(x.numel() for x in tensors)
    if out is not None and out.shape != (total,):
        raise LiaoyuanError(f"The buffer {list(out.shape)} does not hold {len(tensors)} tensors of {total} elements.")
    return torch.cat([x.reshape(-1) for x in tensors], out=out)


def unpack(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return views of a flat buffer with these shapes, one behind the other.

    Raises:
        LiaoyuanError: the shapes have another number of elements.
    """
    counts = [torch.Size(shape).numel() for shape in shapes]
    if flat.dim() != 1 or sum(counts) != len(flat):
        raise LiaoyuanError(f"The buffer {list(flat.shape)} is not {len(shapes)} tensors of {sum(counts)} elements.")
    return [part.view(torch.Size(shape)) for part, shape in zip(flat.split(counts), shapes, strict=True)]


def checksum(*tensors: Tensor, before: int = 0) -> int:
    """Return 64 bits of the tensors' bytes, in order: the same on every device, with any strides and threads.

    The sum over words of 8 bytes of their mixture with their place (splitmix64, Steele et al. 2014). It finds
    accidents; it is no signature. Shapes and dtypes do not count. `before` is that of tensors that come before these.
    """
    total = before
    for x in tensors:
        bytes_ = x.detach().contiguous().reshape(-1).view(torch.uint8)
        function = CHECKSUM.call if takes(CHECKSUM, bytes_) else _checksum
        total = (total * 31 + int(function(bytes_))) % 2**64
    return total


def _checksum(data: Tensor) -> Tensor:
    words = torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)
    place = torch.arange(1, len(words) + 1, device=data.device)
    return _mix(words + place * STEP).sum() + _mix(torch.tensor(len(data), device=data.device))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * FACTORS[0]
    x = (x ^ _shifted(x, 27)) * FACTORS[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Return x >> bits with zeros from above."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _samples(_: torch.dtype) -> Iterator[tuple[Tensor]]:
    for size in (0, 1, 7, 8, 1_000, 600_001):
        yield (torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)),)


CHECKSUM = register(
    Operator(
        name="checksum",
        kernels=(
            replace(NATIVE, dtypes=(*KERNEL_DTYPES, torch.uint8)),  # of any tensor, as bytes
            replace(triton("buffers"), dtypes=(torch.uint8,)),
        ),
        schema="(Tensor data) -> Tensor",
        reference=_checksum,
        fake=lambda data: data.new_empty((), dtype=torch.int64),
        samples=_samples,
        flops=lambda data: 0,
        workload=lambda _: (torch.ones(1 << 26, dtype=torch.uint8),),  # more than caches hold, as weights are
        traffic=lambda data: data.nbytes,
        tolerance=dict.fromkeys((*KERNEL_DTYPES, torch.uint8), 0.0),
    )
)
