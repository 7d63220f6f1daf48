"""Oracle: greedy generation by transformers, for small random models of each family."""

from pathlib import Path

import pytest
import torch

from liaoyuan.checkpoint import load_model
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams

transformers = pytest.importorskip("transformers")

VOCABULARY = 211
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = {
    "LlamaConfig": {},
    "Qwen2Config": {},
    "Qwen3Config": {"head_dim": 32, "tie_word_embeddings": True},
    "MistralConfig": {"sliding_window": 21},
    "GptOssConfig": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 9},
    "DeepseekV3Config": {"num_key_value_heads": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
    | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    | {"kv_lora_rank": 24, "q_lora_rank": 40, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20},
}


@pytest.fixture(params=FAMILIES, scope="module")
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A transformers model, ours with the same weights, six prompts and their greedy continuations by transformers."""
    torch.manual_seed(0)
    config = getattr(transformers, request.param)(**COMMON | FAMILIES[request.param])
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    folder: Path = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    prompts = [tuple(torch.randint(0, VOCABULARY, (n,)).tolist()) for n in (1, 5, 16, 33, 40, 100)]
    return load_model(folder), prompts, [continuation(theirs, prompt) for prompt in prompts]


def continuation(theirs, prompt: tuple[int, ...]) -> list[int]:
    tokens = torch.tensor([prompt])
    mask = torch.ones_like(tokens)  # else it takes the padding token in a prompt for padding
    out = theirs.generate(tokens, attention_mask=mask, max_new_tokens=64, do_sample=False)
    return out[0, len(prompt) :].tolist()


def greedy(prompts: list[tuple[int, ...]]) -> list[Request]:
    return [Request(i, prompt, SamplingParams(max_tokens=64, temperature=0.0)) for i, prompt in enumerate(prompts)]


def test_greedy_continuation_alone(both) -> None:
    model, prompts, expected = both
    engine = Engine(model, EngineConfig(max_sequences=1))
    assert [engine.generate([request])[0].tokens for request in greedy(prompts)] == expected


def test_greedy_continuation_in_a_mixed_batch(both) -> None:
    model, prompts, expected = both
    engine = Engine(model, EngineConfig(max_sequences=4, max_batch_tokens=24))
    assert [completion.tokens for completion in engine.generate(greedy(prompts))] == expected
