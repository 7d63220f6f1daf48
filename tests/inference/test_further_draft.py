"""Promises of guessing with the model's own layer for the token after the next: its guesses are those of the paper's
formulas, the answers are those that come without it, and they come in fewer steps where the layer was trained.
"""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from liaoyuan import ops
from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams
from liaoyuan.inference.disaggregation.dispatch import Dispatch
from liaoyuan.models import Decoder, ModelConfig, Quantisation, config_from_dict, packed_context
from tests.conftest import randomised, slow_if
from tests.inference.adapter_files import saved, write_adapter
from tests.inference.test_disaggregation import alone, answer, request, side
from tests.inference.test_speculation import GREEDY, SIZES, asked, said

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "initializer_range": 0.2, "eos_token_id": 0, "bos_token_id": None,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "deepseek_v3": {
        "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    },
    "glm4_moe": {"num_key_value_heads": 2, "head_dim": 16, "use_qk_norm": True, "attention_bias": True},
}  # fmt: skip
KINDS = {"deepseek_v3": "DeepseekV3Config", "glm4_moe": "Glm4MoeConfig"}
FURTHER = {"num_nextn_predict_layers": 1}
MTP = EngineConfig(speculate="mtp", speculate_tokens=4)


@pytest.fixture(params=FAMILIES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    words = {"model_type": request.param} | COMMON | FAMILIES[request.param] | FURTHER
    return config_from_dict(words, further=True)


@pytest.fixture
def model(config: ModelConfig) -> Decoder:
    model = randomised(config, seed=0)
    with torch.no_grad():  # weights that differ, so that it shows which of two norms a stream has passed
        model.further[0].norm.weight.copy_(torch.linspace(-2.0, 2.0, config.hidden_size))
    return model


def stream_of(model: Decoder, tokens: Tensor) -> Tensor:
    """Return the residual stream before the last norm, of all tokens of one document."""
    positions, context = packed_context([len(tokens)])
    residual, x = model.run_layers(model.embed_tokens(tokens), positions, context)
    return residual + x


def further_stream(model: Decoder, stream: Tensor, following: Tensor) -> Tensor:
    """Return what the further layer makes of all rows of one document at once."""
    positions, context = packed_context([len(stream)])
    return model.further[0](stream, model.embed_tokens(following), model.angles(positions), context)


def guesses_of(model: Decoder, known: list[int], count: int) -> list[int]:
    """Return greedy guesses for what follows `known`, all computed again and again without any cache."""
    tokens = torch.tensor(known)
    stream, guesses = stream_of(model, tokens)[:-1], list[int]()
    for _ in range(count):
        further = further_stream(model, stream, tokens[1:])
        read = model.further[0].norm(further)
        guesses.append(int(model.logits(read)[-1].argmax()))
        back = read if model.config.model_type == "glm4_moe" else further
        stream = torch.cat((stream, back[-1:]))
        tokens = torch.cat((tokens, torch.tensor(guesses[-1:])))
    return guesses


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_is_that_of_the_paper(family: str, tmp_path: Path) -> None:
    """h' = TRM(M [norm(Emb(t)); norm(h)]). Transformers leaves such layers out, so an ordinary one of its is TRM."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = COMMON | FAMILIES[family] | {"num_hidden_layers": 3}
    theirs = transformers.AutoModelForCausalLM.from_config(getattr(transformers, KINDS[family])(**words)).eval()
    theirs.save_pretrained(tmp_path)
    more = _as_published(tmp_path)
    ours = load_model(tmp_path, further=True)
    tokens = torch.randint(0, 96, (50,))
    with torch.no_grad():
        found = ours.logits(ours.further[0].norm(further_stream(ours, stream_of(ours, tokens)[:-1], tokens[1:])))
        stream = theirs(tokens[None], output_hidden_states=True, use_cache=False).hidden_states[2][0, :-1]
        embedded = theirs.model.embed_tokens.weight[tokens[1:]]
        normed = (_norm(embedded, more["enorm.weight"], ours), _norm(stream, more["hnorm.weight"], ours))
        x = torch.cat(normed, 1) @ more["eh_proj.weight"].T
        theirs.model.layers, theirs.model.norm = theirs.model.layers[2:], torch.nn.Identity()
        h = theirs.model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]
        expected = _norm(h, more["shared_head.norm.weight"], ours) @ theirs.lm_head.weight.T
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)


def _as_published(folder: Path) -> dict[str, Tensor]:
    """Make the last layer of a saved model one that predicts further, as published folders have it."""
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2} | FURTHER
    (folder / "config.json").write_text(json.dumps(config))
    weights, size = load_file(folder / "model.safetensors"), COMMON["hidden_size"]
    more = {name: 1 + torch.randn(size) * 0.2 for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    more["eh_proj.weight"] = torch.randn(size, 2 * size) * 0.2
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    stored = more | {name: weights[of].clone() for name, of in copies.items()}
    save_file(
        weights | {f"model.layers.2.{name}": value for name, value in stored.items()}, folder / "model.safetensors"
    )
    return more


def _norm(x: Tensor, weight: Tensor, model: Decoder) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps) * weight


@pytest.mark.parametrize("sizes", [{}, {"max_batch_tokens": 9, "max_sequences": 4}, {"cache_tokens": 176}])
def test_guesses_are_those_of_the_whole_text_computed_at_once(model: Decoder, sizes: dict[str, int]) -> None:
    engine = Engine(model, EngineConfig(speculate="mtp", speculate_tokens=3, **sizes))
    compared = compare_guesses(engine)
    prompts = [tuple((7 * index + place) % 96 for place in range(5 + 9 * index)) for index in range(5)]
    engine.generate([Request(index, prompt, SamplingParams(12, 0.0)) for index, prompt in enumerate(prompts)])
    assert sum(compared) > 20
    longer = prompts[4] + prompts[1]  # its first blocks are found
    completion = engine.generate([Request("again", longer, SamplingParams(12, 0.0))], keep_prefixes=True)[0]
    assert completion.cached_tokens >= 32
    compared.clear()
    for prompt in (prompts[2][:11], prompts[2]):  # the first ones end where those who get their slots begin to decode
        engine.generate([Request(index, prompt, SamplingParams(12, 0.0)) for index in range(4)])
    assert sum(compared) > 50


def compare_guesses(engine: Engine) -> list[int]:
    """Let an engine compare all its guesses from now on; return a list that says how many there were each time."""
    speculation, compared = engine._speculation, list[int]()
    guess = speculation._drafter.guess

    def compare(slots: np.ndarray, lengths: np.ndarray, most: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        found = guess(slots, lengths, most, tokens)
        for slot, length, count in zip(slots.tolist(), lengths.tolist(), found.tolist(), strict=True):
            with torch.no_grad():
                expected = guesses_of(engine.model, tokens[slot, :length].tolist(), count)
            assert tokens[slot, length : length + count].tolist() == expected
        compared.append(int(found.sum()))
        return found

    speculation._drafter.guess = compare
    speculation.learn = lambda *_: None  # wrong ones do not make them fewer
    return compared


@pytest.mark.parametrize("sizes", [slow_if(n in (0, 3), sizes) for n, sizes in enumerate(SIZES)])
def test_answers_are_those_that_come_without(model: Decoder, sizes: dict[str, int]) -> None:
    plain = Engine(model).generate(asked())
    engine = Engine(model, EngineConfig(speculate="mtp", **sizes))
    assert said(engine.generate(asked())) == said(plain)
    assert said(engine.generate(asked(), keep_prefixes=True)) == said(plain)
    statistics = engine.statistics()
    assert statistics["guessed_tokens"] > 100
    assert statistics["free_blocks"] == statistics["blocks"]


@pytest.mark.parametrize("sizes", [slow_if(n % 2 == 1, sizes) for n, sizes in enumerate(SIZES)])
def test_log_probabilities_have_the_same_bits(config: ModelConfig, sizes: dict[str, int]) -> None:
    if any(row.kernel != "native" for row in ops.status()):
        pytest.skip("not all native kernels are in use here, and the references are not exact")
    model = randomised(replace(config, dtype="bfloat16"), seed=0)
    plain, found = (Engine(model, how).generate(asked()) for how in (EngineConfig(), MTP.model_copy(update=sizes)))
    assert [one.logprobs for one in found] == [one.logprobs for one in plain]


def test_a_trained_layer_saves_steps(model: Decoder) -> None:
    wanted = [Request(index, (index, 1, 2), GREEDY) for index in range(6)]
    plain = Engine(model)
    said_before = plain.generate(wanted)
    texts = [torch.tensor(one.prompt + tuple(done.tokens)) for one, done in zip(wanted, said_before, strict=True)]
    untrained = Engine(model, MTP)
    untrained.generate(wanted)
    train(model, [text for text in texts if len(text) > 3])
    engine = Engine(model, MTP)
    assert said(engine.generate(wanted)) == said(said_before)
    counts, before = engine.statistics(), untrained.statistics()
    assert counts["guessed_right"] > 0.5 * counts["guessed_tokens"]
    assert counts["steps"] < 0.6 * plain.statistics()["steps"] and counts["steps"] < before["steps"]


def train(model: Decoder, texts: list[Tensor], steps: int = 150) -> None:
    """Teach the further layer alone to predict the token after the next of `texts` (the paper's eq. 24)."""
    with torch.no_grad():
        streams = [stream_of(model, text[:-2]) for text in texts]
    positions, context = packed_context([len(stream) for stream in streams])
    angles, stream = model.angles(positions), torch.cat(streams)
    following, targets = (torch.cat([text[n : len(text) - 2 + n] for text in texts]) for n in (1, 2))
    optimiser = torch.optim.Adam(model.further.parameters(), lr=3e-3)
    for _ in range(steps):
        further = model.further[0](stream, model.embed_tokens(following).detach(), angles, context)
        loss = functional.cross_entropy(model.logits(model.further[0].norm(further)), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def test_sleep_and_new_weights_leave_answers_right(model: Decoder, config: ModelConfig, tmp_path: Path) -> None:
    other = randomised(config, seed=7)
    save_model(other, tmp_path / "other")
    engine = Engine(model, MTP)
    before = model.further[0].eh_proj.weight.clone()
    wanted = Request("a", (1, 2, 3), GREEDY)
    engine.add(wanted)
    tokens = [token for _ in range(3) for event in engine.step() for token in event.tokens]
    engine.sleep()
    engine.wake()
    engine.resume()
    while engine.can_step:
        tokens += [token for event in engine.step() for token in event.tokens]
    assert tokens == Engine(randomised(config, seed=0)).generate([wanted])[0].tokens
    engine.sleep(without_weights=True)
    engine.wake()
    engine.update_weights(tmp_path / "other")
    engine.resume()
    assert said(engine.generate([wanted])) == said(Engine(other).generate([wanted]))
    assert not torch.equal(model.further[0].eh_proj.weight, before)


def test_weights_that_training_wrote_without_the_layer_are_taken(
    model: Decoder, config: ModelConfig, tmp_path: Path
) -> None:
    other = randomised(replace(config, further_layers=0), seed=7)
    save_model(other, tmp_path)
    engine, kept = Engine(model, MTP), model.further[0].eh_proj.weight.clone()
    engine.update_weights(tmp_path)
    assert said(engine.generate(asked(3))) == said(Engine(other).generate(asked(3)))
    assert torch.equal(model.further[0].eh_proj.weight, kept) and engine.statistics()["guessed_tokens"] > 0


def test_a_folder_holds_them_and_is_read_without_them_by_default(model: Decoder, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = {name.removeprefix("model.layers.2.") for name in stored if name.startswith("model.layers.2.")}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} <= names
    assert "self_attn.o_proj.weight" in names and "mlp.experts.3.down_proj.weight" in names
    assert torch.equal(stored["model.layers.2.embed_tokens.weight"], model.embed_tokens.weight)
    assert torch.equal(stored["model.layers.2.shared_head.head.weight"], model.lm_head.weight)
    again, without = load_model(tmp_path, further=True), load_model(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert without.config == replace(model.config, further_layers=0) and not hasattr(without, "further")
    stored.pop("model.layers.2.enorm.weight")
    save_file(stored, tmp_path / "model.safetensors")
    assert load_model(tmp_path).config.further_layers == 0
    with pytest.raises(LiaoyuanError, match=r"model\.layers\.2\.enorm\.weight"):
        load_model(tmp_path, further=True)


def test_what_cannot_guess_is_refused(tiny_model: Decoder, model: Decoder) -> None:
    with pytest.raises(LiaoyuanError, match="has no layer for predicting the token after the next"):
        Engine(tiny_model, MTP)
    with pytest.raises(LiaoyuanError, match="leave out one of them"):
        Engine(model, MTP, model)


def test_weights_of_few_bits_guess_too(model: Decoder, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    few = load_model(tmp_path, quantisation=Quantisation("int8"), further=True)
    engine = Engine(few, MTP)
    compared = compare_guesses(engine)
    assert said(engine.generate(asked(1))) == said(Engine(few).generate(asked(1)))
    assert sum(compared) > 20


def test_who_got_a_prompts_blocks_from_another_engine_guesses_as_if_it_were_its_own(
    model: Decoder, tmp_path: Path
) -> None:
    asked = request(count=20)
    greedy = replace(asked, sampling=SamplingParams(20, 0.0, top_logprobs=2))

    async def hand_over() -> None:
        sides = (side(model, tmp_path, name, speculate="mtp") for name in ("prefill", "decode"))
        async with next(sides) as one, next(sides) as two:
            compared = compare_guesses(two.engine)
            assert await answer(Dispatch([two.socket], [one.socket]), greedy) == alone(model, greedy)
            assert two.worker.counts["blocks_received"] == 9 and sum(compared) > 20
            await one.rests()
            await two.rests()

    asyncio.run(hand_over())


def test_adapters_change_nothing_about_it(model: Decoder, config: ModelConfig, tmp_path: Path) -> None:
    without = randomised(replace(config, further_layers=0), seed=0)
    adapter = write_adapter(tmp_path / "adapter", saved(without, tmp_path / "base"), ("o_proj",))
    wanted = [replace(one, adapter="a" if one.id in (0, 1, 4) else "") for one in asked(6)]
    answers = []
    for engine in (Engine(without), Engine(model, MTP)):
        engine.load_adapter("a", adapter)
        answers.append(said(engine.generate(wanted)))
    assert answers[0] == answers[1] and answers[0] != said(Engine(without).generate(asked(6)))
    assert engine.statistics()["guessed_tokens"] > 0
