"""An error in any kernel is found by the comparison that decides on a device whether the kernel is used."""

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import liaoyuan.ops.triton as package
from liaoyuan.ops import choice
from liaoyuan.ops.triton import launch
from tests.conftest import slow_if
from tests.ops.triton.conftest import CARD, DEVICE, triton_kernel

ERRORS = [
    ("rms_norm", "norm", "tl.sum(wide * wide, 0) / width", "tl.sum(wide * wide, 0) / BLOCK"),
    ("rms_norm", "norm", "summed += upper * x * scale", "summed += upper * x"),
    ("rms_norm", "norm", "tl.minimum(program * share + share, rows)", "tl.minimum(program * share + share, rows - 1)"),
    ("add_rms_norm", "norm", "result += tl.load(grad_total", "result -= tl.load(grad_total"),
    ("swiglu", "gated", "return tl.sigmoid(alpha * gate)", "return tl.sigmoid(-alpha * gate)"),
    ("swiglu", "gated", "share * (1.0 + alpha * gate * (1.0 - share))", "share * (1.0 + alpha * gate * share)"),
    ("geglu", "gated", "0.5 + 0.5 * tl.erf(gate", "0.5 + 0.5 * tl.erf(-gate"),
    ("geglu", "gated", "0.07135481627159768 * gate * gate", "0.07135481627159768 * gate"),
    ("geglu", "gated", "tl.exp(-0.5 * gate * gate)", "tl.exp(-gate * gate)"),
    ("geglu", "gated", "0.21406444881479304", "0.07135481627159768"),
    ("clamped_swiglu", "gated", "of_gate = tl.where(gate > limit, 0.0, upper)", "of_gate = upper"),
    ("clamped_swiglu", "gated", "(up > limit) | (up < -limit)", "up > limit"),
    ("clamped_swiglu", "gated", "up = 1.0 + tl.where", "up = tl.where"),
    ("split_rotary", "rotary", "one, two = (x * c - y * s)", "one, two = (x * c + y * s)"),
    ("latent_rotary", "rotary", "at + OWN, x * c - y * s, y * c + x * s", "at + OWN, x * c + y * s, y * c - x * s"),
    (
        "latent_rotary",
        "rotary",
        "head * (OWN + VALUE) + OWN, head * VALUE, VALUE",
        "head * (OWN + VALUE), head * VALUE, VALUE",
    ),
    ("latent_rotary", "rotary", "x * c + y * s, y * c - x * s, half", "x * c - y * s, y * c + x * s, half"),
    ("latent_rotary", "rotary", "first += x", "first = x"),
    ("split_rotary", "rotary", "part == groups + 1", "part == groups"),
    ("split_rotary", "rotary", "second * c - first * s", "second * c + first * s"),
    ("split_rotary", "rotary", "scale * (first - x * inner)", "scale * (first - y * inner)"),
    ("log_sum_exp", "sampling", "summed = tl.fma(summed, tl.exp(maximum - finite), tl", "summed = (tl"),
    ("loss_head", "loss_head", "local = target - first", "local = target"),
    ("loss_head", "loss_head", "(first + begin + column)[None, :] == target", "(begin + column)[None, :] == target"),
    ("loss_head", "loss_head", "tl.exp(below) * below, 0.0)", "tl.exp(below), 0.0)"),
    ("loss_head", "loss_head", "total / vocabulary", "total / rows"),
    ("loss_head", "loss_head", "level[:, None] + below * slope[:, None]", "level[:, None]"),
    ("loss_head", "loss_head", "below = logit - height", "below = logit"),
    (
        "sample_tokens",
        "sampling",
        "BLOCK)\n                    tl.store(heaviest +",
        "BLOCK) + 1\n" + 20 * " " + "tl.store(heaviest +",
    ),
    ("attention", "softmax", "(behind >= 0)", "(behind > 0)"),
    ("attention", "softmax", "(behind < window)", "(behind <= window)"),
    ("attention", "softmax", "summed * shrink + tl.exp2(sink - higher)", "summed * shrink"),
    ("attention", "attention", "-(weight * delta.t())", "(weight * delta.t())"),
    ("attention", "softmax", "output * shrink[:, None] + more", "output + more"),
    ("attention", "softmax", "tl.load(starts + low + 1)", "tl.load(starts + low + 1) - 1"),
    ("attention", "attention", "head // (heads // key_heads)", "head % key_heads"),
    (
        "attention",
        "attention",
        "grad_score = weight * (grad_weight - own[:, None])",
        "grad_score = weight * grad_weight",
    ),
    ("attention", "attention", "range(key_head * groups, key_head * groups + groups)", "range(groups)"),
    ("block_attention", "block_attention", "column[None, :] >= begin", "column[None, :] > begin"),
    ("block_attention", "block_attention", "(high > column)", "(high > column + COLUMNS)"),
    ("block_attention", "block_attention", "tl.trans(weight).to(g.dtype), g", "tl.trans(weight).to(g.dtype), g * 1.01"),
    ("paged_attention", "paged_attention", "* table_size + column // PAGE", "* table_size + column % PAGE"),
    ("paged_attention", "paged_attention", "position = total - end + token", "position = token"),
    ("paged_attention", "paged_attention", "range(parts)", "range(1, parts)"),
    ("write_cache", "paged_attention", "(slot >= 0)", "(slot > 0)"),
    ("linear", "product", "range(first, last, DEPTH)", "range(first + DEPTH, last, DEPTH)"),
    ("linear", "product", "rest // height", "rest // NEIGHBOURS"),
    ("linear", "linear", "result += tl.load(bias", "result -= tl.load(bias"),
    ("linear", "linear", "result += tl.load(residual", "result -= tl.load(residual"),
    ("grouped_linear", "grouped_linear", "tl.cast(expert, tl.int64) * of_expert", "tl.cast(0, tl.int64) * of_expert"),
    ("grouped_linear", "grouped_linear", "first = tl.load(starts + expert)", "first = tl.load(starts + expert) + 1"),
    ("grouped_linear", "grouped_linear", "summed += tl.sum(tl.load(read", "summed = tl.sum(tl.load(read"),
    ("route", "route", "values += tl.load(bias", "values -= tl.load(bias"),
    ("route", "route", "own = tl.sum(tl.where(is_best, scores", "own = tl.sum(tl.where(is_best, values"),
    ("route", "route", "for _ in range(group_best)", "for _ in range(1)"),
    ("route", "route", "(grad_scores - is_chosen * shared[:, None])", "(grad_scores - shared[:, None])"),
    ("permute_rows", "permutation", "tl.load(order + row) // per_token", "tl.load(order + row) % per_token"),
    ("permute_rows", "permutation", "scatter_(0, order, places)", "copy_(order)"),
    (
        "combine_rows",
        "permutation",
        "value *= tl.load(weights + choices + choice)",
        "value *= tl.load(weights + choices)",
    ),
    ("combine_rows", "permutation", "tl.store(grad_weights + choice,", "tl.store(grad_weights + row,"),
    ("quantised_linear", "quantised_linear", "(exponent + 120)", "(exponent + 119)"),
    ("quantised_linear", "quantised_linear", "- zero[None, :]", "- ZERO"),
    ("quantised_linear", "quantised_linear", "(4 * plane)) & 15", "(4 * plane)) & 7"),
    ("quantised_linear", "quantised_linear", "at // GROUP, mask", "at // depth, mask"),
    ("adamw_step", "optimiser", "(slope - mean)", "(slope + mean)"),
    ("adamw_step", "optimiser", "(tl.sqrt(square) * scale + eps)", "(tl.sqrt(square * scale) + eps)"),
    ("square_sum", "optimiser", "tl.sum(value * value, 0)", "tl.sum(value, 0)"),
    ("checksum", "buffers", "(place + 1) * SPACING", "place * SPACING"),
    ("checksum", "buffers", "own += _mixed(", "own -= _mixed("),
    ("sample_tokens", "sampling", "running <= target", "running < target"),
    ("sample_tokens", "sampling", "(column % 32)) & 1", "(column % 31)) & 1"),
    ("sample_tokens", "sampling", "mass + (top_k - number) * own", "mass"),
    ("sample_tokens", "sampling", "tl.maximum(_share(kept, top_p), 1)", "tl.maximum(_share(whole, top_p), 1)"),
]

