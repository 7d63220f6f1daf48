"""A model of few bits: the same answers as the weights that it stands for, exact wherever whole weights are."""

import dataclasses
from pathlib import Path

import pytest
import torch

from liaoyuan import ops
from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams
from liaoyuan.models import Decoder, ModelConfig, Quantisation, packed_context, quantise_model
from liaoyuan.models.config import Experts
from liaoyuan.models.quantised_linear import QuantisedLinear
from liaoyuan.ops import dequantise
from tests.conftest import randomised

WAYS = [Quantisation("int8"), Quantisation("int4"), Quantisation("fp8"), Quantisation("int4", 64, False, None)]

needs_exact = pytest.mark.skipif(not ops.exact_rows(), reason="without native kernels a row's bits depend on others")


def configs(tiny: ModelConfig) -> dict[str, ModelConfig]:
    wide = dataclasses.replace(tiny, hidden_size=96, intermediate_size=160, dtype="bfloat16")
    return {
        "dense": wide,
        "untied": dataclasses.replace(wide, tie_word_embeddings=False, dtype="float32"),
        "experts": dataclasses.replace(wide, model_type="qwen3_moe", experts=Experts(4, 2, 64)),
    }


@pytest.fixture(params=["dense", "untied", "experts"])
def config(request: pytest.FixtureRequest, tiny_config: ModelConfig) -> ModelConfig:
    return configs(tiny_config)[request.param]


def logits(model: Decoder, lengths: list[int], tokens: torch.Tensor) -> torch.Tensor:
    positions, context = packed_context(lengths)
    with torch.no_grad():
        return model(tokens, positions, context)


def stood_for(config: ModelConfig, how: Quantisation) -> Decoder:
    """The decoder with the whole weights that the quantised one's stand for."""
    model, quantised = randomised(config, 0), quantise_model(randomised(config, 0), how)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            path, _, leaf = name.rpartition(".")
            found = quantised.get_submodule(path)
            found = found if leaf == "weight" else getattr(found, leaf)
            if isinstance(found, QuantisedLinear):
                parameter.copy_(dequantise(found.weight).view(parameter.shape))
    if how.head and config.tie_word_embeddings:
        head = torch.nn.Parameter(dequantise(quantised.lm_head.weight).to(config.torch_dtype))
        model.lm_head = torch.nn.Module()
        model.lm_head.forward = lambda x: torch.nn.functional.linear(x.float(), head.float())
    return model


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_it_answers_as_the_weights_that_it_stands_for(config: ModelConfig, how: Quantisation) -> None:
    config = dataclasses.replace(config, dtype="float32")
    tokens = torch.arange(40) % config.vocab_size
    found = logits(quantise_model(randomised(config, 0), how), [25, 15], tokens)
    torch.testing.assert_close(found, logits(stood_for(config, how), [25, 15], tokens), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_quantised_while_loading_is_quantised_after(tmp_path: Path, config: ModelConfig, how: Quantisation) -> None:
    model = randomised(config, 0)
    save_model(model, tmp_path / "model")
    loaded, made = load_model(tmp_path / "model", quantisation=how), quantise_model(model, how)
    assert loaded.state_dict().keys() == made.state_dict().keys()
    for name, value in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


@needs_exact
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_a_row_has_the_same_bits_alone_packed_and_decoded(config: ModelConfig, how: Quantisation) -> None:
    model = quantise_model(randomised(config, 0), how)
    tokens = torch.randint(config.vocab_size, (60,), generator=torch.Generator().manual_seed(1))
    packed = logits(model, [37, 23], tokens)
    assert torch.equal(packed[37:], logits(model, [23], tokens[37:]))
    assert torch.equal(packed[:20], logits(model, [20], tokens[:20]))
    alone = Engine(model, EngineConfig(max_sequences=1))
    asked = [Request(n, tuple(tokens[n : 2 * n + 3].tolist()), SamplingParams(12, top_logprobs=5)) for n in range(9)]
    asked = [dataclasses.replace(one, sampling=dataclasses.replace(one.sampling, seed=one.id)) for one in asked]
    together = Engine(model, EngineConfig(max_batch_tokens=16, max_sequences=8)).generate(asked)
    assert together == [alone.generate([request])[0] for request in asked]


@needs_exact
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_scoring_gives_the_bits_of_decoding(config: ModelConfig, how: Quantisation) -> None:
    model = quantise_model(randomised(config, 0), how)
    done = Engine(model).generate([Request(0, (5, 6, 7), SamplingParams(30, seed=3))])[0]
    text = torch.tensor([5, 6, 7, *done.tokens])
    positions, context = packed_context([len(text)])
    with torch.no_grad():
        scored = model(text, positions, context, targets=text.roll(-1))[2:-1]
    assert torch.equal(scored, torch.tensor(done.logprobs))


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_new_weights_are_quantised_in_place(tmp_path: Path, config: ModelConfig, how: Quantisation) -> None:
    asked = [Request(n, (5, 6, n), SamplingParams(10, seed=n)) for n in range(4)]
    new = randomised(config, 5)
    expected = [one.tokens for one in Engine(quantise_model(randomised(config, 5), how)).generate(asked)]
    save_model(new, tmp_path / "new")
    for weights in (tmp_path / "new", new.state_dict()):
        engine = Engine(quantise_model(randomised(config, 0), how))
        assert engine.update_weights(weights) == 1
        assert [one.tokens for one in engine.generate(asked)] == expected
    engine.pause()
    engine.sleep(without_weights=True)
    engine.wake()
    engine.update_weights(tmp_path / "new")
    engine.resume()
    assert [one.tokens for one in engine.generate(asked)] == expected
    torn = new.state_dict() | {"layers.1.self_attn.o_proj.weight": torch.zeros(7, 7)}
    before = engine.checksum()
    with pytest.raises(LiaoyuanError, match=r"'layers.1.self_attn.o_proj.weight' is \[7, 7\]"):
        engine.update_weights(torn)
    assert engine.checksum() == before


def test_few_bits_are_kept(tiny_config: ModelConfig) -> None:
    config = dataclasses.replace(configs(tiny_config)["dense"], hidden_size=256, intermediate_size=512)
    model = randomised(config, 0)
    whole = sum(parameter.nbytes for parameter in model.layers.parameters())
    for how, bits in ((Quantisation("int8"), 8.2), (Quantisation("int4"), 4.7), (Quantisation("fp8"), 8.2)):
        layers = quantise_model(randomised(config, 0), how).layers
        kept = sum(tensor.nbytes for tensor in [*layers.parameters(), *layers.buffers()])
        assert kept < whole * bits / 16
