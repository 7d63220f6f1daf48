"""From projections to rotated heads: of grouped-query attention with QK-norm (optional), and of latent attention.

Rotary embedding: Su et al. 2021 (arXiv 2104.09864), in the half-split layout of Hugging Face Llama. It is the only one
here: dimensions that a family's files lay out in pairs (GLM, DeepSeek) are put in this order when weights are read, a
head that is rotated in part has pairs of angle zero, and every scaling (linear, Llama 3, YaRN with its factor) is in
the angles. QK-norm: Henry et al. 2020 (arXiv 2010.04245), as RMSNorm over the head dimension (Qwen3). Latent attention:
DeepSeek-V2 (arXiv 2405.04434), sec. 2.1.3.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import ASCEND, NATIVE, TILED, triton
from liaoyuan.ops.operator import Gradient, Operator, pull_back, register, save_inputs, saved_inputs, wide
from liaoyuan.ops.shapes import ShapeError, takes_shapes

MAX_DIM = 512  # of a head in the native kernel


@takes_shapes(
    qkv="float [N, _]",
    cosine="float [N, D/2]",
    sine="float [N, D/2]",
    query_norm="float [D]",
    key_norm="float [D]",
)
def split_rotary(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    num_key_value_heads: int,
    head_dim: int,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return contiguous query [N, Hq, D], key [N, Hk, D], value [N, Hk, D].

    Args:
        qkv: [N, Hk * (G + 2) * D]; for each key-value head its G query heads, its key, its value.
        cosine, sine: [N, D / 2] fp32, the angles of each token's position.
        query_norm, key_norm: [D] weights of QK-norm, or None.

    Raises:
        ShapeError: the projection or the angles do not fit the heads.
    """
    _check(qkv, cosine, num_key_value_heads, head_dim, query_norm)
    arguments = (qkv, cosine, sine, num_key_value_heads, head_dim, query_norm, key_norm, eps)
    if head_dim <= MAX_DIM and cosine.dtype is torch.float32 and takes(SPLIT_ROTARY, qkv, query_norm, key_norm):
        return SPLIT_ROTARY.call(*arguments)
    return _split_rotary(*arguments)