FIRST = {(name, file): before for name, file, before, _ in reversed(ERRORS)}  # of each operator in each file: the quick
KEPT = ("__init__", "launch")  # no kernels are in them
MODULES = tuple(sorted(path.stem for path in Path(package.__file__).parent.glob("*.py") if path.stem not in KEPT))


@pytest.fixture
def change(monkeypatch, tmp_path):
    """A function that changes a module's source; all modules of kernels are then loaded anew in this test."""
    for name in MODULES:
        monkeypatch.setattr(package, name, importlib.import_module(f"{package.__name__}.{name}"))
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}")
    if not CARD:  # the interpreter's time is that of the number of tiles
        for function in ("attention_tile", "attention_backward_tile"):
            monkeypatch.setattr(f"{package.__name__}.launch.{function}", lambda *_: launch.Tile(128, 128))

    def write(file, before, after):
        source = (Path(package.__file__).parent / f"{file}.py").read_text(encoding="utf-8")
        assert before in source
        path = tmp_path / f"{file}.py"
        path.write_text(source.replace(before, after), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"{package.__name__}.{file}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)

    return write


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # an error may well divide by zero
@pytest.mark.parametrize(
    ("name", "file", "before", "after"), [slow_if(FIRST[error[:2]] != error[2], *error) for error in ERRORS]
)
def test_the_self_test_finds_it(name, file, before, after, change, use):
    change(file, before, after)
    operator = use(name)
    found = choice.self_test(operator, dataclasses.replace(triton_kernel(operator), dtypes=(torch.float32,)), DEVICE)
    assert found is not None and "off by" in found
