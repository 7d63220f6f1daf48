"""A Hugging Face folder made from a state of several processes, while they go on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from liaoyuan.checkpoint import load_model
from liaoyuan.checkpoint.export import export_state
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import ModelConfig
from liaoyuan.parallel import World
from tests.checkpoint.layouts import fill_and_save, spread
from tests.checkpoint.processes import together


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_exported_model_is_the_trained_one(dtype: str, tiny_config: ModelConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, dtype=dtype)
    together(2, fill_and_save, tmp_path / "state", "fsdp", config)
    assert export_state(tmp_path / "state", tmp_path / "model") == 1
    exported = load_model(tmp_path / "model")
    trained = spread("", config, World())
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter.detach(), trained.expected(f"model.{name}", parameter)), name


def test_without_a_whole_state_there_is_nothing_to_export(tiny_config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(LiaoyuanError, match="no whole checkpoint"):
        export_state(tmp_path, tmp_path / "model")
    fill_and_save(World(), tmp_path, "", tiny_config)
    (tmp_path / "step-000001" / "rank-0000.safetensors").write_bytes(b"torn")
    with pytest.raises(LiaoyuanError, match="no whole checkpoint"):
        export_state(tmp_path, tmp_path / "model")
