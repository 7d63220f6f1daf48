"""Folders of few bits: written as others read them, and read back to the bit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import ModelConfig, Quantisation, packed_context, quantise_model
from liaoyuan.models.quantised_linear import QuantisedLinear
from liaoyuan.ops import dequantise
from tests.conftest import randomised
from tests.models.test_quantised import WAYS, configs


@pytest.mark.parametrize("how", [*WAYS, Quantisation("int8", 32, head="fp8")], ids=str)
@pytest.mark.parametrize("name", ["dense", "untied", "experts"])
def test_a_quantised_model_comes_back_to_the_bit(
    tiny_config: ModelConfig, tmp_path: Path, name: str, how: Quantisation
) -> None:
    model = quantise_model(randomised(configs(tiny_config)[name], 0), how)
    save_model(model, tmp_path / "few")
    loaded = load_model(tmp_path / "few")
    positions, context = packed_context([50])
    with torch.no_grad():
        expected, found = (each(torch.arange(50), positions, context) for each in (model, loaded))
    assert torch.equal(found, expected)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(LiaoyuanError, match="quantised already"):
        load_model(tmp_path / "few", quantisation=how)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_compressed_tensors_reads_the_same_weights(tiny_config: ModelConfig, tmp_path: Path, how: Quantisation) -> None:
    theirs = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    config = dataclasses.replace(configs(tiny_config)["dense"], intermediate_size=192)  # they want whole groups
    model = quantise_model(randomised(config, 0), how)
    save_model(model, tmp_path / "few")
    words = json.loads((tmp_path / "few" / "config.json").read_text())["quantization_config"]
    config = theirs.QuantizationConfig(**words)
    assert {target for group in config.config_groups.values() for target in group.targets} >= {
        r"re:.*layers\.\d+\..*proj(_with_mqa)?$"
    }
    tensors, stem = load_file(tmp_path / "few" / "model.safetensors"), "model.layers.1.mlp.down_proj."
    mine = {name.removeprefix(stem): value for name, value in tensors.items() if name.startswith(stem)}
    scheme = config.config_groups["group_0"]
    compressor = theirs.compressors.BaseCompressor.get_value_from_registry(scheme.format)
    found = compressor.decompress(mine, scheme)["weight"]
    projection = model.get_submodule("layers.1.mlp.down_proj")
    assert isinstance(projection, QuantisedLinear)
    torch.testing.assert_close(found.float(), dequantise(projection.weight), atol=0, rtol=2**-8)  # theirs is bf16


@pytest.mark.parametrize("how", WAYS[:3], ids=str)
def test_transformers_answers_alike(tiny_config: ModelConfig, tmp_path: Path, how: Quantisation) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    config = dataclasses.replace(tiny_config, hidden_size=96, intermediate_size=192)
    model = quantise_model(randomised(config, 0), how)
    save_model(model, tmp_path / "few")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "few", dtype=torch.float32).eval()
    positions, context = packed_context([40])
    with torch.no_grad():
        found, expected = model(torch.arange(40), positions, context), theirs(torch.arange(40)[None]).logits[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "'gptq' are not read"),
        ({"ignore": ["model.layers.0.mlp.down_proj"]}, "quantised otherwise than others"),
        ({"config_groups": {}}, "quantised otherwise than others"),
        ({"group_0": {"input_activations": {"num_bits": 8}}}, "activations of few bits"),
        ({"group_0": {"weights": {"num_bits": 3, "type": "int"}}}, "not supported"),
    ],
)
def test_what_is_quantised_in_another_way_is_refused(
    tiny_config: ModelConfig, tmp_path: Path, change: dict, message: str
) -> None:
    save_model(quantise_model(randomised(tiny_config, 0), Quantisation("int8")), tmp_path / "few")
    path = tmp_path / "few" / "config.json"
    values = json.loads(path.read_text())
    words = values["quantization_config"]
    words["config_groups"]["group_0"] |= change.pop("group_0", {})
    path.write_text(json.dumps(values | {"quantization_config": words | change}))
    with pytest.raises(LiaoyuanError, match=message):
        load_model(tmp_path / "few")


def test_a_torn_or_foreign_folder_is_refused(tiny_config: ModelConfig, tmp_path: Path) -> None:
    save_model(quantise_model(randomised(tiny_config, 0), Quantisation("int4")), tmp_path / "few")
    path = tmp_path / "few" / "config.json"
    values = json.loads(path.read_text())
    for change in ({"intermediate_size": 40}, {"num_hidden_layers": 3}):
        path.write_text(json.dumps(values | change))
        with pytest.raises(LiaoyuanError):
            load_model(tmp_path / "few")
    path.write_text(json.dumps({name: value for name, value in values.items() if name != "quantization_config"}))
    with pytest.raises(LiaoyuanError, match="lack"):
        load_model(tmp_path / "few")


def test_llama_names_are_written(tiny_config: ModelConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config, model_type="llama", qk_norm=False)
    save_model(quantise_model(randomised(config, 0), Quantisation("int4", head=None)), tmp_path / "few")
    names = set(load_file(tmp_path / "few" / "model.safetensors"))
    assert {"model.layers.0.self_attn.k_proj.weight_packed", "model.layers.1.mlp.up_proj.weight_scale"} <= names
    assert "model.embed_tokens.weight" in names and not any("lm_head" in name for name in names)
