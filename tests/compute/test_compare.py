"""`ops compare` names the operator in which two runs begin to differ, and says when nothing differs."""

import itertools
import json
import math
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liaoyuan.checkpoint import save_model
from liaoyuan.compute.compare import Comparison, Way, compare, compare_layout, growth
from liaoyuan.compute.subject import random_stream
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import config_from_dict
from liaoyuan.ops import choice, difference
from liaoyuan.ops.difference import Difference
from liaoyuan.ops.operator import OPERATORS
from liaoyuan.parallel import Layout
from tests.conftest import randomised
from tests.parallel.layouts import COMMON, MODELS

ROWS, LENGTH = 2, 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dense model of two layers."""
    path = tmp_path_factory.mktemp("dense") / "model"
    words = COMMON | {"model_type": "qwen3", "num_hidden_layers": 2}
    save_model(randomised(config_from_dict(words), 0), path, None)
    return path


def stream(model, tokenizer, rows: int, length: int):
    return random_stream(model.config.vocab_size, rows, length)


def both(first: Way, second: Way, tolerance: float | None = None) -> Comparison:
    return compare(first, second, stream, ROWS, LENGTH, tolerance)


def plant(monkeypatch, name: str, number: int, factor: float) -> None:
    """Make the reference of an operator wrong by a factor in its `number`-th call, which is computed twice: from the
    first run's inputs, and in the second run."""
    calls, compute = itertools.count(), choice.compute_with

    def wrong(kernel, called, function, inputs):
        output = compute(kernel, called, function, inputs)
        if called != name or kernel != "reference" or next(calls) // 2 != number:
            return output
        return tuple(x * factor for x in output) if isinstance(output, tuple) else output * factor

    monkeypatch.setattr("liaoyuan.compute.compare.compute_with", wrong)


def test_the_same_run_twice_differs_nowhere(folder):
    found = both(Way(folder), Way(folder))
    assert not found.differs and found.first is None and found.parted is None
    assert len(found.rows) > 50 and {row.phase for row in found.rows} == {"forward", "backward"}
    assert all(row.difference.relative == 0.0 for row in found.rows)
    assert all(row.alone is None or row.alone.relative == 0.0 for row in found.rows)
    assert all(difference.relative == 0.0 for difference in found.gradients.values())
    assert found.losses[0] == found.losses[1]


@pytest.mark.parametrize(
    ("name", "number", "module"),
    [
        ("swiglu", 1, "layers.1.mlp"),
        ("linear", 5, "layers.1.self_attn.o_proj"),
        ("add_rms_norm", 1, "layers.1.input_layernorm"),
        ("attention_backward", 0, "layers.1.self_attn"),
        ("linear_backward", 7, "layers.0.self_attn.qkv_proj"),
        ("loss_head_backward", 0, "lm_head"),
    ],
)
def test_a_wrong_kernel_is_named_with_the_module_that_called_it(folder, monkeypatch, name, number, module):
    plant(monkeypatch, name, number, 1.01)
    found = both(Way(folder), Way(folder, kernels={"": "reference"}))
    assert found.differs and found.first
    assert (found.first.operator, found.first.module) == (name, module)
    assert found.first.phase == ("backward" if name.endswith("_backward") else "forward")
    assert found.first.is_own and found.first in list(growth(found))
    assert all(row.difference.relative < 1e-5 for row in found.rows[: found.rows.index(found.first)])


def test_an_operator_that_only_reads_wrong_numbers_is_not_blamed(folder, monkeypatch):
    """What follows a wrong operator differs in the run, and not from the same inputs."""
    plant(monkeypatch, "swiglu", 0, 1.01)
    found = both(Way(folder), Way(folder, kernels={"": "reference"}))
    wrong = found.rows.index(found.first)
    later = [row for row in found.rows[wrong + 1 :] if row.alone and row.phase == "forward"]
    assert later and all(row.alone.relative < 1e-5 and not row.is_own for row in later)
    assert any(row.difference.relative > 1e-4 for row in later)


def test_an_error_too_small_to_show_in_the_run_is_the_operators_own(folder, monkeypatch):
    plant(monkeypatch, "rms_norm", 0, 1 + 5e-5)
    found = both(Way(folder), Way(folder, kernels={"": "reference"}))
    assert found.first and found.first.module == "layers.0.input_layernorm" and found.first.is_own
    assert found.first.difference.relative < found.tolerance and found.differs


