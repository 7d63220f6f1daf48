"""Rollouts by processes of their own: who does the work, and who dies doing it, changes no bit of the result."""

import os
import signal
import zlib
from pathlib import Path

import pytest
import torch

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.data import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, initialise
from liaoyuan.rundir import Progress, read_metrics
from liaoyuan.tasks import Rollout, Score
from liaoyuan.tuning import ReinforceConfig, reinforce
from liaoyuan.tuning.rollout_workers import WorkerRollouts
from tests.tuning.conftest import small_config
from tests.tuning.test_reinforce import CONFIG, EndSoon, weights
from tests.tuning.test_rl_rollouts import contents

STEPS = 8


class Coin:
    """Half of all texts are right, always the same ones."""

    name = "coin"

    def __call__(self, rollout: Rollout) -> Score:
        return Score(float(zlib.crc32(rollout.thought.encode()) % 2), rollout.thought)


class Refuses(Coin):
    """Cannot judge a problem of step 5."""

    def __call__(self, rollout: Rollout) -> Score:
        if rollout.problem.key == "27":
            raise LiaoyuanError("There is no judge today.")
        return super().__call__(rollout)


def config_of(workers: int) -> ReinforceConfig:
    new = {"workers": workers, "levels": (1, 2, 3), "steps": STEPS, "problems": 5, "checkpoint_every": 3}
    return CONFIG.model_copy(update=new | {"further_draws": 1, "minimum_groups": 1})


class Killing:
    """Kills what there is to kill when a step is done; `reinforce` tells no one of its workers."""

    def __init__(self, patch: pytest.MonkeyPatch, steps: tuple[int, ...]) -> None:
        self.steps, self.killed, self.sources = steps, 0, list[WorkerRollouts]()
        begin = WorkerRollouts.__init__

        def note(source: WorkerRollouts, *arguments: object) -> None:
            begin(source, *arguments)  # type: ignore[arg-type]
            self.sources.append(source)

        patch.setattr(WorkerRollouts, "__init__", note)

    def __call__(self, progress: Progress) -> None:
        if progress.done in self.steps:
            os.kill(self.sources[-1].pids[progress.done % 2], signal.SIGKILL)
            self.killed += 1


@pytest.fixture(scope="module")
def whole(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.Tensor]:
    """A run with one worker that nothing happened to: the model folder, the run folder, the weights."""
    folder = tmp_path_factory.mktemp("workers")
    tokenizer.save(folder / "tokenizer")
    save_model(initialise(Decoder(small_config(tokenizer)), seed=0), folder / "start", folder / "tokenizer")
    model = load_model(folder / "start")
    reinforce(model, tokenizer, EndSoon(), config_of(1), folder / "run", reward=Coin())
    return folder / "start", folder / "run", weights(model)


def test_rollouts_are_at_most_one_step_old_and_corrected_for_it(whole: tuple[Path, Path, torch.Tensor]) -> None:
    rows = read_metrics(whole[1] / "metrics.jsonl")
    assert [row["staleness"] for row in rows] == [0] + [1] * (STEPS - 1)
    assert all(row["corrected"] for row in rows[1:]) and rows[0]["corrected"] == (not rows[0]["exact"])
    gaps = [row["log_prob_gap"] for row in rows if "log_prob_gap" in row]
    assert len(gaps) == STEPS and min(gaps[1:]) > 1e-4
    assert gaps[0] == 0.0 or not rows[0]["exact"]  # the weights arrived with all their bits
    (note,) = (row for row in read_metrics(whole[1] / "findings.jsonl") if row["name"] == "corrected")
    assert "one step old: truncated importance weights are on" in note["what"]


def test_a_killed_worker_is_replaced_and_nothing_is_changed_nor_by_how_many_there_are(
    whole: tuple[Path, Path, torch.Tensor], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killing, model = Killing(monkeypatch, (3,)), load_model(whole[0])
    reinforce(model, tokenizer, EndSoon(), config_of(2), tmp_path / "run", killing, reward=Coin())
    assert killing.killed == 1 and killing.sources[0].replaced == 1
    assert torch.equal(weights(model), whole[2]) and contents(tmp_path / "run") == contents(whole[1])


def test_a_run_whose_reward_fails_says_so_and_goes_on_bit_for_bit(
    whole: tuple[Path, Path, torch.Tensor], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """What was under way at the state from which it goes on is rolled out again, on the weights of then."""
    with pytest.raises(LiaoyuanError, match="There is no judge today"):
        reinforce(load_model(whole[0]), tokenizer, EndSoon(), config_of(1), tmp_path / "run", reward=Refuses())
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 5
    model = load_model(whole[0])
    reinforce(model, tokenizer, EndSoon(), config_of(1), tmp_path / "run", reward=Coin())
    assert torch.equal(weights(model), whole[2]) and contents(tmp_path / "run") == contents(whole[1])
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["staleness"] for row in rows] == [0] + [1] * (STEPS - 1)


def test_a_reward_that_only_its_own_process_knows_is_refused(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    class Local(Coin):
        """Cannot be named from elsewhere."""

    with pytest.raises(LiaoyuanError, match=r"cannot be given to another process .*rl\.workers = 0"):
        reinforce(small_model, tokenizer, EndSoon(), config_of(1), tmp_path, reward=Local())
