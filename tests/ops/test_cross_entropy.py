"""Losses and log-probabilities from the output head: PyTorch's own numbers, without the logits."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan import ops
from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops import choice, exact_rows, linear_cross_entropy, logit_statistics, merge_statistics, token_log_prob
from liaoyuan.ops.loss_head import LOSS_HEAD
from liaoyuan.ops.operator import OPERATORS
from tests.ops.cases import difference, random

# Logits are rounded to bf16: one of 8 by up to 0.016, by which its exponential is off.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def head(rows, width, vocabulary, dtype, seed=0):
    """Return hidden states, weight and targets whose logits are about 2 in size."""
    weight = 2 * width**-0.5 * random(vocabulary, width, seed=seed + 1)
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed + 2))
    return random(rows, width, seed=seed).to(dtype), weight.to(dtype), targets


def by_hand(hidden, weight, targets):
    """Return log-probability, log-sum-exp, entropy and mean logit from the definitions."""
    logits = hidden @ weight.t()
    log_probs = F.log_softmax(logits, -1)
    entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
    return log_probs.gather(-1, targets[:, None])[:, 0], torch.logsumexp(logits, -1), entropy, logits.mean(-1)


def found(hidden, weight, targets, moments):
    statistics = logit_statistics(hidden, weight, targets, moments)
    return (statistics.log_prob, statistics.log_sum_exp, statistics.entropy, statistics.mean)[: 4 if moments else 2]


def agree(outputs, expected, inputs, exact, tolerance):
    """Compare outputs, and the gradients of a weighted sum of them, with those of the definitions in fp64."""
    grads = [random(*x.shape, seed=40 + i) for i, x in enumerate(outputs)]
    ours = torch.autograd.grad(outputs, inputs, [g.to(x.dtype) for g, x in zip(grads, outputs, strict=True)])
    theirs = torch.autograd.grad(expected, exact, [g.double() for g in grads])
    for a, b in zip((*outputs, *ours), (*expected, *theirs), strict=True):
        assert a.shape == b.shape
        assert difference(a, b, floor=0.1) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"),
    [(1, 8, 1), (1, 1, 3), (0, 8, 5), (50, 32, 17), (37, 64, 1000), (70, 16, 5003), (9000, 16, 150)],
)
def test_all_statistics_and_their_gradients_are_those_of_the_definitions(rows, width, vocabulary, moments, dtype):
    hidden, weight, targets = head(rows, width, vocabulary, dtype)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = by_hand(*exact, targets)[: 4 if moments else 2]
    agree(found(*inputs, targets, moments), expected, inputs, exact, TOLERANCE[dtype])


@settings(max_examples=25)
@given(
    rows=st.integers(0, 70), width=st.integers(1, 70), vocabulary=st.integers(1, 4500), strided=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), moments=st.booleans(),
)  # fmt: skip
def test_any_shape_and_strides(rows, width, vocabulary, strided, dtype, moments):
    hidden, weight, targets = head(rows, width, vocabulary, dtype, seed=rows)
    if strided:
        hidden, weight = hidden.t().contiguous().t(), weight.repeat(1, 2)[:, :width]
    inputs = [x.detach().requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = by_hand(*exact, targets)[: 4 if moments else 2]
    agree(found(*inputs, targets, moments), expected, inputs, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("unused", range(4))
def test_an_output_that_no_loss_uses_gives_no_gradient(unused):
    hidden, weight, targets = head(20, 24, 2100, torch.float32)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    used = [i for i in range(4) if i != unused]
    outputs, expected = found(*inputs, targets, True), by_hand(*exact, targets)
    agree([outputs[i] for i in used], [expected[i] for i in used], inputs, exact, 1e-5)
    agree(
        [outputs_again := found(*inputs, targets, True)[unused]],
        [by_hand(*exact, targets)[unused]],
        inputs,
        exact,
        1e-5,
    )
    assert outputs_again.shape == (20,)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_that_of_pytorch(weighted, label_smoothing, dtype):
    hidden, weight, targets = head(60, 48, 2500, dtype)
    weights = torch.rand(60, generator=torch.Generator().manual_seed(9)) * (torch.arange(60) % 3 > 0)
    loss = linear_cross_entropy(
        hidden.requires_grad_(), weight, targets, weights if weighted else None, label_smoothing=label_smoothing
    )
    exact = hidden.detach().double().requires_grad_()
    rows = F.cross_entropy(exact @ weight.double().t(), targets, label_smoothing=label_smoothing, reduction="none")
    expected = (rows * (weights if weighted else 1.0)).sum()
    agree([loss.loss], [expected], [hidden], [exact], TOLERANCE[dtype])
    plain = F.cross_entropy(exact @ weight.double().t(), targets, reduction="none")
    assert difference(loss.cross_entropy, (plain * (weights if weighted else 1.0)).sum()) < TOLERANCE[dtype]
    assert torch.allclose(loss.cross_entropy + loss.penalty, loss.loss)
    assert math.isclose(float(loss.weight), float(weights.sum()) if weighted else 60.0, rel_tol=1e-6)


def test_z_loss_is_the_squared_log_sum_exp():
    hidden, weight, targets = head(30, 16, 300, torch.float32)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    logits = exact[0] @ exact[1].t()
    expected = F.cross_entropy(logits, targets, reduction="sum") + 0.3 * logits.logsumexp(-1).square().sum()
    loss = linear_cross_entropy(*inputs, targets, z_loss=0.3)
    agree([loss.loss], [expected], inputs, exact, 1e-5)
    assert difference(loss.penalty, 0.3 * logits.logsumexp(-1).square().sum()) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cuts", [(100,), (1, 2000), (700, 701, 1500)])
def test_parts_of_a_vocabulary_give_what_the_whole_gives(cuts, dtype):
    """The parts are in one process, and the sums over processes plain ones."""
    hidden, weight, targets = head(40, 24, 2100, dtype)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    bounds = (0, *cuts, len(weight))
    parts = [
        logit_statistics(hidden, weight[first:end], targets, True, first, len(weight))
        for first, end in itertools.pairwise(bounds)
    ]
    whole = torch.stack([part.log_sum_exp for part in parts]).detach().amax(0)
    sent = []
    for part in parts:
        merge_statistics(part, lambda _: whole, lambda x: sent.append(x) or x)
    merged = merge_statistics(parts[0], lambda _: whole, lambda _: torch.stack(sent).sum(0))
    outputs = (merged.log_prob, merged.log_sum_exp, merged.entropy, merged.mean)
    agree(outputs, by_hand(*exact, targets), inputs, exact, TOLERANCE[dtype])


def statistics_and_gradient(hidden, weight, targets, keep):
    hidden = hidden.detach().requires_grad_()
    outputs = LOSS_HEAD.call(hidden, weight, targets, 0, len(weight), True, keep)[:4]
    upper = [torch.cos(targets + i) for i in range(4)]
    return (*outputs, *torch.autograd.grad(outputs, hidden, upper))


@pytest.mark.parametrize(("width", "vocabulary"), [(96, 50), (64, 2048), (33, 5003), (1100, 2100)])
def test_the_bits_of_a_token_depend_on_it_alone(width, vocabulary):
    """Statistics and gradient of the hidden state: whatever other rows there are, whether logits are kept or not."""
    if exact_rows() < 10_000:
        pytest.skip("products of bf16 on this machine make no such promise")
    hidden, weight, targets = head(200, width, vocabulary, torch.bfloat16)
    whole = statistics_and_gradient(hidden, weight, targets, False)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for first, count in ((0, 1), (7, 1), (3, 2), (0, 17), (50, 48), (103, 97), (0, 200)):
                rows = slice(first, first + count)
                for keep in (False, True):
                    part = statistics_and_gradient(hidden[rows], weight, targets[rows], keep)
                    assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True)), (threads, rows, keep)
        finally:
            torch.set_num_threads(1)


def test_the_bits_of_a_token_do_not_change_where_rows_are_cut_into_blocks():
    if exact_rows() < 10_000:
        pytest.skip("products of bf16 on this machine make no such promise")
    hidden, weight, targets = head(5000, 16, 2500, torch.bfloat16)
    whole = statistics_and_gradient(hidden, weight, targets, False)
    part = statistics_and_gradient(hidden[4000:4500], weight, targets[4000:4500], False)
    assert all(torch.equal(a, b[4000:4500]) for a, b in zip(part, whole, strict=True))


MEMORY = """
import resource, sys, torch
from liaoyuan.ops import linear_cross_entropy
rows, width, vocabulary, dtype = 4096, 64, 65536, getattr(torch, sys.argv[1])
hidden, weight = (torch.randn(n, width).to(dtype).requires_grad_() for n in (rows, vocabulary))
targets = torch.randint(vocabulary, (rows,))
linear_cross_entropy(hidden[:8], weight[:64], targets[:8] % 64, None, 1e-4, 0.1).loss.backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_cross_entropy(hidden, weight, targets, None, 1e-4, 0.1).loss.backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(("dtype", "logits"), [("bfloat16", 512), ("float32", 1024)])
def test_the_logits_are_never_held(dtype, logits):
    """Of `logits` MiB of logits a tenth is held at most, with the gradients of all else."""
    if not choice.takes(LOSS_HEAD, torch.empty(0)):
        pytest.skip("no native kernel here: the reference holds them")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, dtype], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < logits / 10


