"""An optimiser's operators: torch's AdamW, rounding that is right on the mean, sums that no thread can change."""

import math

import pytest
import torch
import torch.nn.functional as F

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops import adamw_step, clip, global_norm, newton_schulz, square_sum
from liaoyuan.ops.optimiser import ADAMW_STEP
from tests.ops.cases import difference, random

SHAPES = [(3, 5), (1,), (0,), (257, 300), (70_001,)]


def state(shapes, dtype=torch.float32):
    weights = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    return weights, [torch.zeros(shape) for shape in shapes], [torch.zeros(shape) for shape in shapes]


def test_steps_are_those_of_torch():
    weights, first, second = state(SHAPES)
    twins = [torch.nn.Parameter(x.clone()) for x in weights]
    oracle = torch.optim.AdamW(twins, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        gradients = [random(*shape, seed=100 * step + i) for i, shape in enumerate(SHAPES)]
        adamw_step(weights, gradients, first, second, step, 3e-3)
        for twin, gradient in zip(twins, gradients, strict=True):
            twin.grad = gradient
        oracle.step()
    for weight, twin, m, v in zip(weights, twins, first, second, strict=True):
        torch.testing.assert_close(weight, twin.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(m, oracle.state[twin]["exp_avg"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(v, oracle.state[twin]["exp_avg_sq"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_a_bf16_weight_goes_to_one_of_its_neighbours(gradient_dtype):
    (weight,), (first,), (second,) = state([(300, 70)], torch.bfloat16)
    gradient = random(300, 70, dtype=gradient_dtype, seed=3)
    exact, m, v = weight.double(), first.double(), second.double()
    adamw_step([exact], [gradient.double()], [m], [v], 1, 1e-3)
    adamw_step([weight], [gradient], [first], [second], 1, 1e-3)
    last_place = 2.0 ** (exact.abs().log2().floor() - 7)
    assert ((weight.double() - exact).abs() < last_place * 1.001).all()
    assert difference(first, m) < 1e-6


def test_stochastic_rounding_is_right_on_the_mean():
    """The mean of many seeds is within four standard errors of the exact weight, also where nearest never moves."""
    start, seeds = torch.full((64,), 1.0).bfloat16(), 4000
    gradient, total = torch.linspace(0.1, 1.0, 64), torch.zeros(64, dtype=torch.float64)
    exact = torch.ones(64)
    adamw_step([exact], [gradient], [torch.zeros(64)], [torch.zeros(64)], 1, 3e-4, weight_decay=0.0)
    for seed in range(seeds):
        weight = start.clone()
        adamw_step([weight], [gradient], [torch.zeros(64)], [torch.zeros(64)], 1, 3e-4, weight_decay=0.0, seed=seed)
        total += weight.double()
    last_place, share = 2.0**-8, (1 - exact.double()) / 2.0**-8
    sigma = last_place * (share * (1 - share) / seeds).sqrt()
    assert (exact.bfloat16() == start).all()
    assert ((total / seeds - exact.double()).abs() < 4 * sigma + 1e-7).all()


def test_rounding_depends_on_the_element_alone():
    """Neither on threads, nor on the cut of a weight into shards, nor on the kernel."""

    def run(parts, threads=1, function=None):
        (weight,), (first,), (second,) = state([(200_000,)], torch.bfloat16)
        gradient, at = random(200_000, seed=9), 0
        torch.set_num_threads(threads)
        for size in parts:
            cut = slice(at, at + size)
            shard = [x[cut] for x in (weight, gradient, first, second)]
            adamw_step(*([x] for x in shard), 1, 1e-2, seed=5, offsets=[at])
            at += size
        torch.set_num_threads(1)
        return weight

    whole = run([200_000])
    for parts, threads in (([200_000], 2), ([7, 100_000, 99_993], 1), ([65_536, 134_464], 2)):
        assert torch.equal(run(parts, threads), whole)
    assert not torch.equal(random(200_000, dtype=torch.bfloat16), whole)


def test_the_reference_rounds_by_the_same_numbers():
    weight, gradient = random(5000, dtype=torch.bfloat16), random(5000, seed=1)
    rates = [1.0, 1e-3, 0.1, 0.95, 0.05, 1.0, 1e-8]
    found, expected = ([weight.clone(), gradient, torch.zeros(5000), torch.zeros(5000)] for _ in range(2))
    ADAMW_STEP.call(*found, rates, 1234567, 99)
    ADAMW_STEP.reference(*expected, rates, 1234567, 99)
    assert (found[0] != expected[0]).float().mean() < 1e-3  # where fp32 differs in its last place


def test_bf16_weights_learn_with_stochastic_rounding_where_nearest_stalls():
    """A small network: with chance the loss follows that of fp32 masters; rounded to nearest it stops far above."""
    x = random(256, 16)
    target = torch.tanh(x @ random(16, 8, seed=1)) @ random(8, 4, seed=2)

    def loss(weights):
        return F.mse_loss(torch.tanh(x @ weights[0].float()) @ weights[1].float(), target)

    def train(way):
        masters = [0.3 * random(16, 32, seed=3), 0.3 * random(32, 4, seed=4)]
        weights = [w.bfloat16() for w in masters]
        moments = [[torch.zeros_like(w) for w in masters] for _ in range(2)]
        for step in range(1, 601):
            leaves = [w.clone().requires_grad_() for w in weights]
            gradients = torch.autograd.grad(loss(leaves), leaves)
            if way == "chance":
                adamw_step(weights, gradients, *moments, step, 3e-4, weight_decay=0.0)
            else:
                wide = masters if way == "masters" else [w.float() for w in weights]
                adamw_step(wide, gradients, *moments, step, 3e-4, weight_decay=0.0)
                weights = [w.bfloat16() for w in wide]
        return loss(weights).item()

    losses = {way: train(way) for way in ("masters", "chance", "nearest")}
    assert losses["chance"] < 1.15 * losses["masters"]
    assert losses["nearest"] > 1.5 * losses["masters"]


def test_what_is_not_a_number_stays_so():
    (weight,), (first,), (second,) = state([(40,)], torch.bfloat16)
    gradient = torch.zeros(40)
    gradient[3] = torch.nan
    adamw_step([weight], [gradient], [first], [second], 1, 1e-3)
    assert weight.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 17, 1024, 65_536, 300_001])
def test_sums_of_squares(size, dtype):
    x = random(size, dtype=dtype)
    found = square_sum(x)
    assert found.dtype is torch.float64
    assert math.isclose(found.item(), x.double().square().sum().item(), rel_tol=1e-6)
    torch.set_num_threads(2)
    try:
        assert torch.equal(square_sum(x), found)
    finally:
        torch.set_num_threads(1)


def test_clipping_is_that_of_torch():
    tensors = [random(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    twins = [torch.nn.Parameter(torch.empty_like(x)) for x in tensors]
    for twin, tensor in zip(twins, tensors, strict=True):
        twin.grad = tensor.clone()
    expected = torch.nn.utils.clip_grad_norm_(twins, 2.0)
    assert math.isclose(clip(tensors, 2.0).item(), expected.item(), rel_tol=1e-5)
    for twin, tensor in zip(twins, tensors, strict=True):
        torch.testing.assert_close(tensor, twin.grad, rtol=1e-4, atol=1e-9)
    assert math.isclose(global_norm(tensors).item(), 2.0, rel_tol=1e-5)
    before = [x.clone() for x in tensors]
    clip(tensors, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert global_norm([]).item() == 0.0
    assert clip([torch.tensor([torch.inf])], 1.0).isinf()


def test_strided_tensors_are_summed():
    x = random(70, 90)
    assert math.isclose(square_sum(x.t()[3:]).item(), x.t()[3:].double().square().sum().item(), rel_tol=1e-6)


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (3, 20, 32), (2, 3, 8, 20)])
def test_matrices_are_made_orthogonal(shape):
    matrices = random(*shape)
    found = newton_schulz(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert found.shape == matrices.shape
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3 and values.max() < 1.3
    overlap = (found * (u @ v)).sum((-2, -1)) / min(shape[-2:])
    assert (overlap > 0.75).all()


def test_lists_and_shapes_that_do_not_fit_are_named():
    weights, first, second = state([(3, 4)])
    with pytest.raises(LiaoyuanError, match="lists of one length, not 1, 0, 1, 1, 1"):
        adamw_step(weights, [], first, second, 1, 1e-3)
    with pytest.raises(LiaoyuanError, match=r"tensors 0 .* weights \[3, 4\] float32 cpu, gradients \[4, 3\]"):
        adamw_step(weights, [random(4, 3)], first, second, 1, 1e-3)
