"""Out of the lab: what is shipped is what was trained, within a stated tolerance, or it is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.cli.main import app
from liaoyuan.data import Record, Tokenizer, write_records
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Engine, Request, SamplingParams
from liaoyuan.models import Decoder, initialise, packed_context, read_config, with_dtype
from liaoyuan.parallel import Program, World
from liaoyuan.serving.about import read_about
from liaoyuan.tasks import TASKS, to_record
from liaoyuan.tasks.seen import Seen, read_seen
from liaoyuan.tuning.card import Card, licence_of, read_card, sources_of, write_card
from liaoyuan.tuning.held_out import HELD_OUT
from liaoyuan.tuning.lora import LoraConfig, Method, add_adapters, begin, save_adapters


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def base(request: pytest.FixtureRequest, small_model: Decoder, tokenizer_folder: Path, tmp_path: Path) -> Path:
    config = with_dtype(replace(small_model.config, initializer_range=0.2), request.param)
    save_model(initialise(Decoder(config), 0), tmp_path / "base", tokenizer_folder)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    return tmp_path / "base"


def adapter(base: Path, folder: Path, method: Method = "lora", bits: str = "whole") -> Path:
    """Write an adapter that has learned something, in a run folder with held-out records."""
    config, generator = LoraConfig(rank=4), torch.Generator().manual_seed(1)
    program = Program([add_adapters(load_model(base), method, config)])
    begin(program, 0)
    with torch.no_grad():
        for name, weight in program.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    save_adapters(program, folder / "adapter", base, method, config, World())
    write_records(folder / "held_out.jsonl.zst", records())
    card = Card("run", "adapter", base, "LoRA", "liaoyuan tune sft ...", config={"lora": {"base": bits}})
    write_card(folder / "adapter", card)
    Seen(folder / "adapter").add_records(records()[:3])
    return folder / "adapter"


def records() -> list[Record]:
    return [to_record(TASKS["addition"].problem(1, index, 1)) for index in range(12)]


def convert(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_merged_adapter_is_what_was_trained_and_transformers_loads_it(
    base: Path, method: Method, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    folder, out = adapter(base, tmp_path / "run", method), tmp_path / "out"
    figures = json.loads(convert("--merge", folder, "--model", base, "--out", out, "--json"))
    assert figures["tolerated"] and figures["tokens"] > 100
    assert figures["log_prob_difference"] < (1e-5 if read_config(base).dtype == "float32" else 2e-2)
    ours = AutoModelForCausalLM.from_pretrained(out).float()
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(whole, folder).merge_and_unload()
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        close = 1e-4 if read_config(base).dtype == "float32" else 3e-2
        torch.testing.assert_close(ours(tokens).logits, merged(tokens).logits, atol=close, rtol=close)


def test_few_bits_pass_the_gate_and_are_served(base: Path, tmp_path: Path) -> None:
    folder, out = adapter(base, tmp_path / "run"), tmp_path / "out"
    shown = convert("--merge", folder, "--model", base, "--out", out, "--quantise", "int8", "--max-divergence", 0.1)
    assert "(tolerated: 0.1)" in shown and "held-out records" in shown
    completion = Engine(load_model(out)).generate([Request(0, (1, 2, 3), SamplingParams(4))])[0]
    assert len(completion.tokens) == 4
    assert set(read_seen(folder)) == set(read_seen(out)) and len(read_seen(out))  # eval refuses what it learned from
    assert read_about(out).single_turn is False  # the page's words and the card stand in one file
    assert Tokenizer.load(out).vocab_size == Tokenizer.load(base).vocab_size


def test_what_differs_too_much_is_refused_with_its_figures_and_leaves_nothing(base: Path, tmp_path: Path) -> None:
    folder, out = adapter(base, tmp_path / "run"), tmp_path / "out"
    given = ("--merge", folder, "--model", base, "--out", out, "--quantise", "int4", "--max-divergence", 1e-6)
    with pytest.raises(LiaoyuanError, match=r"divergence is 0\.\d+ nats \(tolerated: 1e-06\)") as refused:
        convert(*given)
    assert "--force" in str(refused.value) and not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".part")]
    shown = convert(*given, "--force")
    assert "written because of --force" in shown
    assert "It was exported with --force." in (out / "README.md").read_text()
    assert "divergence" in read_card(out)["notes"][0]


def test_an_adapter_of_a_base_in_few_bits_is_compared_with_that_base(base: Path, tmp_path: Path) -> None:
    whole, few = adapter(base, tmp_path / "whole"), adapter(base, tmp_path / "few", bits="int4")
    found = [
        json.loads(convert("--merge", one, "--model", base, "--out", tmp_path / f"out{n}", "--json", "--force"))
        for n, one in enumerate((whole, few))
    ]
    assert found[1]["divergence"] > 10 * found[0]["divergence"]  # the rounding that the adapter had learned with


def test_an_adapter_knows_the_model_it_was_trained_on(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "run", "dora")
    figures = json.loads(convert("--merge", folder, "--out", tmp_path / "out", "--json"))
    assert figures["tolerated"] and figures["source"] == str(base)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), "someone/else"))
    with pytest.raises(LiaoyuanError, match=r"trained on 'someone/else', which is no folder here: .*--model"):
        convert("--merge", folder, "--out", tmp_path / "other")


def test_a_run_that_held_nothing_out_is_told_how_to_compare(model_folder: Path, tmp_path: Path) -> None:
    folder = adapter(model_folder, tmp_path / "run")
    write_records(tmp_path / "run" / HELD_OUT, [])
    with pytest.raises(LiaoyuanError, match=r"there are none beside .*--texts"):
        convert("--merge", folder, "--model", model_folder, "--out", tmp_path / "out")


def test_problems_of_a_task_are_answered_by_both(model_folder: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "texts.jsonl", records())
    given = ("--quantise", "int8", "--model", model_folder, "--out", tmp_path / "out", "--task", "addition")
    figures = json.loads(convert(*given, "--texts", tmp_path / "texts.jsonl", "--json", "--max-divergence", 1))
    assert figures["task"]["name"] == "addition" and figures["task"]["trained"] == figures["task"]["exported"] == 0.0


def test_bad_lines_of_texts_are_skipped_only_if_the_user_agrees_and_are_counted(
    model_folder: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "1+1=?", "completion": "2"},
        {"prompt": "1+2=?"},
        {"text": "3"},
        {"instruction": "q", "ouput": ""},
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ("--quantise", "int8", "--model", model_folder, "--out", tmp_path / "out", "--max-divergence", 1)
    given += ("--max-drop", 1, "--texts", tmp_path / "texts.jsonl")
    with pytest.raises(LiaoyuanError, match=r"2 of 4 lines are bad: line 2: .* or use --skip-bad"):
        convert(*given)
    assert not (tmp_path / "out").exists()
    assert "on 2 held-out records" in (told := convert(*given, "--skip-bad")) and "2 were left out" in told
    assert "--max-divergence 1 --max-drop 1 --skip-bad" in read_card(tmp_path / "out")["command"]


def test_mistakes_are_sentences(model_folder: Path, tmp_path: Path) -> None:
    folder = adapter(model_folder, tmp_path / "run")
    torn = folder / "adapter_model.safetensors"
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--quantise", "int8", "--model", model_folder, "--out", tmp_path / "o"), "--texts"),
        (("--merge", tmp_path / "none", "--model", model_folder, "--out", tmp_path / "o"), "none"),
        (("--merge", folder, "--model", model_folder), "TARGET is missing"),
        (("--merge", folder, model_folder, tmp_path / "o", "--model", model_folder), "given twice"),
        (("--merge", folder, model_folder, tmp_path / "o", "--quantise", "int9"), "did you mean 'int8'"),
        (("--merge", folder, model_folder, tmp_path / "o", "--step", 3), "--step does not go with --merge"),
        ((model_folder, tmp_path / "o", "--texts", "x"), "are for --merge and --quantise"),
    ]
    for given, said in cases:
        with pytest.raises(LiaoyuanError, match=said):
            convert(*given)
    torn.write_bytes(torn.read_bytes()[:200])
    with pytest.raises(LiaoyuanError, match="truncated or corrupt"):
        convert("--merge", folder, "--model", model_folder, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_the_card_names_base_data_licences_and_the_command(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "run")
    data = [
        record.model_copy(update={"source": source, "licence": licence})
        for record in records()
        for source, licence in (("gsm8k", "MIT"), ("mine", ""))
    ]
    scores = {"loss": {"before": {"mean": 2.0, "low": 1.5, "high": 2.5}}}
    card = Card("mine", "adapter", base, "LoRA", "liaoyuan tune sft c.toml", sources_of(data), {"a": 1}, scores)
    write_card(folder, card)
    text, machine = (folder / "README.md").read_text(), read_card(folder)
    head = text.split("---\n")[1]
    assert 'license: "apache-2.0"' in head and 'base_model: "base"' in head and 'library_name: "peft"' in head
    assert "| learned | gsm8k | MIT | 12 |" in text and "| learned | mine | unknown | 12 |" in text
    assert "2 (1.5 to 2.5)" in text and "liaoyuan tune sft c.toml" in text
    assert machine["base"]["licence"] == "apache-2.0" == licence_of(folder)
    assert len(machine["files"]["adapter_model.safetensors"]) == 64 and "model.safetensors" in machine["base"]["files"]


def test_hugging_face_reads_the_head(base: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    folder = adapter(base, tmp_path / "run")
    data = hub.ModelCard.load(folder / "README.md").data
    assert (data.license, data.base_model, data.pipeline_tag) == ("apache-2.0", "base", "text-generation")


def test_the_outputs_of_a_merged_model_follow_the_adapter(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert("--merge", adapter(base, tmp_path / "run"), "--model", base, "--out", out, "--dtype", "float32")
    tokens = torch.arange(20)
    positions, context = packed_context([20])
    before, after = (load_model(one)(tokens, positions, context, targets=tokens) for one in (base, out))
    assert (before - after).abs().max() > 0.05