@pytest.mark.parametrize("target", [-1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_target_outside_the_vocabulary_is_refused(target, dtype):
    hidden, weight = random(2, 8).to(dtype), random(5, 8).to(dtype)
    with pytest.raises((RuntimeError, IndexError)):
        token_log_prob(hidden, weight, torch.tensor([1, target]))
    with pytest.raises((RuntimeError, IndexError)):
        logit_statistics(hidden, weight[2:4], torch.tensor([1, target]), first=2, vocabulary=5)


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "said"),
    [
        ((3, 8), (5, 7), 3, r"weight \[5, 7\] does not fit hidden \[3, 8\]"),
        ((3, 8), (0, 8), 3, r"head \[0, 8\] has no token"),
        ((3, 8), (5, 8), 4, r"targets \[4\] does not fit hidden \[3, 8\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(hidden, weight, targets, said):
    with pytest.raises(LiaoyuanError, match=said):
        token_log_prob(random(*hidden), random(*weight), torch.zeros(targets, dtype=torch.long))


def test_weights_of_another_number_of_tokens_are_refused():
    hidden, weight, targets = head(3, 8, 5, torch.float32)
    with pytest.raises(LiaoyuanError, match=r"\[2\] weights of \[3\] targets"):
        linear_cross_entropy(hidden, weight, targets, torch.ones(2))


def test_a_very_unlikely_token_has_a_finite_log_probability():
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [500.0]])
    assert math.isclose(token_log_prob(hidden, weight, torch.tensor([0])).item(), -500.0, rel_tol=1e-6)
    statistics = logit_statistics(hidden, weight, torch.tensor([0]), True)
    assert statistics.entropy.item() == 0.0 and statistics.mean.item() == 250.0


@pytest.mark.parametrize("output", range(4))
def test_the_self_test_finds_a_wrong_output(output, monkeypatch):
    """The reference is changed instead of the kernel: the two differ all the same."""
    operator = OPERATORS["loss_head"]
    if not choice.takes(operator, torch.empty(0)):
        pytest.skip("no native kernel here")

    def wrong(*inputs):
        outputs = list(operator.reference(*inputs))
        outputs[output] = outputs[output] + 0.1 * (torch.arange(len(outputs[output])) == 2)
        return tuple(outputs)

    changed = type("Changed", (), {})()
    changed.__dict__.update(vars(operator) | {"reference": wrong})
    reason = choice.self_test(changed, operator.kernels[0], "cpu")
    assert reason is not None and f"result {output} " in reason


def test_a_compiled_loss_equals_the_eager_one():
    hidden, weight, targets = head(12, 16, 40, torch.float32)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, None, 1e-2, 0.1).loss

    ops.status()
    eager, traced = loss(*inputs), torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs)
    assert torch.allclose(eager, traced)
    for a, b in zip(torch.autograd.grad(eager, inputs), torch.autograd.grad(traced, inputs), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
