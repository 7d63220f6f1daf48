"""What is rolled out: who may be judged, what long answers cost, what is drawn again, and what is kept."""

import itertools
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from liaoyuan.checkpoint import load_model
from liaoyuan.data import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder
from liaoyuan.rundir import Progress, read_metrics
from liaoyuan.runs import Curves, Folder
from liaoyuan.tasks import Right, Rollout, Score, find_task
from liaoyuan.training import Stopped
from liaoyuan.tuning import ReinforceConfig, reinforce
from liaoyuan.tuning.curriculum import fresh_shares
from liaoyuan.tuning.rollout import Rollouts, join, overlong_penalty, roll_out
from liaoyuan.tuning.rollout_log import RolloutLog, read_rollouts
from liaoyuan.tuning.sources import LocalRollouts
from liaoyuan.tuning.update import lesson_of
from liaoyuan.tuning.validation import tuning_engine
from tests.tuning.test_reinforce import CONFIG, EndSoon, rewarding_even, weights
from tests.verbs import Verb

FIELDS = [
    "step",
    "group",
    "sample",
    "problem",
    "task",
    "level",
    "question",
    "gold",
    "thought",
    "text",
    "flaw",
    "reward",
    "parsed",
    "reason",
    "tokens",
    "advantage",
]


class Judge:
    """The reward "value of this rollout", from a list that is used up."""

    name = "judge"

    def __init__(self, values: list[float | None]) -> None:
        self.values = values

    def __call__(self, rollout: Rollout) -> Score:
        return Score(self.values.pop(0), rollout.text, "said so")


def rolled(model: Decoder, tokenizer: Tokenizer, values: list[list[float | None]]) -> Rollouts:
    problems = [EndSoon().problem(0, place, 1) for place in range(len(values))]
    judge = Judge([value for row in values for value in row])
    return roll_out(tuning_engine(model, 4), tokenizer, judge, problems, len(values[0]), 3, 4)


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo"])
def test_what_cannot_be_judged_leaves_its_group(small_model: Decoder, tokenizer: Tokenizer, advantage: Any) -> None:
    values = [[1.0, None, 0.0, None], [None, None, None, 1.0], [0.0, 1.0, 1.0, 0.0], [None] * 4, [1.0, 0.0, None, 0.0]]
    config = CONFIG.model_copy(update={"update_group": 4, "advantage": advantage})
    rollouts = rolled(small_model, tokenizer, values)
    lesson = lesson_of(rollouts, config)
    assert lesson.groups.tolist() == [True, False, True, False, True]  # one that was judged has nobody to compare with
    assert torch.equal(lesson.samples[lesson.groups], rollouts.judged[lesson.groups])
    assert not lesson.samples[~lesson.groups].any() and not lesson.advantages[~lesson.samples].any()
    alone = rolled(small_model, tokenizer, [[1.0, 0.0]])
    expected = lesson_of(alone, config).advantages[0]
    assert torch.equal(lesson.advantages[0][rollouts.judged[0]], expected) and expected[0] == -expected[1] > 0
    torch.testing.assert_close(lesson.advantages.sum(1), torch.zeros(5))


def test_reinforce_plus_plus_compares_with_the_whole_batch(small_model: Decoder, tokenizer: Tokenizer) -> None:
    config = CONFIG.model_copy(update={"advantage": "reinforce_pp", "update_group": 2})
    lesson = lesson_of(rolled(small_model, tokenizer, [[1.0, 1.0], [0.0, 0.0], [None, 1.0]]), config)
    assert lesson.groups.all() and lesson.samples.sum() == 5
    assert lesson.advantages[0, 0] == lesson.advantages[2, 1] > 0 > lesson.advantages[1, 0]
    torch.testing.assert_close(lesson.advantages.sum(), torch.tensor(0.0))


