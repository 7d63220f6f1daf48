"""Training state: whole or absent, noticed when damaged, refused when another's."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from liaoyuan.checkpoint import writer
from liaoyuan.checkpoint.training_state import load_state, save_state
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig, initialise
from liaoyuan.training import AdamW
from liaoyuan.training.muon import Muon

Pair = tuple[Decoder, AdamW]


def pair(config: ModelConfig, seed: int = 0) -> Pair:
    """Return a model and its optimiser after one step, so that the optimiser has a state."""
    model = initialise(Decoder(config), seed)
    optimiser = AdamW(model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimiser.step(0.01)
    return model, optimiser


def tensors(model: Decoder, optimiser: AdamW) -> list[torch.Tensor]:
    return [x.detach().clone() for x in (*model.parameters(), *optimiser.state().values())]


def save(folder: Path, step: int, of: Pair) -> None:
    save_state(folder, step, *of, extra={"tokens": 100 * step})


def test_what_was_saved_is_loaded_bit_for_bit(tiny_config: ModelConfig, tmp_path: Path) -> None:
    saved, other = pair(tiny_config), pair(tiny_config, seed=1)
    save(tmp_path, 7, saved)
    assert load_state(tmp_path, *other) == (7, {"tokens": 700})
    for one, two in zip(tensors(*saved), tensors(*other), strict=True):
        assert torch.equal(one, two)


def test_an_empty_or_missing_folder_is_a_new_run(tiny_config: ModelConfig, tmp_path: Path) -> None:
    assert load_state(tmp_path / "none", *pair(tiny_config)) is None


def test_the_newest_two_are_kept_and_nothing_is_pickled(tiny_config: ModelConfig, tmp_path: Path) -> None:
    for step in (2, 9, 10):
        save(tmp_path, step, pair(tiny_config))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000009", "step-000010"]
    names = sorted(path.name for path in (tmp_path / "step-000010").iterdir())
    assert names == ["rank-0000.safetensors", "state.json"]


def truncate(state: Path) -> None:
    shard = state / "rank-0000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def flip_a_bit(state: Path) -> None:
    shard = state / "rank-0000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)


def tear_the_manifest(state: Path) -> None:
    (state / "state.json").write_text('{"step": 1')


def change_the_manifest(state: Path) -> None:
    text = (state / "state.json").read_text()
    assert '"tokens": 200' in text
    (state / "state.json").write_text(text.replace('"tokens": 200', '"tokens": 201'))


def lose_the_shard(state: Path) -> None:
    (state / "rank-0000.safetensors").unlink()


DAMAGES = [truncate, flip_a_bit, tear_the_manifest, change_the_manifest, lose_the_shard]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_passed_over_with_a_warning(damage, tiny_config, tmp_path, caplog) -> None:  # type: ignore[no-untyped-def]
    older, newer = pair(tiny_config), pair(tiny_config, seed=1)
    save(tmp_path, 1, older)
    save(tmp_path, 2, newer)
    damage(tmp_path / "step-000002")
    loaded = pair(tiny_config, seed=2)
    with caplog.at_level(logging.WARNING):
        found = load_state(tmp_path, *loaded)
    assert found is not None and found[0] == 1
    assert "step-000002 is truncated or corrupt" in caplog.text
    for one, two in zip(tensors(*older), tensors(*loaded), strict=True):
        assert torch.equal(one, two)


def test_if_every_state_is_damaged_nothing_is_lost_in_silence(tiny_config: ModelConfig, tmp_path: Path) -> None:
    save(tmp_path, 1, pair(tiny_config))
    truncate(tmp_path / "step-000001")
    with pytest.raises(LiaoyuanError, match=r"Every checkpoint in .* is truncated or corrupt"):
        load_state(tmp_path, *pair(tiny_config))


def test_the_state_of_another_run_is_refused_and_says_why(tiny_config: ModelConfig, tmp_path: Path) -> None:
    save(tmp_path, 1, pair(tiny_config))
    wider = pair(ModelConfig(**{**vars(tiny_config), "intermediate_size": 64}))
    before = tensors(*wider)
    with pytest.raises(LiaoyuanError, match="model's intermediate_size is 48, here it is 64"):
        load_state(tmp_path, *wider)
    assert all(torch.equal(one, two) for one, two in zip(before, tensors(*wider), strict=True))
    model, _ = pair(tiny_config)
    with pytest.raises(LiaoyuanError, match="optimiser's optimiser is 'adamw', here it is 'muon'"):
        load_state(tmp_path, model, Muon(model.named_parameters()))
    with pytest.raises(LiaoyuanError, match=r"optimiser's weight_decay is 0\.1, here it is 0\.2"):
        load_state(tmp_path, model, AdamW(model.named_parameters(), weight_decay=0.2))


def test_a_state_of_an_older_format_is_refused(tiny_config: ModelConfig, tmp_path: Path) -> None:
    save(tmp_path, 1, pair(tiny_config))
    (tmp_path / "step-000001" / "state.json").write_text('{"step": 1, "processes": 1}')
    with pytest.raises(LiaoyuanError, match="another version of this program"):
        load_state(tmp_path, *pair(tiny_config))


def rewrite(state: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the table of tensors of a state, whose checksum then is right again."""
    manifest = json.loads((state / "state.json").read_text())
    change(manifest["tensors"])
    (state / "state.json").write_text(writer.sealed(manifest))


MOMENT = "optimiser.norm.weight.exp_avg"
LOSSES: dict[str, Callable[[dict[str, Any]], object]] = {
    f"lacks '{MOMENT}'": lambda tensors: tensors.pop(MOMENT),
    f"lacks a part of '{MOMENT}'": lambda tensors: tensors[MOMENT]["pieces"].clear(),
    f"has '{MOMENT}' of shape": lambda tensors: tensors[MOMENT].update(size=[16, 2]),
    "holds 'optimiser.other.exp_avg', which": lambda tensors: tensors.setdefault(
        "optimiser.other.exp_avg", tensors[MOMENT]
    ),
}


@pytest.mark.parametrize("words", LOSSES)
def test_a_moment_that_got_lost_is_named(words: str, tiny_config: ModelConfig, tmp_path: Path) -> None:
    save(tmp_path, 1, pair(tiny_config))
    rewrite(tmp_path / "step-000001", LOSSES[words])
    with pytest.raises(LiaoyuanError, match=words):
        load_state(tmp_path, *pair(tiny_config))


def test_a_full_disk_leaves_the_older_state_and_nothing_half_written(
    tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, pair(tiny_config))

    def fill_up(handle: int, data: memoryview) -> None:
        os.write(handle, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write", fill_up)
        with pytest.raises(LiaoyuanError, match="The disk is full"):
            save(tmp_path, 2, pair(tiny_config))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    found = load_state(tmp_path, *pair(tiny_config))
    assert found is not None and found[0] == 1


def test_states_that_were_passed_over_do_not_push_out_a_new_one(tiny_config: ModelConfig, tmp_path: Path) -> None:
    for step in (2, 8, 9):
        save_state(tmp_path, step, *pair(tiny_config), extra={"tokens": 100 * step})
    save(tmp_path, 3, pair(tiny_config))  # after a damage of 8 and 9 that made the run go on from 2
    assert (tmp_path / "step-000003").exists()


def test_what_a_kill_left_half_written_is_swept(tiny_config: ModelConfig, tmp_path: Path) -> None:
    save(tmp_path, 1, pair(tiny_config))
    (tmp_path / ".part-torn").mkdir()
    (tmp_path / ".part-torn" / "rank-0000.safetensors").write_bytes(b"half")
    load_state(tmp_path, *pair(tiny_config))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
