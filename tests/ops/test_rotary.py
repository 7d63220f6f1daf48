"""Rotary embedding is transformers', in every layout that a family has, and a row's bits depend on it alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models.rotary import Rotary, head_order, rotary_angles
from liaoyuan.ops import latent_rotary, split_rotary, status
from tests.ops.cases import DTYPES, compare, difference, normed, random

DIMS = (2, 6, 24, 32, 48, 64, 80, 128)


@pytest.fixture
def kernels():
    """Skip what is promised of the kernels alone where there are none."""
    if any(row.kernel != "native" for row in status() if row.operator.endswith("rotary")):
        pytest.skip("needs the native kernels")


def angles(rows, dim):
    angle = 6 * random(rows, dim // 2, seed=9)
    return angle.cos(), angle.sin()


def turned(x, cosine, sine):
    """Turn pairs (i, i + D / 2) as complex numbers."""
    y = torch.complex(*x.chunk(2, -1)) * torch.complex(cosine, sine)[:, None]
    return torch.cat((y.real, y.imag), -1)


def split_by_hand(qkv, cosine, sine, heads, dim, query_norm, key_norm, eps):
    parts = qkv.view(len(qkv), heads, qkv.shape[1] // (heads * dim), dim)
    query, key, value = parts[:, :, :-2].flatten(1, 2), parts[:, :, -2], parts[:, :, -1]
    if query_norm is not None:
        query, key = normed(query, query_norm, eps), normed(key, key_norm, eps)
    return turned(query, cosine, sine), turned(key, cosine, sine), value


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 60), heads=st.integers(1, 3), groups=st.integers(1, 9), dim=st.sampled_from(DIMS),
    with_norm=st.booleans(), dtype=st.sampled_from(list(DTYPES)),
)  # fmt: skip
def test_split_rotary(rows, heads, groups, dim, with_norm, dtype):
    qkv = random(rows, heads * (groups + 2) * dim, dtype=dtype)
    norms = [1 + 0.1 * random(dim, seed=i).to(dtype) for i in (2, 3)] if with_norm else [None, None]
    inputs = (qkv, *angles(rows, dim), heads, dim, *norms, 1e-6)
    compare(split_rotary, split_by_hand, inputs, dtype, (0, 5, 6) if with_norm else (0,))


def latent_by_hand(query, expanded, shared, cosine, sine, heads):
    query, expanded = query.unflatten(1, (heads, -1)), expanded.unflatten(1, (heads, -1))
    own = query.shape[2] - shared.shape[1]
    query = torch.cat((query[..., :own], turned(query[..., own:], cosine, sine)), -1)
    rotated = turned(shared[:, None], cosine, sine).repeat(1, heads, 1)
    return query, torch.cat((expanded[..., :own], rotated), -1), expanded[..., own:]


def latent_inputs(rows, heads, own, dim, value, dtype=torch.float32):
    widths = (heads * (own + dim), heads * (own + value), dim)
    return *(random(rows, width, dtype=dtype, seed=i) for i, width in enumerate(widths)), *angles(rows, dim), heads


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 60), heads=st.integers(1, 9), own=st.integers(0, 70), dim=st.sampled_from(DIMS),
    value=st.integers(1, 70), dtype=st.sampled_from(list(DTYPES)),
)  # fmt: skip
def test_latent_rotary(rows, heads, own, dim, value, dtype):
    compare(latent_rotary, latent_by_hand, latent_inputs(rows, heads, own, dim, value, dtype), dtype, (0, 1, 2))


def half_split(q, k, cosine, sine):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return apply_rotary_pos_emb(q, k, cosine, sine)


def in_pairs_of_a_part(q, k, cosine, sine):
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

    return apply_rotary_pos_emb(q, k, cosine, sine)


def of_a_part(q, k, cosine, sine):
    from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb

    return apply_rotary_pos_emb(q, k, cosine, sine)


YARN = Rotary(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.3)


@pytest.mark.parametrize(
    ("rotary", "theirs"),
    [
        (Rotary(), half_split),
        (YARN, half_split),
        (Rotary(rope_type="llama3", factor=8.0, original_max_position_embeddings=32), half_split),
        (Rotary(partial=0.5), of_a_part),
        (Rotary(partial=0.5, interleaved=True), in_pairs_of_a_part),
        (Rotary(interleaved=True), in_pairs_of_a_part),
    ],
    ids=["llama", "yarn", "llama3", "glm4-moe", "glm", "all pairs"],
)
def test_one_kernel_serves_every_layout_of_the_families(rotary, theirs):
    """Heads whose dimensions are put in our order are rotated as transformers rotates them in theirs."""
    tokens, dim = 20, 64
    positions, width = torch.arange(tokens), rotary.width(dim)
    order = head_order(rotary, dim) or list(range(dim))
    query, key, value = (random(tokens, 1, dim, seed=seed) for seed in range(3))
    angle = positions[:, None] * rotary.frequencies(width)
    wave = [f(torch.cat((angle, angle), 1))[None] * rotary.angle_scale for f in (torch.cos, torch.sin)]
    expected = theirs(query.transpose(0, 1)[None], key.transpose(0, 1)[None], *wave)
    qkv = torch.cat((query[..., order], key[..., order], value), -1).flatten(1)
    found = split_rotary(qkv, *rotary_angles(positions, rotary, dim), 1, dim)
    for a, b in zip(found, expected, strict=False):
        assert difference(a[:, 0], b[0, 0][:, order]) < 1e-6
    assert torch.equal(found[2], value)


def test_latent_rotary_is_deepseek_s():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    tokens, heads, own, dim = 20, 3, 16, 8
    rotary = Rotary(interleaved=True)
    order = head_order(rotary, dim)
    query, key, shared = (
        random(tokens, heads, own + dim),
        random(tokens, heads, own, seed=1),
        random(tokens, dim, seed=2),
    )
    value = random(tokens, heads, 5, seed=3)
    angle = torch.arange(tokens)[:, None] * rotary.frequencies(dim)
    wave = [f(torch.cat((angle, angle), 1))[None] for f in (torch.cos, torch.sin)]
    theirs = apply_rotary_pos_emb_interleave(query[..., own:].transpose(0, 1)[None], shared[None, None], *wave)
    ours = torch.cat((query[..., :own], query[..., own:][..., order]), -1).flatten(1)
    expanded = torch.cat((key, value), -1).flatten(1)
    found = latent_rotary(ours, expanded, shared[:, order], *rotary_angles(torch.arange(tokens), rotary, dim), heads)
    assert torch.equal(found[0][..., :own], query[..., :own]) and torch.equal(found[1][..., :own], key)
    assert difference(found[0][..., own:], theirs[0][0].transpose(0, 1)) < 1e-6
    assert difference(found[1][..., own:], theirs[1][0].transpose(0, 1).expand(-1, heads, -1)) < 1e-6
    assert torch.equal(found[2], value)


def results(function, inputs, differentiable):
    """Return outputs and gradients, of which those with as many rows as the first input has are first."""
    given = [x.detach().clone().requires_grad_(i in differentiable) if torch.is_tensor(x) else x
             for i, x in enumerate(inputs)]  # fmt: skip
    outputs = function(*given)
    grads = [(3 * out.detach()).sin() for out in outputs]
    return [x.detach() for x in outputs], torch.autograd.grad(outputs, [given[i] for i in differentiable], grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [6, 32, 64, 72])
@pytest.mark.parametrize("kind", ["plain", "normed", "latent"])
def test_the_bits_of_a_row_depend_on_it_alone(kind, dim, dtype, kernels):
    if kind == "latent":
        function, inputs, differentiable = latent_rotary, latent_inputs(300, 3, 20, dim, 17, dtype), (0, 1, 2)
    else:
        norms = [1 + 0.1 * random(dim, seed=i).to(dtype) for i in (2, 3)] if kind == "normed" else [None, None]
        inputs = (random(300, 2 * 5 * dim, dtype=dtype), *angles(300, dim), 2, dim, *norms, 1e-6)
        function, differentiable = split_rotary, (0, 5, 6) if kind == "normed" else (0,)
    whole = results(function, inputs, differentiable)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            again = results(function, inputs, differentiable)
            assert all(torch.equal(a, b) for a, b in zip((*again[0], *again[1]), (*whole[0], *whole[1]), strict=True))
            for part in (slice(3, 4), slice(100, 177), slice(299, 300)):
                some = [x[part] if torch.is_tensor(x) and x.dim() == 2 else x for x in inputs]
                outputs, grads = results(function, some, differentiable)
                rows = [g for g in grads if g.dim() == 2]  # the gradients of norms are sums over rows
                expected = [x[part] for x in (*whole[0], *(g for g in whole[1] if g.dim() == 2))]
                assert all(torch.equal(a, b) for a, b in zip((*outputs, *rows), expected, strict=True))
        finally:
            torch.set_num_threads(1)


def test_bf16_is_fp32_rounded_as_torch_rounds(kernels):
    qkv = random(40, 4 * 64, dtype=torch.bfloat16)
    qkv[:20] *= 1e-38  # and numbers that are denormal
    narrow, wide = (split_rotary(x, *angles(40, 64), 1, 64) for x in (qkv, qkv.float()))
    for a, b in zip(narrow, wide, strict=True):
        assert torch.equal(a.view(torch.int16), b.bfloat16().view(torch.int16))


def test_strides_are_taken():
    qkv, wave = random(48, 10).t(), [x.t().contiguous().t() for x in angles(10, 8)]
    norms = [random(16, seed=i)[::2] for i in (2, 3)]
    inputs = (qkv, *wave, 1, 8, *norms, 1e-6)
    compare(split_rotary, split_by_hand, inputs, torch.float32, (0, 5, 6))
    query, expanded, shared, *rest = latent_inputs(10, 2, 4, 8, 6)
    merged = torch.cat((random(10, 7), shared), 1)  # the part is a slice of a projection
    inputs = (query.t().contiguous().t(), expanded, merged[:, 7:], *rest)
    compare(latent_rotary, latent_by_hand, inputs, torch.float32, (0, 1, 2))


def test_an_unused_output_gives_no_gradient():
    inputs = [x.requires_grad_(i < 3) if torch.is_tensor(x) else x for i, x in enumerate(latent_inputs(5, 2, 4, 8, 6))]
    value = latent_rotary(*inputs)[2]
    grads = torch.autograd.grad(value.sum(), inputs[:3], allow_unused=True)
    assert all(g is None or not g.any() for g in (grads[0], grads[2]))
    assert torch.equal(grads[1].unflatten(1, (2, -1)), torch.tensor([0.0] * 4 + [1.0] * 6).expand(5, 2, 10))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"qkv": torch.zeros(3, 30)}, r"qkv \[3, 30\].* 1 key-value heads of 8"),
        ({"qkv": torch.zeros(3, 16)}, r"qkv \[3, 16\]"),
        ({"cosine": torch.zeros(2, 4)}, r"cosine \[2, 4\] does not fit qkv \[3, 32\]"),
    ],
)
def test_wrong_sizes_are_refused_by_name(change, said):
    inputs = {"qkv": torch.zeros(3, 32), "cosine": torch.zeros(3, 4), "sine": torch.zeros(3, 4)} | change
    with pytest.raises(LiaoyuanError, match=said):
        split_rotary(**inputs, num_key_value_heads=1, head_dim=8)


@pytest.mark.parametrize(
    ("widths", "rows", "said"),
    [
        ((23, 20, 8), 3, r"query \[3, 23\], expanded \[3, 20\] and shared \[3, 8\] do not fit 2 heads"),
        ((24, 6, 8), 3, r"expanded \[3, 6\]"),
        ((8, 20, 8), 3, r"query \[3, 8\]"),
        ((24, 20, 8), 4, r"cosine \[4, 4\] does not fit query \[3, 24\]"),
    ],
)
def test_latent_sizes_that_do_not_fit_are_refused_by_name(widths, rows, said):
    with pytest.raises(LiaoyuanError, match=said):
        latent_rotary(*(torch.zeros(3, width) for width in widths), torch.zeros(rows, 4), torch.zeros(rows, 4), 2)


def test_fp64_is_computed_in_fp64():
    *inputs, heads = latent_inputs(4, 2, 3, 6, 5)
    inputs = [x.double().requires_grad_(i < 3) for i, x in enumerate(inputs)]
    assert torch.autograd.gradcheck(lambda *x: latent_rotary(*x, heads), inputs)