def test_a_run_counts_what_was_not_judged_and_learns_from_the_rest(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarding_even(monkeypatch)

    class Third:
        """Gives no value to every third answer, and else what is right."""

        name, calls = "third", 0

        def __call__(self, rollout: Rollout) -> Score:
            self.calls += 1
            return Score(None, None, "timeout") if self.calls % 3 == 0 else Right(EndSoon())(rollout)

    config = CONFIG.model_copy(update={"steps": 40, "learning_rate": 1e-2, "max_tokens": 1})
    reinforce(small_model, tokenizer, EndSoon(), config, tmp_path, reward=Third())
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert all(row["unjudged"] == pytest.approx(1 / 3, abs=0.04) for row in rows)
    assert rows[0]["reward"] < 0.7 and sum(row["reward"] for row in rows[-5:]) / 5 > 0.8
    lines = read_rollouts(tmp_path / "rollouts" / "000000.jsonl.zst")
    nothing = [line for line in lines if line["reward"] is None]
    assert len(nothing) == 10 and {line["reason"] for line in nothing} == {"timeout"}
    assert all(line["advantage"] is None for line in nothing)


def test_long_answers_cost_reward_by_their_last_tokens() -> None:
    found = overlong_penalty(torch.tensor([1, 12, 13, 14, 16, 20]), 16, 4)
    assert found.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_groups_without_signal_are_followed_by_others(
    small_model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only problems of odd index can be answered right, so that every second group teaches nothing."""
    rewarding_even(monkeypatch)

    class Odd(EndSoon):
        def check(self, problem: Any, text: str) -> Score:
            return Score(float(text == "x" and int(problem.key) % 2), text)

    config = CONFIG.model_copy(update={"further_draws": 6, "group": 8, "problems": 8, "max_tokens": 1})
    source = LocalRollouts(small_model, tokenizer, Odd(), Right(Odd()), config)
    for step in range(3):
        drawn = source.draw(step, fresh_shares(config.levels))
        rollouts, levels = drawn.rollouts, drawn.levels
        taught = lesson_of(rollouts, config).groups
        assert len(levels) == len(rollouts.problems) > 8 and taught.sum() >= 8
        keys = [int(problem.key) for problem in rollouts.problems]
        assert len(set(keys)) == len(keys) and set(keys[:8]) == set(range(8 * step, 8 * step + 8))
    bounded = LocalRollouts(
        small_model, tokenizer, Odd(), Judge([0.0] * 1000), config.model_copy(update={"further_draws": 2})
    )
    assert len(bounded.draw(0, fresh_shares(config.levels)).levels) == 3 * 8


def test_joined_draws_are_as_one(small_model: Decoder, tokenizer: Tokenizer) -> None:
    first, second = rolled(small_model, tokenizer, [[1.0, 0.0]]), rolled(small_model, tokenizer, [[0.5, None]] * 2)
    both = join([first, second])
    assert both.rewards.tolist() == [[1.0, 0.0], [0.5, 0.0], [0.5, 0.0]] and both.group == 2
    assert both.judged.tolist() == [[True, True], [True, False], [True, False]]
    assert both.generated_tokens == first.generated_tokens + second.generated_tokens


def test_every_rollout_of_every_step_is_kept_as_a_line(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarding_even(monkeypatch)
    reinforce(small_model, tokenizer, EndSoon(), CONFIG, tmp_path)
    files = sorted((tmp_path / "rollouts").iterdir())
    assert [file.name for file in files] == [f"{step:06d}.jsonl.zst" for step in range(6)]
    lines = read_rollouts(files[3])
    assert [(line["group"], line["sample"]) for line in lines] == [(place // 8, place % 8) for place in range(32)]
    assert all(list(line) == FIELDS and line["step"] == 3 for line in lines)
    row = read_metrics(tmp_path / "metrics.jsonl")[3]
    assert sum(line["reward"] for line in lines) / 32 == row["reward"]
    assert sum(line["tokens"] for line in lines) / 32 == row["length"]
    learned = [line["advantage"] for line in lines if line["advantage"] is not None]
    assert learned and sum(learned) == pytest.approx(0.0, abs=1e-4)
    counts = itertools.accumulate(sum(line["tokens"] for line in read_rollouts(file)) for file in files)
    curve = Curves(Folder(tmp_path)).follow().curve("reward", "tokens")  # the console draws over what was generated
    assert curve.x == list(counts) and len(curve.y) == 6


def test_a_text_with_the_line_ends_of_unicode_is_read_as_it_was_written(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rollouts = rolled(small_model, tokenizer, [[1.0, 0.0]])
    rollouts.answers[0] = replace(rollouts.answers[0], text="one\u2028two\x85three\x0bfour")
    RolloutLog(tmp_path, 1, 2**20).write(0, rollouts, None)
    lines = read_rollouts(tmp_path / "rollouts" / "000000.jsonl.zst")
    assert lines[0]["text"] == rollouts.answers[0].text and len(lines) == len(rollouts.answers)


def test_rollouts_are_kept_as_often_and_as_much_as_is_asked_for(
    tmp_path: Path, small_model: Decoder, tokenizer: Tokenizer
) -> None:
    rollouts = rolled(small_model, tokenizer, [[1.0, 0.0]])
    log = RolloutLog(tmp_path / "a", every=3, most=2**20)
    for step in range(7):
        log.write(step, rollouts, None)
    assert sorted(path.name[:6] for path in log.folder.iterdir()) == ["000000", "000003", "000006"]
    size = next(log.folder.iterdir()).stat().st_size
    small = RolloutLog(tmp_path / "b", every=1, most=3 * size + size // 2)
    for step in range(7):
        small.write(step, rollouts, None)
    assert sorted(path.name[:6] for path in small.folder.iterdir()) == ["000004", "000005", "000006"]
    again = RolloutLog(tmp_path / "b", every=1, most=3 * size + size // 2, resume_from=5)  # of a run that went further
    assert [path.name[:6] for path in again.folder.iterdir()] == ["000004"]
    RolloutLog(tmp_path / "c", every=0, most=2**20).write(0, rollouts, None)
    assert not (tmp_path / "c" / "rollouts").exists()


def contents(folder: Path) -> dict[str, bytes]:
    kept = {path.name: path.read_bytes() for path in (folder / "rollouts").iterdir()}
    return kept | {"findings": (folder / "findings.jsonl").read_bytes()}


def test_a_killed_run_leaves_the_same_rollouts_and_findings_byte_for_byte(
    model_folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by -9 in a process of its own, at a step that no state holds; with draws and levels that hang on state."""
    program = (
        "import os, signal, sys, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from liaoyuan.checkpoint import load_model; from liaoyuan.data import Tokenizer\n"
        "from liaoyuan.tasks import find_task; from liaoyuan.tuning import ReinforceConfig, reinforce\n"
        "import liaoyuan.tuning.rollout as rollout; from tests.tuning.test_reinforce import even_is_right\n"
        "rollout.read_rollout = even_is_right\n"
        "start, folder, config = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]\n"
        "def report(p):\n    if p.done == 15: os.kill(os.getpid(), signal.SIGKILL)\n"
        "reinforce(load_model(start), Tokenizer.load(start), find_task('addition'),"
        " ReinforceConfig.model_validate_json(config), folder, report)\n"
    )
    new = {"levels": (1, 2, 3), "steps": 18, "checkpoint_every": 4, "staging": "bounds", "further_draws": 2, "top_k": 9}
    config = CONFIG.model_copy(update=new | {"group": 4, "update_group": 2})
    arguments = [str(model_folder), str(tmp_path / "killed"), config.model_dump_json()]
    assert Verb(*arguments, program=program).wait(300) == -9
    assert len(list((tmp_path / "killed/rollouts").iterdir())) == 15
    models = {}
    rewarding_even(monkeypatch)
    for name in ("killed", "whole"):
        models[name] = load_model(model_folder)
        reinforce(models[name], tokenizer, find_task("addition"), config, tmp_path / name)
    assert torch.equal(weights(models["killed"]), weights(models["whole"]))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "whole")) == 19


