"""Inputs for every operator, and what is asked of a result."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}  # and how far a result may be off
RAGGED = {
    "one token": (1,),
    "short documents": (3, 1, 2),
    "empty documents": (0, 5, 0, 40, 0, 0),
    "block ends": (31, 32, 33, 64),
    "longer than a chunk": (600, 20),
}


def boundaries_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention_by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend each document on its own, in fp64, from the definition; a sink is one more key, whose value is zero."""
    groups = query.shape[1] // key.shape[1]
    parts = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        behind = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = (behind < 0) | (behind >= (window or len(q) + 1))
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(q), 1)), 2)
            v = torch.cat((v, v.new_zeros(1, *v.shape[1:])))
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(parts)


def difference(actual: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """Return max |actual - expected| / max |expected|, the latter at least `floor`."""
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(floor))


def compare(function, definition, inputs, dtype, differentiable):
    """Check outputs and gradients of `function` against `definition` in fp64."""
    given = [x.detach().requires_grad_(i in differentiable) if torch.is_tensor(x) else x for i, x in enumerate(inputs)]
    exact = [x.detach().double().requires_grad_(i in differentiable) if torch.is_tensor(x) and x.is_floating_point()
             else x for i, x in enumerate(inputs)]  # fmt: skip
    outputs, expected = function(*given), definition(*exact)
    outputs, expected = ((x,) if torch.is_tensor(x) else x for x in (outputs, expected))
    grads = [random(*x.shape, seed=50 + i) for i, x in enumerate(outputs)]
    found = torch.autograd.grad(outputs, [given[i] for i in differentiable],
                                [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])  # fmt: skip
    wanted = torch.autograd.grad(expected, [exact[i] for i in differentiable],
                                 [g.to(o.dtype).double() for g, o in zip(grads, outputs, strict=True)])  # fmt: skip
    for a, b in zip((*outputs, *found), (*expected, *wanted), strict=True):
        assert a.shape == b.shape
        assert difference(a, b, floor=0.1) < DTYPES[dtype]  # a norm of width 1 has hardly any gradient


def normed(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
