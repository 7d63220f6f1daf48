"""Adapters in training: the algebra of a full-rank weight, files that PEFT reads, and runs that go on bit for bit."""

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.checkpoint.adapters import read_adapter
from liaoyuan.cli.main import app
from liaoyuan.cli.tune_options import adapter_method
from liaoyuan.data import write_records
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Engine, Request, SamplingParams
from liaoyuan.models import Decoder, Quantisation, config_from_dict, packed_context, quantise_model
from liaoyuan.models.lora import LowRank, merged_weight, projections, whole_weight
from liaoyuan.parallel import Layout, Program, World
from liaoyuan.rundir import read_metrics
from liaoyuan.tasks import TASKS, to_record
from liaoyuan.tuning.lora import LoraConfig, Method, add_adapters, begin, refuse_layout, save_adapters
from tests.conftest import randomised, slow_if
from tests.parallel.layouts import MODELS
from tests.parallel.processes import run_verb
from tests.verbs import Verb

METHODS: tuple[Method, ...] = ("lora", "rslora", "dora")
TOKENS = torch.arange(40) % 30
SIZES = ["train.batch_tokens=128", "sequence_length=32", "device=cpu", "validation_share=0.2"]


def model_of(kind: str, dtype: torch.dtype) -> Decoder:
    return randomised(replace(config_from_dict(MODELS[kind]), dtype=str(dtype).removeprefix("torch.")), 0)


def log_probs(model: Decoder) -> torch.Tensor:
    positions, context = packed_context([len(TOKENS)])
    return model(TOKENS, positions, context, targets=TOKENS.roll(-1))


