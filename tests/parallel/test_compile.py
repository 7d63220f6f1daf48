"""Compiled layers give the loss and gradients of plain ones."""

import pytest
import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import config_from_dict
from liaoyuan.parallel import Layout, Shape, World, resolve
from tests.parallel.layouts import MODELS, step
from tests.parallel.processes import run


def test_compiled_layers_give_the_same_gradients() -> None:
    plain = step(World(), "dense", torch.float32, Layout(), 1)
    compiled = run(1, step, "dense", torch.float32, Layout(compile=True), 1)[0]  # its threads end with its process
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-6)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(compiled.gradients[name], gradient, rtol=1e-3, atol=1e-5)


def test_compile_is_refused_where_it_does_not_work() -> None:
    for kind, layout in (("experts", Layout(compile=True)), ("dense", Layout(compile=True, tp=2))):
        with pytest.raises(LiaoyuanError, match="compile works for whole dense layers"):
            resolve(layout, layout.tp, Shape(config_from_dict(MODELS[kind]), 32, 8))
