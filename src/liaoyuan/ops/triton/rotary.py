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


def latent_rotary(
    query: Tensor, expanded: Tensor, shared: Tensor, cosine: Tensor, sine: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the operator `latent_rotary`."""
    query, expanded, shared = query.contiguous(), expanded.contiguous(), shared.contiguous()
    tokens, turned = shared.shape
    own = query.shape[1] // heads - turned
    turned_query, key = (query.new_empty(tokens, heads, own + turned) for _ in range(2))
    value = query.new_empty(tokens, heads, expanded.shape[1] // heads - own)
    arguments = (query, expanded, shared, cosine.contiguous(), sine.contiguous(), turned_query, key, value)
    rows, sizes = _latent_tile(own, turned, value.shape[2])
    launch(_latent_forward, (ceil_div(tokens, rows), heads), query, *arguments, tokens, heads, **sizes)
    return turned_query, key, value


def latent_rotary_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward side of `latent_rotary`."""
    grads = (grad_query.contiguous(), grad_key.contiguous(), grad_value.contiguous())
    tokens, heads, dim = grad_key.shape
    turned, value_dim = 2 * cosine.shape[1], grad_value.shape[2]
    own = dim - turned
    widths = (heads * dim, heads * (own + value_dim), turned)
    results = [grad_key.new_empty(tokens, width) for width in widths]
    rows, sizes = _latent_tile(own, turned, value_dim)
    arguments = (*grads, cosine.contiguous(), sine.contiguous(), *results)
    launch(_latent_backward, (ceil_div(tokens, rows),), grad_key, *arguments, tokens, heads, **sizes)
    return results[0], results[1], results[2]


def _latent_tile(own: int, turned: int, value_dim: int) -> tuple[int, dict[str, int]]:
    """Return how many tokens a program takes, and the sizes of a head with the room for each."""
    rooms = [power_of_two(size) for size in (own, turned // 2, value_dim)]
    rows = max(1, ELEMENTS // max(rooms))
    sizes = dict(zip(("OWN_ROOM", "HALF_ROOM", "VALUE_ROOM"), rooms, strict=True))
    return rows, {"OWN": own, "TURNED": turned, "VALUE": value_dim, "ROWS": rows, **sizes}


@triton.jit
def _moved(source, target, token, tokens, from_place, to_place, SIZE: tl.constexpr, ROOM: tl.constexpr):
    """Copy a stretch of a head of some tokens."""
    column = tl.arange(0, ROOM)[None, :]
    inside = (token < tokens)[:, None] & (column < SIZE)
    tl.store(
        target + to_place[:, None] + column, tl.load(source + from_place[:, None] + column, mask=inside), mask=inside
    )


@triton.jit
def _halves(source, token, tokens, place, HALF: tl.constexpr, ROOM: tl.constexpr):
    """Return both halves of what is rotated of some tokens' heads, fp32."""
    column = tl.arange(0, ROOM)[None, :]
    inside = (token < tokens)[:, None] & (column < HALF)
    at = source + place[:, None] + column
    first, second = tl.load(at, mask=inside, other=0.0), tl.load(at + HALF, mask=inside, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_halves(target, token, tokens, place, first, second, HALF: tl.constexpr, ROOM: tl.constexpr):
    column = tl.arange(0, ROOM)[None, :]
    inside = (token < tokens)[:, None] & (column < HALF)
    at = target + place[:, None] + column
    tl.store(at, first.to(target.dtype.element_ty), mask=inside)
    tl.store(at + HALF, second.to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("tokens",))
def _latent_forward(
    query, expanded, shared, cosine, sine, turned_query, key, value, tokens, heads,
    OWN: tl.constexpr, TURNED: tl.constexpr, VALUE: tl.constexpr, ROWS: tl.constexpr,
    OWN_ROOM: tl.constexpr, HALF_ROOM: tl.constexpr, VALUE_ROOM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = token * heads + tl.program_id(1)
    at, half = head * (OWN + TURNED), TURNED // 2
    _moved(query, turned_query, token, tokens, at, at, OWN, OWN_ROOM)
    _moved(expanded, key, token, tokens, head * (OWN + VALUE), at, OWN, OWN_ROOM)
    _moved(expanded, value, token, tokens, head * (OWN + VALUE) + OWN, head * VALUE, VALUE, VALUE_ROOM)
    column = tl.arange(0, HALF_ROOM)[None, :]
    inside = (token < tokens)[:, None] & (column < half)
    c = tl.load(cosine + token[:, None] * half + column, mask=inside, other=0.0)
    s = tl.load(sine + token[:, None] * half + column, mask=inside, other=0.0)
    x, y = _halves(query, token, tokens, at + OWN, half, HALF_ROOM)
    _store_halves(turned_query, token, tokens, at + OWN, x * c - y * s, y * c + x * s, half, HALF_ROOM)
    x, y = _halves(shared, token, tokens, token * TURNED, half, HALF_ROOM)
    _store_halves(key, token, tokens, at + OWN, x * c - y * s, y * c + x * s, half, HALF_ROOM)


@triton.jit(do_not_specialize=("tokens",))
def _latent_backward(
    grad_query, grad_key, grad_value, cosine, sine, query, expanded, shared, tokens, heads,
    OWN: tl.constexpr, TURNED: tl.constexpr, VALUE: tl.constexpr, ROWS: tl.constexpr,
    OWN_ROOM: tl.constexpr, HALF_ROOM: tl.constexpr, VALUE_ROOM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    half = TURNED // 2
    column = tl.arange(0, HALF_ROOM)[None, :]
    inside = (token < tokens)[:, None] & (column < half)
    c = tl.load(cosine + token[:, None] * half + column, mask=inside, other=0.0)
    s = tl.load(sine + token[:, None] * half + column, mask=inside, other=0.0)
    first = tl.zeros((ROWS, HALF_ROOM), tl.float32)
    second = tl.zeros((ROWS, HALF_ROOM), tl.float32)
    for number in range(heads):
        head = token * heads + number
        at = head * (OWN + TURNED)
        _moved(grad_query, query, token, tokens, at, at, OWN, OWN_ROOM)
        _moved(grad_key, expanded, token, tokens, at, head * (OWN + VALUE), OWN, OWN_ROOM)
        _moved(grad_value, expanded, token, tokens, head * VALUE, head * (OWN + VALUE) + OWN, VALUE, VALUE_ROOM)
        x, y = _halves(grad_query, token, tokens, at + OWN, half, HALF_ROOM)
        _store_halves(query, token, tokens, at + OWN, x * c + y * s, y * c - x * s, half, HALF_ROOM)
        x, y = _halves(grad_key, token, tokens, at + OWN, half, HALF_ROOM)
        first += x
        second += y
    _store_halves(
        shared, token, tokens, token * TURNED, first * c + second * s, second * c - first * s, half, HALF_ROOM
    )
