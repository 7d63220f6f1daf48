"""Many adapters at once: each row has its own, to the bit as alone; they come and go while the engine works."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from liaoyuan import ops
from liaoyuan.checkpoint import load_model
from liaoyuan.checkpoint.adapters import read_adapter
from liaoyuan.errors import LiaoyuanError
from liaoyuan.evaluation import score
from liaoyuan.inference import Completion, Engine, EngineConfig, Request, SamplingParams
from liaoyuan.models import Decoder, ModelConfig, Quantisation, packed_context
from liaoyuan.models.config import Experts, Latent
from liaoyuan.models.lora import LowRank, parts_of, projections
from tests.conftest import randomised
from tests.inference.adapter_files import ALL, ATTENTION, merged, saved, write_adapter

BF16 = {"dtype": "bfloat16"}
needs_exact = pytest.mark.skipif(not ops.exact_rows(), reason="without native kernels a row's bits depend on others")


def family(tiny: ModelConfig, name: str) -> ModelConfig:
    mixture = Experts(4, 2, 24, shared_intermediate_size=24)
    latent = Latent(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, q_lora_rank=20)
    turned = dataclasses.replace(tiny.rotary, interleaved=True)
    sparse = {
        "model_type": "deepseek_v3",
        "rotary": turned,
        "num_key_value_heads": 4,
        "qk_norm": False,
        "latent": latent,
    }
    changes = {
        "qwen3": {},
        "llama": {"model_type": "llama", "qk_norm": False, "qkv_bias": True, "output_bias": True, "mlp_bias": True},
        "deepseek_v3": sparse | {"experts": dataclasses.replace(mixture, scoring="sigmoid", dense_layers=(0,))},
    }[name]
    return dataclasses.replace(tiny, **changes)


@pytest.fixture
def base(tiny_config: ModelConfig, tmp_path: Path) -> Path:
    return saved(randomised(tiny_config, 0), tmp_path / "base")


def requests(adapters: list[str], count: int = 12, most: int = 12) -> list[Request]:
    names = itertools.cycle(adapters)
    prompts = [tuple((7 * n + 3 * i) % 96 for i in range(1 + n * 5 % 23)) for n in range(count)]
    return [
        Request(n, prompt, SamplingParams(most, seed=n, top_logprobs=3), adapter=next(names))
        for n, prompt in enumerate(prompts)
    ]


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def run(engine: Engine) -> dict[object, list[int]]:
    told: dict[object, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            told.setdefault(event.id, []).extend(event.tokens)
    return told


def logprobs(model: Decoder, completion: Completion, prompt: tuple[int, ...]) -> torch.Tensor:
    text = torch.tensor([*prompt, *completion.tokens])
    positions, context = packed_context([len(text)])
    with torch.no_grad():
        return model(text, positions, context, targets=text.roll(-1))[len(prompt) - 1 : -1]


@pytest.mark.parametrize(
    ("name", "targets", "options", "scale"),
    [
        ("qwen3", ALL, {}, 2.0),
        ("qwen3", ("q_proj", "v_proj"), {"lora_alpha": 3}, 0.75),
        ("qwen3", ("k_proj", "up_proj"), {"use_rslora": True, "lora_alpha": 6}, 3.0),
        ("qwen3", ATTENTION, {"alpha_pattern": {"o_proj": 8, "q_proj": 8}, "lora_alpha": 8}, 2.0),
        ("qwen3", ATTENTION, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 4}}, 2.0),
        ("llama", ALL, {}, 2.0),
        ("deepseek_v3", ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), {}, 2.0),
    ],
)
def test_an_adapter_answers_as_the_weights_it_is_merged_into(
    tiny_config: ModelConfig, tmp_path: Path, name: str, targets: tuple[str, ...], options: dict, scale: float
) -> None:
    base = saved(randomised(family(tiny_config, name), 0), tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, targets, **options)
    whole = merged(base, adapter, scale, tmp_path / "merged")
    engine = Engine(load_model(base))
    engine.load_adapter("mine", adapter)
    asked = requests(["mine"])
    done = engine.generate(asked)
    for request, completion in zip(asked, done, strict=True):
        found = torch.tensor(completion.logprobs)
        torch.testing.assert_close(found, logprobs(whole, completion, request.prompt), atol=3e-4, rtol=1e-4)
    plain = [dataclasses.replace(request, adapter="") for request in asked]
    assert tokens_of(engine.generate(plain)) == tokens_of(Engine(load_model(base)).generate(plain)) != tokens_of(done)


@needs_exact
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_a_row_has_the_same_bits_whatever_adapters_the_others_have(
    tiny_config: ModelConfig, tmp_path: Path, kind: str | None
) -> None:
    config = dataclasses.replace(tiny_config, **BF16)
    base = saved(randomised(config, 0), tmp_path / "base")
    how = None if kind is None else Quantisation(kind)
    folders = {
        name: write_adapter(tmp_path / name, base, targets, rank, seed)
        for seed, (name, targets, rank) in enumerate(
            [("a", ALL, 4), ("b", ALL, 4), ("c", ALL, 8), ("d", ("q_proj", "v_proj"), 3), ("e", ALL, 4)]
        )
    }
    asked = requests(["a", "", "b", "c", "d", "e", "a"], 21)
    together = Engine(load_model(base, quantisation=how), EngineConfig(max_batch_tokens=40, max_sequences=16))
    for name, folder in folders.items():
        together.load_adapter(name, folder)
    found = together.generate(asked)
    for request, completion in zip(asked, found, strict=True):
        alone = Engine(load_model(base, quantisation=how), EngineConfig(max_sequences=1))
        if request.adapter:
            alone.load_adapter(request.adapter, folders[request.adapter])
        assert alone.generate([request]) == [completion]
    assert len({tuple(one.tokens) for one in found}) == len(found)


def test_the_same_prompt_under_other_adapters_shares_nothing(base: Path, tmp_path: Path) -> None:
    engine = Engine(load_model(base))
    for seed in (1, 2):
        engine.load_adapter(f"a{seed}", write_adapter(tmp_path / f"a{seed}", base, seed=seed))
    prompt = tuple(range(40))
    asked = [Request(n, prompt, SamplingParams(8, 0.0), adapter=f"a{n}" if n else "") for n in range(3)]
    together = engine.generate(asked)
    assert [engine.generate([request])[0] for request in asked] == together
    assert len({tuple(one.tokens) for one in together}) == 3


def test_preemption_and_chunks_change_nothing(base: Path, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / f"a{seed}", base, seed=seed) for seed in range(2)]
    asked = requests(["a0", "a1", ""], 12, most=40)

    def engine(**sizes: int) -> Engine:
        made = Engine(load_model(base), EngineConfig(**sizes))
        for seed, folder in enumerate(folders):
            made.load_adapter(f"a{seed}", folder)
        return made

    small = engine(cache_tokens=160, max_sequences=8, max_batch_tokens=9)
    assert tokens_of(small.generate(asked)) == tokens_of(engine().generate(asked))
    assert small.statistics()["preemptions"] > 0


@pytest.mark.parametrize("kind", [None, "int8"])
def test_speculation_changes_nothing(base: Path, tmp_path: Path, kind: str | None) -> None:
    folders = [write_adapter(tmp_path / f"a{seed}", base, seed=seed) for seed in range(2)]
    asked = requests(["a0", "a1", ""], 12, most=40)
    asked = [dataclasses.replace(one, prompt=one.prompt * 3) for one in asked]
    found = []
    for speculate in ("", "ngram"):
        how = None if kind is None else Quantisation(kind)
        engine = Engine(load_model(base, quantisation=how), EngineConfig(speculate=speculate, max_sequences=8))
        for seed, folder in enumerate(folders):
            engine.load_adapter(f"a{seed}", folder)
        found.append(tokens_of(engine.generate(asked)))
    assert found[0] == found[1]


def test_an_adapter_is_unloaded_when_its_last_request_ends(base: Path, tmp_path: Path) -> None:
    first, second = (write_adapter(tmp_path / f"f{seed}", base, seed=seed) for seed in (1, 2))
    request = Request("r", (1, 2, 3), SamplingParams(20, seed=1), adapter="a")
    engine = Engine(load_model(base))
    engine.load_adapter("a", first)
    expected = engine.generate([request])[0].tokens
    engine.load_adapter("b", second)
    renamed = engine.generate([dataclasses.replace(request, adapter="b")])[0].tokens
    engine.unload_adapter("b")
    held = engine.adapters.nbytes
    engine.add(request)
    engine.step()
    engine.unload_adapter("a")
    with pytest.raises(LiaoyuanError, match="There is no adapter 'a'"):
        engine.add(Request("late", (1,), adapter="a"))
    engine.load_adapter("a", second)  # the name is free at once; who runs keeps the first
    engine.add(dataclasses.replace(request, id="new"))
    told = run(engine)
    assert told["r"] == expected[1:] and told["new"] == renamed != expected
    assert engine.adapters.nbytes == held
    engine.unload_adapter("a")
    assert engine.adapters.nbytes == 0 and not engine.adapters
    assert all(module.adapter is None for module in projections(engine.model).values())


def test_an_adapter_never_finds_the_prefixes_of_a_former_one_of_its_name(base: Path, tmp_path: Path) -> None:
    engine, told = Engine(load_model(base)), []
    for seed in (1, 2, 1):
        engine.load_adapter("a", write_adapter(tmp_path / f"a{len(told)}", base, seed=seed))
        for _ in range(2):
            engine.add(Request("r", tuple(range(50)), SamplingParams(9, 0.0), adapter="a"))
            told.append(run(engine)["r"])
        engine.unload_adapter("a")
    assert engine.statistics()["prefix_hit_tokens"] == 4 * 48  # the first one's are found when it comes again
    assert told[0] == told[1] == told[4] == told[5] != told[2] == told[3]


def test_aborting_the_last_request_frees_its_adapter(base: Path, tmp_path: Path) -> None:
    engine = Engine(load_model(base))
    engine.load_adapter("a", write_adapter(tmp_path / "a", base))
    engine.add(Request("r", (1, 2, 3), SamplingParams(20), adapter="a"))
    engine.step()
    engine.unload_adapter("a")
    assert engine.adapters.nbytes > 0
    engine.abort("r")
    assert engine.adapters.nbytes == 0


@needs_exact
def test_a_whole_pass_with_one_adapter_gives_the_bits_of_steps(tiny_config: ModelConfig, tmp_path: Path) -> None:
    base = saved(randomised(dataclasses.replace(tiny_config, **BF16), 0), tmp_path / "base")
    engine = Engine(load_model(base))
    for seed in range(3):
        engine.load_adapter(f"a{seed}", write_adapter(tmp_path / f"a{seed}", base, seed=seed))
    texts = [list(range(40)), list(range(5, 30))]
    plain = score(engine.model, texts)
    with engine.adapters.everywhere("a1"):
        found = score(engine.model, texts)
    asked = [
        Request(n, tuple(text), SamplingParams(1, prompt_logprobs=0), adapter="a1") for n, text in enumerate(texts)
    ]
    stepped = engine.generate([*asked, Request("other", (1, 2), adapter="a2")])[:2]
    for completion, expected in zip(stepped, found, strict=True):
        assert completion.prompt is not None and completion.prompt.logprobs == expected
    assert score(engine.model, texts) == plain != found


def test_places_of_unloaded_adapters_are_given_again(base: Path, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / f"a{seed}", base, seed=seed) for seed in range(6)]
    engine = Engine(load_model(base))
    for seed in range(3):
        engine.load_adapter(f"a{seed}", folders[seed])
    size = engine.adapters.nbytes
    for seed in range(3, 6):
        engine.unload_adapter(f"a{seed - 3}")
        engine.load_adapter(f"a{seed}", folders[seed])
    assert engine.adapters.nbytes == size
    asked = requests(["a3", "a4", "a5", ""])
    fresh = Engine(load_model(base))
    for seed in (5, 4, 3):
        fresh.load_adapter(f"a{seed}", folders[seed])
    assert fresh.generate(asked) == engine.generate(asked)


def test_two_engines_do_not_share_the_adapters_of_one_model(base: Path, tmp_path: Path) -> None:
    model, folder = load_model(base), write_adapter(tmp_path / "a", base)
    Engine(model).load_adapter("a", folder)
    other = Engine(model)
    with pytest.raises(LiaoyuanError, match="has an adapter already"):
        other.load_adapter("a", folder)
    assert not other.adapters


def broken(folder: Path, kind: str) -> None:
    """Spoil an adapter."""
    weights, config = folder / "adapter_model.safetensors", json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(weights)
    if kind == "torn":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "lacks a half":
        save_file({k: v for k, v in tensors.items() if "layers.1.self_attn.k_proj.lora_B" not in k}, weights)
    elif kind == "lacks a projection":
        save_file({k: v for k, v in tensors.items() if "layers.1.self_attn.k_proj" not in k}, weights)
    elif kind == "foreign":
        save_file({k.replace("layers.1", "layers.7"): v for k, v in tensors.items()}, weights)
    elif kind == "another size":
        save_file({k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in tensors.items()}, weights)
    elif kind == "not finite":
        save_file({k: v / 0 for k, v in tensors.items()}, weights)
    elif kind == "pickle":
        weights.rename(folder / "adapter_model.bin")
    elif kind == "no config":
        (folder / "adapter_config.json").unlink()
    else:
        (folder / "adapter_config.json").write_text(json.dumps(config | json.loads(kind)))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("torn", "truncated or corrupt"),
        ("lacks a half", "layers.1.self_attn.k_proj' the adapter has only lora_A"),
        ("lacks a projection", "lacks 'model.layers.1.self_attn.k_proj'"),
        ("foreign", "layers.7.* no projection of this model's layers"),
        ("another size", r"need \[4, \d+\]"),
        ("not finite", "infinite"),
        ("pickle", "a pickle, which is never opened"),
        ("no config", "has no adapter_config.json"),
        ('{"peft_type": "IA3"}', "'IA3'"),
        ('{"use_dora": true}', "DoRA"),
        ('{"modules_to_save": ["lm_head"]}', "replaces whole modules"),
        ('{"bias": "all"}', "biases"),
        ('{"r": 8}', "rank 8 need"),
        ('{"r": 0}', "'r' must be a number above 0"),
        ('{"lora_alpha": "x"}', "'lora_alpha'"),
        ('{"rank_pattern": {"(a+)+": 2}}', "no patterns"),
        ('{"init_lora_weights": "pissa"}', "changes the base weights"),
        ('{"use_quantum": true}', "'use_quantum' is True, which is not known"),
    ],
)
def test_what_is_torn_or_foreign_is_refused_whole(base: Path, tmp_path: Path, kind: str, message: str) -> None:
    folder = write_adapter(tmp_path / "a", base)
    broken(folder, kind)
    engine = Engine(load_model(base))
    with pytest.raises(LiaoyuanError, match=message):
        engine.load_adapter("a", folder)
    assert not engine.adapters
    assert all(module.adapter is None for module in projections(engine.model).values())
    with pytest.raises(LiaoyuanError, match="There is no adapter 'a'"):
        engine.add(Request("r", (1,), adapter="a"))


def test_gradients_reach_the_parts_as_if_they_were_merged(tiny_config: ModelConfig) -> None:
    model = randomised(tiny_config, 0)
    module = model.layers[0].self_attn.qkv_proj
    parts = parts_of("layers.0.self_attn.qkv_proj", module, tiny_config)
    assert [part.name.rsplit(".")[-1] for part in parts] == ["q_proj", "k_proj", "v_proj"]
    generator = torch.Generator().manual_seed(5)
    pairs = {
        part.name: (torch.randn(3, 32, generator=generator), torch.randn(len(part.rows), 3, generator=generator))
        for part in parts[::2]  # the key has none
    }
    module.adapter = LowRank(parts, pairs, 0.5, module.out_features)
    tokens = torch.arange(20)
    positions, context = packed_context([20])
    model(tokens, positions, context, targets=tokens).sum().backward()
    weight = module.weight.grad
    for part, a, b in zip(parts[::2], module.adapter.lora_A, module.adapter.lora_B, strict=True):
        torch.testing.assert_close(a.grad, 0.5 * b.detach().T @ weight[part.rows], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(b.grad, 0.5 * weight[part.rows] @ a.detach().T, atol=1e-4, rtol=1e-3)
    assert "layers.0.self_attn.qkv_proj.adapter.lora_A.0" in dict(model.named_parameters())


def test_one_adapter_in_training_and_many_in_serving_agree(base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", base)
    engine = Engine(load_model(base))
    engine.load_adapter("a", folder)
    completion = engine.generate([Request(0, (1, 2, 3), SamplingParams(20, seed=0), adapter="a")])[0]
    model = load_model(base)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, module in projections(model).items():
        parts = parts_of(name, module, model.config)
        pairs = {
            part.name: tuple(tensors[f"base_model.model.{part.name}.{half}.weight"] for half in ("lora_A", "lora_B"))
            for part in parts
        }
        module.adapter = LowRank(parts, pairs, 2.0, module.out_features)
    found = logprobs(model, completion, (1, 2, 3))
    torch.testing.assert_close(found, torch.tensor(completion.logprobs), atol=1e-4, rtol=1e-4)


def test_peft_agrees(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    folder = write_adapter(tmp_path / "a", base, ("q_proj", "v_proj", "gate_proj", "down_proj"), use_rslora=True)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    engine = Engine(load_model(base))
    engine.load_adapter("a", folder)
    request = Request(0, tuple(range(30)), SamplingParams(20, temperature=0.0), adapter="a")
    completion = engine.generate([request])[0]
    text = torch.tensor([[*request.prompt, *completion.tokens]])
    with torch.no_grad():
        expected = theirs(text).logits[0].log_softmax(-1)[29:-1]
    assert expected.argmax(-1).tolist() == completion.tokens
    chosen = expected.gather(1, text[0, 30:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, atol=2e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    written = read_adapter(tmp_path / "theirs", engine.model)
    for name, (a, b) in read_adapter(folder, engine.model).weights.items():
        assert torch.equal(a, written.weights[name][0]) and torch.equal(b, written.weights[name][1])
