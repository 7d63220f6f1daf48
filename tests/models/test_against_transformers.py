"""Oracle: transformers, on small random models of each family."""

from pathlib import Path

import pytest
import torch

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.models import Decoder, packed_context

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
}
ORIGINAL, THETA = {"original_max_position_embeddings": 32}, {"rope_theta": 500.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {"kv_lora_rank": 24, "q_lora_rank": 40, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20}
DEEPSEEK = (
    MOE | LATENT | {"num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}
)
CASES = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-bias": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-one-head-group": ("LlamaConfig", {"num_key_value_heads": 4, "head_dim": 32, "rope_theta": 5e5}),
    "llama-3.1": ("LlamaConfig", {"rope_parameters": LLAMA3 | ORIGINAL | THETA}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 2.5} | THETA}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN | THETA}),
    "llama-yarn-tuned": (
        "LlamaConfig",
        {"rope_parameters": YARN | THETA | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 11}),
    "mistral-full": ("MistralConfig", {"sliding_window": None}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3-tied": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-yarn": ("Qwen3Config", {"head_dim": 32, "rope_parameters": YARN | THETA}),
    "qwen3-moe": ("Qwen3MoeConfig", {"head_dim": 32, "num_experts": 6, "norm_topk_prob": True} | MOE),
    "qwen3-moe-dense-layer": ("Qwen3MoeConfig", {"head_dim": 32, "num_experts": 6, "mlp_only_layers": [1]} | MOE),
    "deepseek-v2": ("DeepseekV2Config", DEEPSEEK | {"routed_scaling_factor": 1.7}),
    "deepseek-v2-lite": ("DeepseekV2Config", DEEPSEEK | {"q_lora_rank": None, "rms_norm_eps": 1e-4}),
    "deepseek-v2-groups": (
        "DeepseekV2Config",
        DEEPSEEK | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "deepseek-v3": ("DeepseekV3Config", DEEPSEEK | {"n_group": 4, "topk_group": 2}),
    "deepseek-v3-yarn": (
        "DeepseekV3Config",
        DEEPSEEK
        | {"n_group": 1, "topk_group": 1, "attention_bias": True, "rope_interleave": False}
        | {"rope_parameters": YARN | THETA | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    ),
    "glm": ("GlmConfig", {"head_dim": 16, "pad_token_id": 0, "attention_bias": True}),
    "glm4": ("Glm4Config", {"head_dim": 16, "pad_token_id": 0}),
    "glm4-moe": (
        "Glm4MoeConfig",
        MOE | {"head_dim": 16, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "use_qk_norm": True},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 9},
    ),
}


@pytest.fixture(params=CASES)
def theirs(request: pytest.FixtureRequest):
    kind, extra = CASES[request.param]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**COMMON | extra))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("bias", "sinks")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    return model.eval()


def log_probs(ours: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    positions, context = packed_context([len(tokens)])
    return ours(tokens, positions, context).log_softmax(-1)


def test_log_probabilities_equal_theirs(theirs, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = torch.randint(0, 211, (77,))
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0].log_softmax(-1)
        assert (log_probs(ours, tokens) - expected).abs().max() < 1e-4
        positions, context = packed_context([76])
        scored = ours(tokens[:-1], positions, context, targets=tokens[1:])
    assert (scored - expected[:-1].gather(1, tokens[1:, None])[:, 0]).abs().max() < 1e-4


def test_greedy_continuation_is_theirs(theirs, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    prompt = torch.randint(0, 211, (1, 9))
    whole = torch.ones_like(prompt)
    expected = theirs.generate(prompt, attention_mask=whole, max_new_tokens=64, do_sample=False, pad_token_id=0)[0]
    tokens = prompt[0]
    with torch.no_grad():
        while len(tokens) < len(expected):
            tokens = torch.cat([tokens, log_probs(ours, tokens)[-1:].argmax(-1)])
    assert tokens.tolist() == expected.tolist()


def test_they_load_what_we_export_and_agree(theirs, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    save_model(ours, tmp_path / "ours")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (name, expected), (_, value) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(expected, value), name


def test_packing_gives_the_loss_of_each_document_alone(tiny_model: Decoder) -> None:
    lengths = [5, 1, 19, 8]
    tokens, targets = torch.randint(0, 96, (2, sum(lengths)))
    positions, context = packed_context(lengths)
    packed = tiny_model(tokens, positions, context, targets=targets).split(lengths)
    for alone, t, y in zip(packed, tokens.split(lengths), targets.split(lengths), strict=True):
        positions, context = packed_context([len(t)])
        assert (tiny_model(t, positions, context, targets=y) - alone).abs().max() < 1e-5
