"""The best checkpoint: the model that a run starts from competes with what the run makes of it."""

from pathlib import Path

from liaoyuan.data import Tokenizer
from liaoyuan.models import Decoder
from liaoyuan.rundir import read_json, write_json
from liaoyuan.tasks import Right, find_task, spread
from liaoyuan.tuning.start import Start
from liaoyuan.tuning.validation import Best

ADDITION = Right(find_task("addition"))


def test_the_start_is_kept_where_nothing_better_comes(
    small_model: Decoder, tokenizer: Tokenizer, model_folder: Path, tmp_path: Path
) -> None:
    problems = spread(find_task("addition"), 7, (1,), 4, "validation")

    def best(name: str) -> Best:
        return Best(tokenizer, Start(model_folder), ADDITION, problems, tmp_path / name, max_tokens=4)

    first = best("first")
    first(small_model)
    write_json(tmp_path / "first" / "best.json", {"value": 0.5, "greedy": 0.5, "sampled": 0.5})
    second = best("second")
    second.begin_with(first.model_folder)
    second(small_model)  # a random model is right nowhere
    assert second.value == 0.5
    kept = [(folder / "model.safetensors").read_bytes() for folder in (first.model_folder, second.model_folder)]
    assert kept[0] == kept[1]


def test_a_start_that_was_not_measured_does_not_compete(
    tokenizer: Tokenizer, model_folder: Path, tmp_path: Path
) -> None:
    one = Best(tokenizer, Start(model_folder), ADDITION, [], tmp_path / "run", max_tokens=4)
    one.begin_with(model_folder)
    assert one.value == -1.0 and not one.model_folder.exists()


def test_a_resumed_run_does_not_begin_again(tokenizer: Tokenizer, model_folder: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "start" / "best.json", {"value": 0.1})
    write_json(tmp_path / "run" / "best.json", {"value": 0.9})
    Best(tokenizer, Start(model_folder), ADDITION, [], tmp_path / "run", 4).begin_with(tmp_path / "start" / "best")
    assert read_json(tmp_path / "run" / "best.json")["value"] == 0.9
