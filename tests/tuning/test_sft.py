"""Fine-tuning as a user meets it: what is held out, what is kept, how it compares, texts, and general text mixed in."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from liaoyuan.checkpoint import load_model
from liaoyuan.data import (
    Message,
    Record,
    RecordTokens,
    TokenisedRecord,
    Tokenizer,
    read_records,
    tokenise,
    write_records,
)
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, packed_context, read_config
from liaoyuan.parallel import Program, World
from liaoyuan.rundir import read_metrics, silent
from liaoyuan.tuning.held_out import Outcomes, compare, content_hash, measure, split, split_off
from liaoyuan.tuning.lora import LoraConfig
from liaoyuan.tuning.rates import learning_rate_for
from liaoyuan.tuning.sft_config import SftConfig, SftTrain, resolved
from liaoyuan.tuning.sft_data import read_source, with_replay
from liaoyuan.tuning.sft_run import run_sft


def problems(count: int) -> list[Record]:
    """Return so many different records."""
    return [
        Record(
            id=str(n),
            messages=(Message(role="user", content=f"{n}+{n}=?"), Message(role="assistant", content=str(2 * n))),
            source="generated",
        )
        for n in range(count)
    ]


def text(words: str, name: str = "t") -> Record:
    return Record(id=name, kind="text", messages=(Message(role="user", content=words),), source="books", licence="CC0")


def tokens_of(records: list[Record], tokenizer: Tokenizer, length: int, path: Path) -> RecordTokens:
    """Return what is learned from a file of these records."""
    write_records(path, records)
    source = read_source(path, tokenizer, length, False, silent)
    return source.tokens_of(source.records)


def config(model: Path, data: Path, **given: object) -> SftConfig:
    train = {"steps": 20, "batch_tokens": 128, **given.pop("train", {})}  # type: ignore[dict-item]
    sizes = {"sequence_length": 32, "device": "cpu", "validation_share": 0.2}
    return SftConfig(model=model, data=data, train=SftTrain(**train), **(sizes | given))


# ---- held out


def test_what_is_held_out_follows_from_the_content_alone() -> None:
    records = problems(50)
    renamed = [record.model_copy(update={"id": f"other {n}", "source": "x"}) for n, record in enumerate(records)]
    one, two = split(records, 0.2, 400), split(renamed[::-1], 0.2, 400)
    assert {content_hash(r) for r in one.held_out} == {content_hash(r) for r in two.held_out}
    assert len(one.held_out) == 10 and len(one.train) == 40


def test_a_record_that_is_there_twice_is_never_on_both_sides() -> None:
    records = problems(30) + [record.model_copy(update={"id": f"{record.id} again"}) for record in problems(30)]
    parts = split(records, 0.3, 400)
    assert not {content_hash(r) for r in parts.held_out} & {content_hash(r) for r in parts.train}
    assert len(parts.held_out) == 9 and len(parts.train) == 42 and parts.dropped == 9
    fast = [
        record.model_copy(update={"id": f"{record.id}/fast", "messages": (record.messages[0], record.messages[1])})
        for record in problems(30)
    ]
    slow = [
        record.model_copy(
            update={"messages": (record.messages[0], record.messages[1].model_copy(update={"think": "1,2"}))}
        )
        for record in fast
    ]
    both = split([*fast, *slow], 0.3, 400)  # a question that is answered in two ways is one question
    assert len(both.held_out) == 18 and len(both.train) == 42
    assert not {r.messages[0] for r in both.held_out} & {r.messages[0] for r in both.train}
    given = split_off(records, problems(5), 400)
    assert len(given.train) == 50 and given.dropped == 10
    with pytest.raises(LiaoyuanError, match="nothing to learn from"):
        split_off(problems(3), problems(3), 400)


def test_outcomes_are_those_of_each_record_alone(small_model: Decoder, tokenizer: Tokenizer) -> None:
    records = tokenise(tokenizer, problems(9))
    records[3] = TokenisedRecord(records[3].tokens, tuple(0.5 * weight for weight in records[3].weights))
    found = measure(Program([small_model]), records, World())
    for place, record in enumerate(records):
        tokens, weights = torch.tensor(record.tokens), torch.tensor(record.weights)[1:]
        positions, context = packed_context([len(tokens) - 1])
        logits = small_model(tokens[:-1], positions, context)
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        right = (logits.argmax(-1) == tokens[1:]).float()
        expected = [x.item() for x in ((losses * weights).sum(), weights.sum(), (right * weights).sum())]
        assert [found.nats[place], found.tokens[place], found.right[place]] == pytest.approx(expected, abs=1e-4)


def test_intervals_are_over_records_and_differences_are_paired() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(1, 30, 300).astype(float)
    hard = random.uniform(0, 5, 300) * tokens  # some records are much harder than others
    before = Outcomes(hard, tokens, tokens * 0.5)
    after = Outcomes(hard - 0.1 * tokens, tokens, tokens * 0.6)
    found = compare(before, after)
    loss = found["loss"]
    assert loss["before"]["mean"] == pytest.approx(hard.sum() / tokens.sum(), rel=1e-5)
    assert loss["before"]["high"] - loss["before"]["low"] > 0.1
    assert loss["difference"] == pytest.approx({"mean": -0.1, "low": -0.1, "high": -0.1}, abs=1e-4)
    assert found["perplexity"]["after"]["mean"] == pytest.approx(np.exp(loss["after"]["mean"]))
    assert found["token_accuracy"]["difference"]["mean"] == pytest.approx(0.1, abs=1e-4)


# ---- runs


def test_a_run_shows_its_curves_and_what_it_was_measured_on(model_folder: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "d.jsonl", problems(40))
    result = run_sft(config(model_folder, tmp_path / "d.jsonl", train={"evaluate_every": 5}), tmp_path / "out")
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert {"loss", "learning_rate", "grad_norm", "tokens", "padding", "cpu_seconds"} <= rows[0].keys()
    assert [row["step"] for row in rows if "validation_loss" in row] == [4, 9, 14, 19]
    held = read_records(tmp_path / "out" / "held_out.jsonl.zst")
    assert len(held) == 8 and {content_hash(one) for one in held} < {content_hash(one) for one in problems(40)}
    tokens = tokenise(Tokenizer.load(model_folder), held)
    before, after = (
        measure(Program([load_model(one)]), tokens, World()) for one in (model_folder, tmp_path / "out" / "model")
    )
    compared = result["comparison"]["held_out"]
    assert compared["loss"]["before"]["mean"] == pytest.approx(before.loss, abs=1e-5)
    assert compared["loss"]["after"]["mean"] == pytest.approx(after.loss, abs=1e-5)  # of the folder that is left
    assert compared["token_accuracy"]["after"]["mean"] == pytest.approx(after.accuracy, abs=1e-5)
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "token accuracy, difference" in card and "config.toml" in card


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_checkpoint_is_kept_or_the_last(keep: str, model_folder: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "d.jsonl", problems(10))  # few, and a high rate: it learns them by heart
    train = {"steps": 60, "evaluate_every": 4, "learning_rate": 1e-2}
    given = config(model_folder, tmp_path / "d.jsonl", keep=keep, train=train)
    kept = run_sft(given, tmp_path / "out")["comparison"]
    rows = {row["step"] + 1: row for row in read_metrics(tmp_path / "out" / "metrics.jsonl")}
    losses = {step: row["validation_loss"] for step, row in rows.items() if "validation_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert best < 60
    assert kept["kept"]["step"] == (best if keep == "best" else 60)
    assert kept["held_out"]["loss"]["after"]["mean"] == pytest.approx(losses[kept["kept"]["step"]], abs=1e-5)


def test_a_run_goes_on_only_as_what_it_was(model_folder: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "d.jsonl", tmp_path / "out"
    write_records(data, problems(20))
    run_sft(config(model_folder, data, train={"steps": 4}), out)
    with pytest.raises(LiaoyuanError, match=r"lora\.rank = 16, not 4"):
        run_sft(config(model_folder, data, train={"steps": 4}, lora=LoraConfig(rank=4)), out)
    write_records(data, problems(21))
    with pytest.raises(LiaoyuanError, match="holds a run on other data"):
        run_sft(config(model_folder, data, train={"steps": 4}), out)


def test_settings_follow_from_the_model_and_the_data(model_folder: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "d.jsonl", problems(400))
    given = SftConfig(
        model=model_folder, data=tmp_path / "d.jsonl", train=SftTrain(batch_tokens=128), sequence_length=32
    )
    records = tokenise(Tokenizer.load(model_folder), problems(400))
    train = resolved(given, read_config(model_folder), records).train
    seen = train.steps * 128 / sum(len(record.tokens) - 1 for record in records)
    assert 3.0 <= seen < 3.6  # epochs, and what packing leaves empty
    assert train.evaluate_every == train.steps // 10 and train.warmup_steps <= 20
    assert SftConfig(**json.loads(given.model_dump_json())) == given


def test_the_learning_rate_falls_with_the_size_and_is_higher_for_adapters() -> None:
    assert learning_rate_for(7_000_000_000, "full") == 2e-5
    assert learning_rate_for(7_000_000_000, "lora") == learning_rate_for(7_000_000_000, "dora") == 1e-4
    assert learning_rate_for(600_000, "full") == learning_rate_for(10, "full") == 3e-3
    rates = [learning_rate_for(10**power, "full") for power in range(5, 12)]
    assert all(small >= large for small, large in pairwise(rates))


# ---- texts


def test_every_token_of_a_text_is_learned_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    words = "the answer is 12+34=46, " * 20
    pieces = tokens_of([text(words)], tokenizer, 32, tmp_path / "data.jsonl")
    end = tokenizer.end_of_text_id
    learned = [token for piece in pieces for token, weight in zip(piece.tokens, piece.weights, strict=True) if weight]
    assert learned == [*tokenizer.encode(words), end] and pieces[0].tokens[0] == end
    assert max(len(piece.tokens) for piece in pieces) == 33
    assert all(one.tokens[-1] == two.tokens[0] for one, two in pairwise(pieces))


def test_general_text_is_mixed_in_and_measured(model_folder: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "d.jsonl", problems(40))
    write_records(tmp_path / "g.jsonl", [text(f"the answer {n} is the answer " * 9, str(n)) for n in range(60)])
    given = config(model_folder, tmp_path / "d.jsonl", replay=tmp_path / "g.jsonl", replay_share=0.25)
    compared = run_sft(given, tmp_path / "out")["comparison"]
    assert compared["general"]["loss"]["after"]["mean"] < compared["general"]["loss"]["before"]["mean"]
    assert "general_loss" in read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]
    assert (
        "| general text, of which a part was drawn | books | CC0 |"
        in (tmp_path / "out" / "model" / "README.md").read_text()
    )


def test_the_share_of_general_text_is_one_of_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chats = tokens_of(problems(40), tokenizer, 64, tmp_path / "chats.jsonl")
    general = tokens_of([text("the answer " * 30, str(n)) for n in range(80)], tokenizer, 64, tmp_path / "texts.jsonl")
    mixed = with_replay(chats, general, 0.25, seed=0)
    drawn = mixed[len(chats) :]
    share = drawn.sizes.sum() / mixed.sizes.sum()
    assert mixed[: len(chats)] == chats and 0.25 <= share < 0.28
    assert drawn[:-1].sizes.sum() / mixed[:-1].sizes.sum() < 0.25  # one less would be too few
    begins = drawn.begins - len(chats.tokens)
    assert np.isin(begins, general.begins).all() and len(np.unique(begins)) == len(drawn)
    assert drawn.total_weights().tolist() == (drawn.sizes - 1).tolist()
    assert with_replay(chats, general, 0.0, seed=0) == chats
    assert len(with_replay(chats, general, 0.999, seed=0)) == len(chats) + len(general)


def test_records_of_other_methods_are_refused_by_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sides = {side: (Message(role="assistant", content=side),) for side in ("chosen", "rejected")}
    record = Record(id="7", kind="preference", messages=(Message(role="user", content="x"),), **sides)
    with pytest.raises(LiaoyuanError, match=r"line 1: expected a .* found 'preference', which tune dpo learns from"):
        tokens_of([record], tokenizer, 32, tmp_path / "data.jsonl")
    with pytest.raises(
        LiaoyuanError, match=r"1 of 1 records do not fit in a sequence_length of 5; the longest \(line 1\)"
    ):
        tokens_of(problems(1), tokenizer, 5, tmp_path / "data.jsonl")