@takes_shapes(
    query="float [N, _]",
    expanded="same [N, _]",
    shared="same [N, _]",
    cosine="float [N, R/2]",
    sine="float [N, R/2]",
)
def latent_rotary(
    query: Tensor, expanded: Tensor, shared: Tensor, cosine: Tensor, sine: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return contiguous query [N, H, O + R], key [N, H, O + R] and value [N, H, V] of latent attention.

    Args:
        query: [N, H * (O + R)]; of each head the last R dimensions are rotated.
        expanded: [N, H * (O + V)]; for each head its key's own dimensions and its value.
        shared: [N, R], what all heads' keys have behind their own once it is rotated.
        cosine, sine: [N, R / 2] fp32, the angles of each token's position.

    Raises:
        ShapeError: the sizes do not fit each other.
    """
    turned = shared.shape[1]
    own = query.shape[1] // heads - turned
    if turned % 2 or query.shape[1] % heads or expanded.shape[1] % heads or not 0 <= own <= expanded.shape[1] // heads:
        raise ShapeError(
            f"latent_rotary: query {list(query.shape)}, expanded {list(expanded.shape)} and shared "
            f"{list(shared.shape)} do not fit {heads} heads."
        )
    if cosine.shape[1] != turned // 2:
        raise ShapeError(
            f"latent_rotary: cosine {list(cosine.shape)} does not fit shared {list(shared.shape)}: there is an angle "
            "for two columns."
        )
    arguments = (query, expanded, shared, cosine, sine, heads)
    if turned <= MAX_DIM and cosine.dtype is torch.float32 and takes(LATENT_ROTARY, query, expanded, shared):
        return LATENT_ROTARY.call(*arguments)
    return _latent_rotary(*arguments)


def _check(qkv: Tensor, cosine: Tensor, heads: int, dim: int, norm: Tensor | None) -> None:
    given = f"split_rotary: qkv {list(qkv.shape)}, {heads} key-value heads of {dim}"
    if heads < 1 or dim < 1 or qkv.shape[1] % (heads * dim) or qkv.shape[1] < 3 * heads * dim:
        raise ShapeError(f"{given} do not fit: each needs queries, a key and a value.")
    if cosine.shape[1] != dim // 2 or dim % 2:
        raise ShapeError(f"{given}, and cosine {list(cosine.shape)} do not fit: there is an angle for two columns.")
    if norm is not None and norm.shape[0] != dim:
        raise ShapeError(f"{given}, and query_norm {list(norm.shape)} do not fit: a weight for each column of a head.")


def _split_rotary(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    heads: int,
    dim: int,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = qkv.unflatten(1, (heads, -1, dim))
    query = groups[:, :, :-2].flatten(1, 2)
    key, value = groups[:, :, -2], groups[:, :, -1].contiguous()
    if query_norm is not None and key_norm is not None:
        query, key = _normalise(query, query_norm, eps), _normalise(key, key_norm, eps)
    return _rotate(query, cosine, sine), _rotate(key, cosine, sine), value


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = wide(x)
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return x [N, H, D] turned by angles whose cosine and sine are [N, D / 2], fp32; pairs are (i, i + D / 2)."""
    cosine, sine = cosine[:, None].to(x.dtype), sine[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def _backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, qkv: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    normed = inputs[4] is not None
    wanted = (0, 5, 6) if normed else (0,)
    found = pull_back(_split_rotary, (qkv, *inputs), wanted, (grad_query, grad_key, grad_value))
    return found[0], *(found[1:] if normed else (qkv.new_empty(0), qkv.new_empty(0)))


def _apply(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    inputs = saved_inputs(ctx)
    qkv, heads, dim = inputs[0], inputs[3], inputs[4]
    counts = (qkv.shape[1] // dim - 2 * heads, heads, heads)
    given = [qkv.new_zeros(len(qkv), n, dim) if g is None else g for n, g in zip(counts, grads, strict=True)]
    found = torch.ops.liaoyuan.split_rotary_backward(*given, *inputs)
    norms = found[1:] if inputs[5] is not None else (None, None)
    return found[0], None, None, None, None, *norms, None


def _fake(qkv: Tensor, cosine: Tensor, sine: Tensor, heads: int, dim: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = qkv.shape[0]
    query = qkv.new_empty(rows, qkv.shape[1] // dim - 2 * heads, dim)
    return query, qkv.new_empty(rows, heads, dim), qkv.new_empty(rows, heads, dim)


def _fake_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, qkv: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    size = inputs[3] if inputs[4] is not None else 0
    grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return grad, qkv.new_empty(size), qkv.new_empty(size)


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(3)
    for rows, heads, groups, dim, normed in ((3, 1, 1, 24, True), (5, 2, 3, 16, False), (90, 2, 2, 64, True)):
        qkv = torch.randn(rows, heads * (groups + 2) * dim, generator=generator).to(dtype)
        angle = torch.randn(rows, dim // 2, generator=generator)
        # bf16 angles in fp32, since the reference rounds them to the dtype of the projection
        angles = [f(angle).to(dtype).float() for f in (torch.cos, torch.sin)]
        norms = [(torch.rand(dim, generator=generator) + 0.5).to(dtype) if normed else None for _ in range(2)]
        yield qkv, *angles, heads, dim, *norms, 1e-6


def _workload(dtype: torch.dtype) -> tuple[Any, ...]:
    angle, norm = torch.randn(2048, 32), torch.ones(64, dtype=dtype)
    return torch.randn(2048, 4 * 4 * 64).to(dtype), angle.cos(), angle.sin(), 4, 64, norm, norm, 1e-6


SPLIT_ROTARY = register(
    Operator(
        name="split_rotary",
        kernels=(NATIVE, triton("rotary"), ASCEND, TILED),
        schema="(Tensor qkv, Tensor cosine, Tensor sine, int heads, int dim, Tensor? query_norm, Tensor? key_norm, "
        "float eps) -> (Tensor, Tensor, Tensor)",
        reference=_split_rotary,
        fake=_fake,
        samples=_samples,
        workload=_workload,
        flops=lambda qkv, *_: 0,
        traffic=lambda qkv, cosine, sine, *_: 2 * qkv.nbytes + cosine.nbytes + sine.nbytes,
        gradient=Gradient(
            inputs=(0, 5, 6),
            schema="(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor qkv, Tensor cosine, Tensor sine, "
            "int heads, int dim, Tensor? query_norm, Tensor? key_norm, float eps) -> (Tensor, Tensor, Tensor)",
            reference=_backward,
            fake=_fake_backward,
            save=save_inputs,
            apply=_apply,
        ),
    )
)


def _latent_rotary(
    query: Tensor, expanded: Tensor, shared: Tensor, cosine: Tensor, sine: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    query = query.unflatten(1, (heads, -1))
    own = query.shape[2] - shared.shape[1]
    query = torch.cat([query[..., :own], _rotate(query[..., own:], cosine, sine)], -1)
    key, value = expanded.unflatten(1, (heads, -1)).tensor_split([own], -1)
    shared = _rotate(shared[:, None], cosine, sine).expand(-1, heads, -1)
    return query, torch.cat([key, shared], -1), value.contiguous()


def _latent_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    own = grad_key.shape[2] - 2 * cosine.shape[1]
    query = torch.cat([grad_query[..., :own], _rotate(grad_query[..., own:], cosine, -sine)], -1)
    shared = _rotate(wide(grad_key[..., own:]).sum(1, keepdim=True), cosine, -sine)[:, 0]
    return query.flatten(1), torch.cat([grad_key[..., :own], grad_value], -1).flatten(1), shared.to(grad_key.dtype)


def _save_angles(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[3], inputs[4])


def _apply_latent(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return *torch.ops.liaoyuan.latent_rotary_backward(*grads, *ctx.saved_tensors), None, None, None


def _fake_latent(query: Tensor, expanded: Tensor, shared: Tensor, cosine: Tensor, sine: Tensor, heads: int) -> Any:
    rows, dim = query.shape[0], query.shape[1] // heads
    value_dim = expanded.shape[1] // heads - dim + shared.shape[1]
    turned, key = (query.new_empty(rows, heads, dim) for _ in range(2))
    return turned, key, query.new_empty(rows, heads, value_dim)


def _fake_latent_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, dim = grad_key.shape
    turned = 2 * cosine.shape[1]
    query, shared = grad_key.new_empty(rows, heads * dim), grad_key.new_empty(rows, turned)
    return query, grad_key.new_empty(rows, heads * (dim - turned + grad_value.shape[2])), shared


def _latent_sample(rows: int, heads: int, own: int, turned: int, value: int, dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(4)
    widths = (heads * (own + turned), heads * (own + value), turned)
    inputs = [torch.randn(rows, width, generator=generator).to(dtype) for width in widths]
    angle = torch.randn(rows, turned // 2, generator=generator)
    return *inputs, *(f(angle).to(dtype).float() for f in (torch.cos, torch.sin)), heads


def _latent_traffic(query: Tensor, expanded: Tensor, shared: Tensor, cosine: Tensor, sine: Tensor, heads: int) -> int:
    key = len(query) * heads * shared.shape[1]  # the shared part is written for every head
    elements = 2 * (query.numel() + expanded.numel()) + shared.numel() + key
    return elements * query.element_size() + cosine.nbytes + sine.nbytes


LATENT_ROTARY = register(
    Operator(
        name="latent_rotary",
        kernels=(NATIVE, triton("rotary"), TILED),
        schema="(Tensor query, Tensor expanded, Tensor shared, Tensor cosine, Tensor sine, int heads) "
        "-> (Tensor, Tensor, Tensor)",
        reference=_latent_rotary,
        fake=_fake_latent,
        samples=lambda dtype: (
            _latent_sample(*sizes, dtype)
            for sizes in ((3, 2, 5, 6, 7), (40, 3, 48, 64, 40), (0, 2, 4, 2, 3), (2, 1, 0, 32, 1))
        ),
        workload=lambda dtype: _latent_sample(1024, 16, 128, 64, 128, dtype),
        flops=lambda *_: 0,
        traffic=_latent_traffic,
        gradient=Gradient(
            inputs=(0, 1, 2),
            schema="(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor cosine, Tensor sine) "
            "-> (Tensor, Tensor, Tensor)",
            reference=_latent_backward,
            fake=_fake_latent_backward,
            save=_save_angles,
            apply=_apply_latent,
        ),
    )
)