def test_references_agree_with_the_kernels_of_this_machine(folder):
    found = both(Way(folder, kernels={"": "reference"}), Way(folder))
    assert not found.differs
    assert max(row.difference.relative for row in found.rows) > 0.0 or choice.status()[0].kernel == "reference"


def test_a_kernel_of_one_operator_can_be_chosen(folder):
    if choice.status()[0].kernel == "reference":
        pytest.skip("this machine has no kernels")
    found = both(Way(folder), Way(folder, kernels={"attention": "reference"}))
    first = next(row for row in found.rows if row.difference.relative)
    assert (first.operator, first.module) == ("attention", "layers.0.self_attn")


@pytest.mark.parametrize(
    ("dtype", "other"),
    [("float64", "float32"), ("float32", "float64"), ("float64", "bfloat16"), ("bfloat16", "float32")],
)
def test_dtypes_are_compared_within_what_they_can_hold(folder, dtype, other):
    found = both(Way(folder, dtype=dtype), Way(folder, dtype=other))
    assert not found.differs and found.parted is None
    assert found.losses[0] == pytest.approx(found.losses[1], rel=1e-2)
    assert both(Way(folder, dtype=dtype), Way(folder, dtype=other), 1e-9).first.operator in (
        "aten.embedding",
        "rms_norm",
    )


def test_other_weights_differ_where_they_are_first_read(folder, tmp_path):
    words = COMMON | {"model_type": "qwen3", "num_hidden_layers": 2}
    model = randomised(config_from_dict(words), 0)
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight[3, 5] += 1.0
    save_model(model, tmp_path / "other", None)
    first = both(Way(folder), Way(tmp_path / "other")).first
    assert (first.operator, first.module) == ("linear", "layers.1.self_attn.o_proj")
    assert first.difference.where[1] == 3


@pytest.mark.parametrize("kind", ["experts", "latent", "sinks", "tied"])
def test_every_kind_of_model_is_compared(kind, tmp_path):
    path = tmp_path / kind
    save_model(randomised(config_from_dict(MODELS[kind]), 0), path, None)
    found = both(Way(path), Way(path, kernels={"": "reference"}))
    assert not found.differs and found.parted is None
    assert found.gradients.keys() == dict(randomised(config_from_dict(MODELS[kind]), 0).named_parameters()).keys()
    layout = Layout(fsdp=2, ep=2) if kind != "tied" else Layout(pp=2)
    spread = compare_layout(Way(path, dtype="float64"), layout, stream, 4, 32)
    assert not spread.differs and spread.gradients.keys() == found.gradients.keys()


def test_without_any_kernel_the_references_are_compared_by_name(folder):
    choice.configure(dict.fromkeys(OPERATORS, "reference"))
    try:
        found = both(Way(folder), Way(folder, dtype="float64"))
    finally:
        choice.configure({})
    assert not found.differs and found.parted is None
    assert {"attention", "attention_backward", "swiglu"} <= {row.operator for row in found.rows}


def test_where_the_two_part_is_said(folder, monkeypatch):
    """A run that calls one more operator: named, and the comparison goes on after it."""
    from liaoyuan.models.layers import FeedForward

    forward, calls = FeedForward.forward, itertools.count()
    monkeypatch.setattr(FeedForward, "forward", lambda self, x: forward(self, x * 1.0 if next(calls) == 3 else x))
    found = both(Way(folder), Way(folder))
    assert found.parted
    assert (found.parted.operator, found.parted.module, found.parted.only) == ("aten.mul", "layers.1.mlp", "B")
    shared = [row for row in found.rows if not row.only]
    assert len(shared) == len(both(Way(folder), Way(folder)).rows)
    assert all(row.alone for row in shared if not row.operator.startswith("aten."))
    assert not found.differs


def test_two_devices_are_compared(folder):
    """The same operators by name on both, whatever computes them there."""
    script = Path(__file__).with_name("stand_in_compare.py")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["differs"] and found["worst"] < 1e-5 and found["ran_there"] > 20
    assert {"attention", "attention_backward", "linear_backward", "loss_head"} <= set(found["operators"])
    assert len(found["alone"]) == found["compared"] and max(found["alone"]) < 1e-5


