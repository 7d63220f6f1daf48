"""A state saved by some processes under some layout is loaded by any others under any other, every tensor equal."""

from dataclasses import replace
from pathlib import Path

import pytest

from liaoyuan.checkpoint.reading import read_manifest
from liaoyuan.models import ModelConfig
from liaoyuan.parallel import World
from liaoyuan.training import AdamW
from liaoyuan.training.muon import Muon
from tests.checkpoint.layouts import fill_and_save, load_and_save
from tests.checkpoint.processes import together


@pytest.fixture
def uneven(tiny_config: ModelConfig) -> ModelConfig:
    """97 tokens and 50 inner columns divide by nothing; norms of 6 over four processes leave the fourth none."""
    return replace(tiny_config, vocab_size=97, intermediate_size=50, head_dim=6, tie_word_embeddings=False)


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_four_processes_then_two_then_one_then_three(kind: type[AdamW], uneven: ModelConfig, tmp_path: Path) -> None:
    together(4, fill_and_save, tmp_path / "four", "fsdp", uneven, kind)
    together(2, load_and_save, tmp_path / "four", tmp_path / "two", "fsdp", uneven, kind)
    load_and_save(World(), tmp_path / "two", tmp_path / "one", "fsdp", uneven, kind)
    together(3, load_and_save, tmp_path / "one", tmp_path / "three", "fsdp", uneven, kind)
    load_and_save(World(), tmp_path / "three", None, "fsdp", uneven, kind)


@pytest.mark.parametrize("layout", ["hsdp", "fsdp x tp", "two meshes"])
def test_a_mesh_of_two_dimensions_to_one_process_and_back(
    layout: str, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    together(4, fill_and_save, tmp_path / "mesh", layout, tiny_config)
    load_and_save(World(), tmp_path / "mesh", tmp_path / "one", "", tiny_config)
    together(4, load_and_save, tmp_path / "one", None, layout, tiny_config)
    together(3, load_and_save, tmp_path / "mesh", None, "fsdp", tiny_config)


@pytest.mark.parametrize("layout", ["hsdp", "two meshes"])
def test_what_several_processes_hold_is_written_once_and_shared_out(
    layout: str, uneven: ModelConfig, tmp_path: Path
) -> None:
    together(4, fill_and_save, tmp_path, layout, uneven)
    parts = sorted((tmp_path / "step-000001").glob("rank-*"))
    sizes = [part.stat().st_size for part in parts]
    fill_and_save(World(), tmp_path / "one", "", uneven)
    whole = (tmp_path / "one" / "step-000001" / "rank-0000.safetensors").stat().st_size
    assert sum(sizes) < 1.15 * whole  # the headers of four files
    assert len(parts) == 4 and max(sizes) < 0.6 * whole
    tensors = read_manifest(tmp_path / "step-000001")["tensors"]
    assert len(tensors["optimiser.norm.weight.step"]["pieces"]) == 1