def test_ctrl_c_saves_the_state_and_says_how_to_go_on(
    model_folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarding_even(monkeypatch)

    def interrupt(progress: Progress) -> None:
        if progress.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    config, first = CONFIG.model_copy(update={"checkpoint_every": 100}), load_model(model_folder)
    with pytest.raises(Stopped, match="Stopped after step 4 of 6; the same command goes on from there"):
        reinforce(first, tokenizer, EndSoon(), config, tmp_path / "stopped", interrupt)
    resumed, whole = load_model(model_folder), load_model(model_folder)
    begun = list[int]()
    reinforce(resumed, tokenizer, EndSoon(), config, tmp_path / "stopped", lambda progress: begun.append(progress.done))
    reinforce(whole, tokenizer, EndSoon(), config, tmp_path / "whole")
    assert begun == [5, 6] and torch.equal(weights(resumed), weights(whole))
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_how_much_is_kept_may_change_when_a_run_goes_on_and_nothing_else(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    reinforce(small_model, tokenizer, EndSoon(), CONFIG, tmp_path, until=2)
    again = CONFIG.model_copy(update={"keep_rollouts_every": 2, "keep_rollouts_mb": 1})
    reinforce(small_model, tokenizer, EndSoon(), again, tmp_path)
    assert len(list((tmp_path / "rollouts").iterdir())) == 4
    with pytest.raises(LiaoyuanError, match="staging = signal, not none"):
        reinforce(small_model, tokenizer, EndSoon(), CONFIG.model_copy(update={"staging": "none"}), tmp_path)


def test_the_config_of_an_older_run_is_read() -> None:
    assert ReinforceConfig.model_validate({"normalise": False}).advantage == "dr_grpo"
    assert ReinforceConfig.model_validate({"normalise": True}) == ReinforceConfig()