def test_two_architectures_are_refused_in_a_sentence(folder, tmp_path):
    words = COMMON | {"model_type": "qwen3", "num_hidden_layers": 3}
    save_model(randomised(config_from_dict(words), 0), tmp_path / "deeper", None)
    with pytest.raises(LiaoyuanError, match=r"different architectures \(num_hidden_layers is 2 and 3\)"):
        both(Way(folder), Way(tmp_path / "deeper"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"folder": Path("nowhere")}, "nowhere does not exist"),
        ({"dtype": "bfloat17"}, r"no dtype 'bfloat17'.*did you mean 'bfloat16'"),
        ({"kernels": {"": "tritn"}}, "no kernel 'tritn' on cpu: auto, reference, native"),
        ({"kernels": {"atention": "native"}}, "no operator 'atention'"),
        ({"kernels": {"attention": "triton"}}, "operator attention has no kernel 'triton' on cpu"),
    ],
)
def test_a_mistake_is_a_sentence(folder, change, told):
    with pytest.raises(LiaoyuanError, match=told):
        both(Way(folder), replace(Way(folder), **change))


def test_a_kernel_that_failed_its_self_test_is_not_said_to_agree(folder):
    choice.configure({"swiglu": "reference"})
    try:
        with pytest.raises(LiaoyuanError, match="native is not in use for swiglu: chosen in the configuration"):
            both(Way(folder), Way(folder, kernels={"swiglu": "native"}))
    finally:
        choice.configure({})


def test_a_failure_in_one_run_ends_both_and_leaves_no_thread(folder, monkeypatch):
    def broken(kernel, called, function, inputs):
        if called == "swiglu_backward" and kernel == "reference":
            raise RuntimeError("on purpose")
        return function(*inputs)

    monkeypatch.setattr("liaoyuan.compute.compare.compute_with", broken)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="on purpose"):
        both(Way(folder), Way(folder, kernels={"": "reference"}))
    assert threading.active_count() == before


def test_an_interruption_leaves_no_thread(folder):
    before = threading.active_count()

    def interrupt(progress):
        if progress.done > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(Way(folder), Way(folder), stream, ROWS, LENGTH, None, interrupt)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "layout", [Layout(tp=2), Layout(fsdp=2), Layout(pp=2), Layout.model_validate({"cp": {"ring": 2}, "tp": 2})]
)
def test_a_layout_has_the_gradients_of_one_process(folder, layout):
    found = compare_layout(Way(folder, dtype="float64"), layout, stream, 4, 32)
    assert not found.differs and set(found.gradients) >= {"lm_head.weight", "layers.1.mlp.down_proj.weight"}
    assert found.gradients[found.worst_gradient].relative < 1e-9
    assert found.losses[0] == pytest.approx(found.losses[1], rel=1e-12)


def test_a_wrong_layout_is_found_by_its_gradients(folder, monkeypatch):
    """Tensor parallelism that forgets to add up what it left apart."""
    monkeypatch.setattr("liaoyuan.parallel.program.sum_uncut", lambda *_: None)
    found = compare_layout(Way(folder), Layout(tp=2), stream, 4, 32)
    assert found.differs and found.worst_gradient.endswith("norm.weight")


def test_a_layout_that_does_not_fit_is_refused(folder):
    with pytest.raises(LiaoyuanError, match="The layout tp 3 does not fit"):
        compare_layout(Way(folder), Layout(tp=3), stream, 4, 32)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.data())
def test_the_largest_difference_is_found_where_it_is(shape, data):
    with patch.object(difference, "CHUNK", data.draw(st.sampled_from([3, 2**22]))):
        check_that_it_is_found(shape, data)


def check_that_it_is_found(shape, data):
    size = math.prod(shape)
    first = torch.arange(size, dtype=torch.float32).reshape(shape) - 3
    second = first.clone()
    if not size:
        assert Difference.of(first, second) == Difference()
        return
    place = data.draw(st.integers(0, size - 1))
    second.view(-1)[place] += 2.5
    found = Difference.of(first, second)
    assert found.largest == 2.5 and first[found.where] == found.first == found.second - 2.5
    assert found.relative == 2.5 / max(float(first.abs().max()), 1e-300)


def test_what_is_not_finite_counts_as_infinitely_different():
    nan, inf = math.nan, math.inf
    same = torch.tensor([nan, inf, -inf, 1.0])
    assert Difference.of(same, same.clone()) == Difference()
    for other in ([1.0, inf, -inf, 1.0], [nan, -inf, -inf, 1.0], [nan, inf, -inf, nan]):
        assert Difference.of(same, torch.tensor(other)).relative == inf
    assert Difference.of(torch.zeros(2), torch.zeros(3)).reason == "shapes [2] and [3]"
