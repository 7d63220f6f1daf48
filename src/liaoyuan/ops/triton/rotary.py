"""Split, norm and rotation: a program takes some tokens of one head, as two halves whose elements turn in pairs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.triton.launch import ELEMENTS, ceil_div, launch, power_of_two


def split_rotary(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    heads: int,
    dim: int,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the operator `split_rotary`."""
    qkv, cosine, sine = qkv.contiguous(), cosine.contiguous(), sine.contiguous()
    tokens, groups = qkv.shape[0], qkv.shape[1] // dim // heads - 2
    query = qkv.new_empty(tokens, heads * groups, dim)
    key, value = qkv.new_empty(tokens, heads, dim), qkv.new_empty(tokens, heads, dim)
    normed, norms = _norms(query_norm, key_norm, qkv)
    rows, half = _tile(dim)
    grid = (ceil_div(tokens, rows), heads * (groups + 2))
    arguments = (qkv, cosine, sine, *norms, query, key, value, tokens, heads, groups, eps)
    launch(_forward, grid, qkv, *arguments, NORMED=normed, DIM=dim, ROWS=rows, HALF=half)
    return query, key, value


def split_rotary_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    heads: int,
    dim: int,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward side of `split_rotary`."""
    grads = (grad_query.contiguous(), grad_key.contiguous(), grad_value.contiguous())
    qkv = qkv.contiguous()
    tokens, groups = qkv.shape[0], qkv.shape[1] // dim // heads - 2
    rows, half = _tile(dim)
    blocks = ceil_div(tokens, rows)
    normed, norms = _norms(query_norm, key_norm, qkv)
    result = qkv.new_empty(qkv.shape)
    partial = qkv.new_empty(blocks if normed else 0, heads, groups + 1, dim, dtype=torch.float32)
    arguments = (*grads, qkv, cosine.contiguous(), sine.contiguous(), *norms, result, partial)
    grid = (blocks, heads * (groups + 2))
    sizes = {"NORMED": normed, "DIM": dim, "ROWS": rows, "HALF": half}
    launch(_backward, grid, qkv, *arguments, tokens, heads, groups, eps, **sizes)
    if not normed:
        return result, qkv.new_empty(0), qkv.new_empty(0)
    summed = partial.sum((0, 1))
    return result, summed[:-1].sum(0).to(qkv.dtype), summed[-1].to(qkv.dtype)


def _norms(query_norm: Tensor | None, key_norm: Tensor | None, qkv: Tensor) -> tuple[bool, tuple[Tensor, Tensor]]:
    """Return whether heads are normalised, and the weights, or tensors that no kernel reads."""
    if query_norm is None or key_norm is None:
        return False, (qkv, qkv)
    return True, (query_norm.contiguous(), key_norm.contiguous())


def _tile(dim: int) -> tuple[int, int]:
    """Return how many tokens a program takes, and its room for half a head."""
    half = power_of_two(dim // 2)
    return max(1, ELEMENTS // half), half


@triton.jit
def _place(token, tokens, columns, slot, heads, groups, DIM: tl.constexpr):
    """Return where a tile's first halves begin in qkv, and which of its elements exist."""
    at = (token[:, None] * (heads * (groups + 2)) + slot) * DIM + columns[None, :]
    return at, (token < tokens)[:, None] & (columns < DIM // 2)[None, :]


@triton.jit
def _inverse_rms(first, second, eps, DIM: tl.constexpr):
    return 1.0 / tl.sqrt(tl.sum(first * first + second * second, 1) / DIM + eps)


@triton.jit(do_not_specialize=("tokens",))
def _forward(
    qkv, cosine, sine, query_norm, key_norm, query, key, value, tokens, heads, groups, eps,
    NORMED: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1)  # of the projection: a query head, a key or a value
    head, part = slot // (groups + 2), slot % (groups + 2)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, HALF)
    at, inside = _place(token, tokens, columns, slot, heads, groups, DIM)
    first = tl.load(qkv + at, mask=inside, other=0.0)
    second = tl.load(qkv + at + DIM // 2, mask=inside, other=0.0)
    if part == groups + 1:
        out = (token[:, None] * heads + head) * DIM + columns[None, :]
        tl.store(value + out, first, mask=inside)
        tl.store(value + out + DIM // 2, second, mask=inside)
    else:
        x, y = first.to(tl.float32), second.to(tl.float32)
        is_query = part < groups
        if NORMED:
            scale = _inverse_rms(x, y, eps, DIM)[:, None]
            x *= scale * _weight(query_norm, key_norm, is_query, columns, columns < DIM // 2)[None, :]
            y *= scale * _weight(query_norm, key_norm, is_query, columns + DIM // 2, columns < DIM // 2)[None, :]
        angle = token[:, None] * (DIM // 2) + columns[None, :]
        c = tl.load(cosine + angle, mask=inside, other=0.0)
        s = tl.load(sine + angle, mask=inside, other=0.0)
        one, two = (x * c - y * s).to(first.dtype), (y * c + x * s).to(first.dtype)
        if is_query:
            out = (token[:, None] * (heads * groups) + head * groups + part) * DIM + columns[None, :]
            tl.store(query + out, one, mask=inside)
            tl.store(query + out + DIM // 2, two, mask=inside)
        else:
            out = (token[:, None] * heads + head) * DIM + columns[None, :]
            tl.store(key + out, one, mask=inside)
            tl.store(key + out + DIM // 2, two, mask=inside)


@triton.jit
def _weight(query_norm, key_norm, is_query, columns, inside):
    """Return the weights of the norm that a head has; both are read, since a pointer cannot be chosen everywhere."""
    of_query = tl.load(query_norm + columns, mask=inside, other=0.0).to(tl.float32)
    of_key = tl.load(key_norm + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_query, of_query, of_key)


@triton.jit
def _grad(grad_query, grad_key, grad_value, in_query, in_key, token, tokens, part, groups, inside):
    """Return the gradients of a tile of what the operator gave: of its queries, keys or values."""
    of_query = tl.load(grad_query + in_query, mask=inside & _if(part < groups, token, tokens), other=0.0)
    of_key = tl.load(grad_key + in_key, mask=inside & _if(part == groups, token, tokens), other=0.0)
    of_value = tl.load(grad_value + in_key, mask=inside & _if(part > groups, token, tokens), other=0.0)
    return (of_query + of_key + of_value).to(tl.float32)  # two of them are zero


@triton.jit
def _if(condition, token, tokens):
    """Return a mask of all tokens or none."""
    return (token < tl.where(condition, tokens, 0))[:, None]


@triton.jit(do_not_specialize=("tokens",))
def _backward(
    grad_query, grad_key, grad_value, qkv, cosine, sine, query_norm, key_norm, result, partial,
    tokens, heads, groups, eps, NORMED: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1)
    head, part = slot // (groups + 2), slot % (groups + 2)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, HALF)
    at, inside = _place(token, tokens, columns, slot, heads, groups, DIM)
    in_query = (token[:, None] * (heads * groups) + head * groups + part) * DIM + columns[None, :]
    in_key = (token[:, None] * heads + head) * DIM + columns[None, :]
    first = _grad(grad_query, grad_key, grad_value, in_query, in_key, token, tokens, part, groups, inside)
    in_query, in_key = in_query + DIM // 2, in_key + DIM // 2
    second = _grad(grad_query, grad_key, grad_value, in_query, in_key, token, tokens, part, groups, inside)
    if part <= groups:
        angle = token[:, None] * (DIM // 2) + columns[None, :]
        c = tl.load(cosine + angle, mask=inside, other=0.0)
        s = tl.load(sine + angle, mask=inside, other=0.0)
        back = first * c + second * s
        second = second * c - first * s
        first = back
        if NORMED:
            x = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(qkv + at + DIM // 2, mask=inside, other=0.0).to(tl.float32)
            scale = _inverse_rms(x, y, eps, DIM)[:, None]
            x *= scale
            y *= scale
            real = columns < DIM // 2
            sums = partial + (((tl.program_id(0) * heads) + head) * (groups + 1) + part) * DIM + columns
            tl.store(sums, tl.sum(first * x, 0), mask=real)
            tl.store(sums + DIM // 2, tl.sum(second * y, 0), mask=real)
            first *= _weight(query_norm, key_norm, part < groups, columns, real)[None, :]
            second *= _weight(query_norm, key_norm, part < groups, columns + DIM // 2, real)[None, :]
            inner = (tl.sum(first * x + second * y, 1) / DIM)[:, None]
            first = scale * (first - x * inner)
            second = scale * (second - y * inner)
    tl.store(result + at, first.to(result.dtype.element_ty), mask=inside)
    tl.store(result + at + DIM // 2, second.to(result.dtype.element_ty), mask=inside)
