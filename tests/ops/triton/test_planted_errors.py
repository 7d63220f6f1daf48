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
    ("loss_head", "loss_head", "summed * shrink + tl.sum(power, 1)", "summed + tl.sum(power, 1)"),
    ("loss_head", "loss_head", "range(0, parts)", "range(1, parts)"),
    ("loss_head", "loss_head", "(first + begin + column)[None, :] == target", "(begin + column)[None, :] == target"),
    ("loss_head", "loss_head", "(products + summed * shift) * shrink", "products * shrink"),
    ("loss_head", "loss_head", "total / vocabulary", "total / rows"),
    ("loss_head", "loss_head", "level[:, None] + below * slope[:, None]", "level[:, None]"),
    ("loss_head", "loss_head", "own - (height - higher)", "own"),
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
]


MODULES = ("norm", "gated", "rotary", "loss_head", "softmax", "attention", "block_attention", "paged_attention")


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
@pytest.mark.parametrize(("name", "file", "before", "after"), ERRORS)
def test_the_self_test_finds_it(name, file, before, after, change, use):
    change(file, before, after)
    operator = use(name)
    found = choice.self_test(operator, dataclasses.replace(triton_kernel(operator), dtypes=(torch.float32,)), DEVICE)
    assert found is not None and "off by" in found