def adapted(model: Decoder, method: Method, config: LoraConfig | None = None) -> Program:
    """Return the model with adapters that have learned something."""
    program = Program([add_adapters(model, method, config or LoraConfig(rank=4))])
    begin(program, 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                size = 0.1 * weight.mean() if "magnitude" in name else 0.1
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight) * size)
    return program


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["dense", "tied", "experts", "latent"])
def test_merged_weights_compute_what_weights_and_adapter_compute(
    kind: str, method: Method, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = model_of(kind, dtype)
    save_model(base, tmp_path / "base")
    config = LoraConfig(rank=4)
    program = adapted(model_of(kind, dtype), method, config)
    unmerged = log_probs(program.models[0])
    save_adapters(program, tmp_path / "a", tmp_path / "base", method, config, World())
    merged = load_model(tmp_path / "base")
    adapter = read_adapter(tmp_path / "a", merged, merging=True)
    with torch.no_grad():
        for name, pair in adapter.weights.items():
            weight = merged.get_submodule(name).weight
            weight.copy_(merged_weight(weight, pair, adapter.magnitudes.get(name)))
    found, plain = log_probs(merged), log_probs(base)
    assert (unmerged - plain).abs().max() > 0.3  # it changes much
    if dtype is torch.float32:
        torch.testing.assert_close(found, unmerged, atol=2e-4, rtol=2e-4)
    else:  # both are off from what fp32 gives by bf16's rounding: the one no more than the other
        exact = adapted(with_weights_of(base), method, config).models[0]
        off, merged_off = (usual_distance(model, exact) for model in (program.models[0], merged))
        assert merged_off < 1.2 * off


@torch.no_grad()
def usual_distance(model: Decoder, exact: Decoder) -> float:
    """Return the median over 5,120 tokens: the few whose rounded router chose another expert are off by much more.

    Of 320 tokens it is a fifth higher or lower, as the tokens are.
    """
    documents = 128
    tokens = torch.randint(1, 30, (documents * 40,), generator=torch.Generator().manual_seed(1))
    positions, context = packed_context([40] * documents)
    found, right = (one(tokens, positions, context, targets=tokens.roll(-1)) for one in (model, exact))
    return float((found - right).abs().median())


def with_weights_of(model: Decoder) -> Decoder:
    """Return an fp32 model with the weights of another one."""
    wide = Decoder(replace(model.config, dtype="float32"))
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    return wide


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_nothing(method: Method) -> None:
    model = model_of("dense", torch.bfloat16)
    before = log_probs(model)
    begin(Program([add_adapters(model, method, LoraConfig(rank=4))]), 0)
    if method == "dora":  # m / ||W|| is 1 but for the last bits of fp32
        torch.testing.assert_close(log_probs(model), before, atol=1e-2, rtol=0)
    else:
        assert torch.equal(log_probs(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_follow_from_those_of_the_whole_weight(method: Method, dtype: torch.dtype) -> None:
    """dA = s B^T dW, dB = s dW A^T; of DoRA with dW times m / ||W||, and dm = the rows of dW along W's direction."""
    model = model_of("dense", torch.float32).to(dtype)
    program = adapted(model, method)
    whole = model_of("dense", torch.float32).to(dtype)
    with torch.no_grad():
        for name, module in projections(model).items():
            merged = merged_weight(whole_weight(module), module.adapter.pair(), module.adapter.magnitudes())
            whole.get_submodule(name).weight.copy_(merged)
    (-log_probs(model).sum()).backward()
    (-log_probs(whole).sum()).backward()
    close = {"atol": 1e-9, "rtol": 1e-9} if dtype is torch.float64 else {"atol": 2e-3, "rtol": 2e-3}
    assert program.models[0].embed_tokens.weight.grad is None
    for name, module in projections(model).items():
        adapter: LowRank = module.adapter
        for place, (part, a, b) in enumerate(zip(adapter.parts, adapter.lora_A, adapter.lora_B, strict=True)):
            slope = whole.get_submodule(name).weight.grad[part.rows]
            if method == "dora":
                changed = (module.weight[part.rows] + adapter.scale * b @ a).detach()
                lengths = changed.norm(dim=1, keepdim=True)
                magnitude = adapter.lora_magnitude_vector[place]
                torch.testing.assert_close(magnitude.grad, (slope * changed / lengths).sum(1), **close)
                slope = slope * (magnitude.detach()[:, None] / lengths)
            torch.testing.assert_close(a.grad, adapter.scale * b.detach().T @ slope, **close)
            torch.testing.assert_close(b.grad, adapter.scale * slope @ a.detach().T, **close)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", ["dense", "experts"])
def test_gradients_flow_through_weights_of_few_bits(family: str, kind: str) -> None:
    """As through whole weights that have the values for which the few bits stand."""
    few = quantise_model(model_of(family, torch.float32), Quantisation(kind, head=None))
    whole = model_of(family, torch.float32)
    with torch.no_grad():
        for name, module in few.named_modules():
            if hasattr(module, "scales"):
                target = whole.get_parameter(name) if "experts." in name else whole.get_submodule(name).weight
                target.copy_(whole_weight(module).view(target.shape))
    gradients = []
    for model in (few, whole):
        adapted(model, "dora")
        (-log_probs(model).sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-3, rtol=2e-3, msg=name)


def test_what_is_adapted_can_be_chosen(tiny_model: Decoder) -> None:
    def leaves(*targets: str) -> set[str]:
        model = add_adapters(randomised(tiny_model.config, 0), "lora", LoraConfig(rank=2, targets=targets))
        adapters = [module.adapter for module in projections(model).values() if module.adapter is not None]
        return {part.name.rpartition(".")[2] for adapter in adapters for part in adapter.parts}

    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert leaves("attention") == attention
    assert leaves("all") == attention | {"gate_proj", "up_proj", "down_proj"}
    assert leaves("q_proj", "down_proj") == {"q_proj", "down_proj"}
    with pytest.raises(LiaoyuanError, match=r"no projections 'k_prj', did you mean 'k_proj'\?"):
        leaves("k_prj")


def test_routed_experts_and_routers_stay_as_they_are() -> None:
    model = add_adapters(model_of("latent", torch.float32), "lora", LoraConfig(rank=2))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(".experts." in name or ".gate." in name for name in trained)
    assert any("shared_experts" in name for name in trained)


# ---- runs


def data(path: Path, count: int = 40) -> Path:
    write_records(path, [to_record(TASKS["addition"].problem(0, index, 1)) for index in range(count)])
    return path


def command(model: Path, records: Path, out: Path, *settings: str) -> list[str]:
    given = ["tune", "sft", "--model", str(model), "--data", str(records), "--out", str(out), "--lora"]
    return [*given, *(part for setting in (*SIZES, *settings) for part in ("--set", setting))]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_trained_and_the_base_is_not(method: Method, model_folder: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "out", (model_folder / "model.safetensors").read_bytes()
    settings = ["train.steps=30", f"method={method}", "lora.rank=4"]
    shown = run(
        *command(model_folder, data(tmp_path / "d.jsonl"), out, *settings[:1], *settings[2:]), "--set", settings[1]
    )
    assert "liaoyuan convert --merge" in shown and "held-out records, never trained on" in shown
    compared = json.loads((out / "comparison.json").read_text())["held_out"]["loss"]
    assert compared["difference"]["high"] < 0  # it learned, and on records that it never saw
    assert (model_folder / "model.safetensors").read_bytes() == before
    state = sum(file.stat().st_size for file in sorted((out / "state").glob("step-*"))[-1].glob("*.safetensors"))
    adapter = sum(tensor.nbytes for tensor in load_file(out / "adapter" / "adapter_model.safetensors").values())
    assert state < 3 * adapter + 40_000  # weights and two moments of the adapter, and headers


@pytest.mark.parametrize("settings", [slow_if(True, []), ["lora.dropout=0.3"], ["lora.base=int8", "method=dora"]])
def test_a_killed_run_goes_on_bit_for_bit(settings: list[str], model_folder: Path, tmp_path: Path) -> None:
    records = data(tmp_path / "d.jsonl")
    settings = ["train.steps=40", "train.checkpoint_every=4", *settings]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(*command(model_folder, records, whole, *settings))
    process = Verb(*command(model_folder, records, cut, *settings))
    for _ in until(lambda: len(read_metrics(cut / "metrics.jsonl")) >= 9 or process.poll() is not None):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(*command(model_folder, records, cut, *settings))
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((whole / "adapter" / name).read_bytes() == (cut / "adapter" / name).read_bytes() for name in names)
    assert (whole / "comparison.json").read_bytes() == (cut / "comparison.json").read_bytes()
    losses = [[row["loss"] for row in read_metrics(one / "metrics.jsonl")] for one in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == 40


def until(is_done: object, seconds: float = 120.0) -> Iterator[None]:
    end = time.monotonic() + seconds
    while not is_done():  # type: ignore[operator]
        assert time.monotonic() < end
        yield


@pytest.mark.parametrize("method", [slow_if(True, "lora"), "dora"])
def test_two_processes_with_fsdp_train_the_adapter_of_one(method: str, model_folder: Path, tmp_path: Path) -> None:
    records, rows, compared = data(tmp_path / "data.jsonl"), {}, {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        verb = command(model_folder, records, out, "train.steps=12", f"method={method}")
        run(*verb) if processes == 1 else run_verb(processes, *verb)
        rows[processes] = [row["loss"] for row in read_metrics(out / "metrics.jsonl")]
        compared[processes] = json.loads((out / "comparison.json").read_text())["held_out"]["loss"]["after"]["mean"]
    assert rows[1] == pytest.approx(rows[2], abs=2e-5) and len(rows[1]) == 12
    assert compared[1] == pytest.approx(compared[2], abs=2e-5)
    adapters = [load_file(tmp_path / one / "adapter" / "adapter_model.safetensors") for one in ("1", "2")]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], atol=2e-4, rtol=0)


def test_what_adapters_cannot_do_is_refused(model_folder: Path, tmp_path: Path) -> None:
    records = data(tmp_path / "d.jsonl")
    for setting, said in (
        ("train.optimiser=muon", "whole matrices"),
        ("train.master_dtype=bfloat16", "whole weights"),
        ("lora.targets=['q_prj']", "did you mean 'q_proj'"),
        ("lora.rang=3", "did you mean 'rank'"),
    ):
        with pytest.raises(LiaoyuanError, match=said):
            run(*command(model_folder, records, tmp_path / "out", "train.steps=2", setting))
    with pytest.raises(LiaoyuanError, match="dp and fsdp alone"):
        refuse_layout(Layout(tp=2, fsdp=1), LoraConfig(), 2)
    with pytest.raises(LiaoyuanError, match="is for one process"):
        refuse_layout(Layout(fsdp=2), LoraConfig(base="int8"), 2)


@pytest.mark.parametrize("method", METHODS)
def test_peft_reads_what_was_trained(method: Method, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    model = model_of("tied", torch.float32)
    save_model(model, tmp_path / "base")
    config = LoraConfig(rank=3, targets=("q_proj", "v_proj", "gate_proj", "down_proj"))
    program = adapted(model, method, config)
    save_adapters(program, tmp_path / "a", tmp_path / "base", method, config, World())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0].log_softmax(-1).gather(-1, TOKENS.roll(-1)[:, None])[:, 0]
        torch.testing.assert_close(log_probs(model), expected, atol=1e-4, rtol=1e-4)


def test_what_was_trained_is_served(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(*command(model_folder, data(tmp_path / "d.jsonl"), out, "train.steps=20", "lora.rank=4"))
    engine = Engine(load_model(model_folder))
    engine.load_adapter("mine", out / "adapter")
    completion = engine.generate([Request(0, (5, 6, 7), SamplingParams(12, seed=0), adapter="mine")])[0]
    merged = load_model(model_folder)
    adapter = read_adapter(out / "adapter", merged, merging=True)
    with torch.no_grad():
        for name, pair in adapter.weights.items():
            weight = merged.get_submodule(name).weight
            weight.copy_(merged_weight(weight, pair))
        tokens = torch.tensor((5, 6, 7, *completion.tokens))
        positions, context = packed_context([len(tokens) - 1])
        found = merged(tokens[:-1], positions, context, targets=tokens[1:])[2:]
    torch.testing.assert_close(found, torch.tensor(completion.logprobs), atol=1e-4, rtol=1e-4)


def test_lora_stands_for_any_method_of_adapters() -> None:
    assert adapter_method(True, None) == adapter_method(True, ["lora.rank=4"]) == "lora"
    assert adapter_method(False, None) is None
    for named in ("method=dora", "method = 'rslora'"):
        assert adapter_method(True, [named]) is None
    assert adapter_method(True, ["method=full"]) == "lora"  # which is refused, as a key that is given twice
