"""From judged answers to a policy: a reward model is trained, rewards rollouts, and is followed."""

from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from liaoyuan.cli.main import app
from liaoyuan.data import Message, Record, write_records
from liaoyuan.rundir import read_metrics
from liaoyuan.tasks import TASKS, Problem, Rollout
from liaoyuan.tasks.rewards.judged import ModelReward, RewardModelConfig
from liaoyuan.tuning.rollout_log import read_rollouts


def sets(*values: str) -> list[str]:
    return [part for value in ("device=cpu", *values) for part in ("--set", value)]


def run(*given: object) -> None:
    assert CliRunner().invoke(app, [*map(str, given)], catch_exceptions=False).exit_code == 0


def texts(model: Path, task: Path, out: Path, *more: str) -> list[list[str]]:
    """Reinforce for some steps; return the answers that were rolled out at each of them."""
    sizes = ("rl.levels=[1]", "rl.steps=12", "rl.problems=4", "rl.group=8", "rl.max_tokens=6", "rl.minimum_groups=1")
    few = ("validation_problems=2", "test_problems=0", "rl.learning_rate=4e-3", "rl.warmup_steps=0")
    run("tune", "rl", "--model", model, "--task", task, "--out", out, *sets(*sizes, *few, *more))
    return [[row["text"] for row in read_rollouts(path)] for path in sorted((out / "rollouts").iterdir())]


def said(question: str, text: str) -> tuple[Message, ...]:
    return Message(role="user", content=question), Message(role="assistant", content=text, think="1")


@pytest.fixture
def answering(model_folder: Path, tmp_path: Path) -> Path:
    """A model that has learned to answer sevens or crosses, as it happens."""
    records = [
        Record(id=f"{index}", messages=said(TASKS["addition"].problem(0, index, 1).question, "7x"[index % 2]))
        for index in range(40)
    ]
    write_records(tmp_path / "either.jsonl", records)
    settings = ("train.steps=60", "train.batch_tokens=256", "sequence_length=64", "train.learning_rate=1e-2")
    data = ("--data", tmp_path / "either.jsonl", "--out", tmp_path / "sft")
    run("tune", "sft", "--model", model_folder, *data, *sets(*settings, "validation_share=0.0"))
    return tmp_path / "sft" / "model"


def test_a_reward_model_is_trained_and_what_it_prefers_is_learned(
    answering: Path, model_folder: Path, tmp_path: Path
) -> None:
    """Its pairs prefer sevens to crosses; it says so of answers that it never saw, and the policy follows."""
    records = []
    for index in range(40):
        asked, good = said(TASKS["addition"].problem(0, index, 1).question, "7" * (1 + index % 3))
        bad = good.model_copy(update={"content": "x" * (1 + index % 3)})
        record = {"messages": (asked,), "chosen": (good,), "rejected": (bad,)}
        records.append(Record(id=f"{index}", kind="preference", **record))
    write_records(tmp_path / "pairs.jsonl", records)
    judged = tmp_path / "judge"
    settings = ("train.steps=12", "train.batch_tokens=384", "train.learning_rate=3e-3", "train.warmup_steps=0")
    data = ("--data", tmp_path / "pairs.jsonl", "--out", judged)
    run("tune", "reward", "--model", model_folder, *data, *sets(*settings, "sequence_length=96", "held_out_share=0.3"))
    reward = ModelReward(RewardModelConfig(path=judged / "model", device="cpu"))
    problem = Problem("addition", "9+9=?", "18", "", 1, "x")
    good, bad = (reward(Rollout(problem, "1", text)).value or 0.0 for text in ("7777", "xxxx"))
    assert reward.reading.thoughts and good > 0.5 > bad

    task = tmp_path / "task.toml"
    text = '[[parts]]\ntask = "addition"\nlevels = [1]\n[[rewards]]\nname = "model"\npath = "judge/model"\n'
    task.write_text(text + 'device = "cpu"\n')
    drawn = texts(answering, task, tmp_path / "rl")
    rows = read_metrics(tmp_path / "rl" / "metrics.jsonl")
    begin, end = (Counter(text for step in some for text in step) for some in (drawn[:1], drawn[-3:]))
    assert begin["7"] < 2 * begin["x"] and end["7"] > 4 * end["x"]
    assert sum(row["reward"] for row in rows[-3:]) / 3 > rows[0]["reward"] + 0.1
    lines = read_rollouts(tmp_path / "rl" / "rollouts" / "000000.jsonl.zst")
    assert all(line["reason"].startswith("reward ") and 0 < line["reward"] < 1 for line in lines if not line["flaw"])
    assert all(line["reward"] == 0 for line in lines if line["flaw"]) and rows[0]["unjudged"] == 0
    # Each process reads the model for itself: workers roll out the very same at first.
    assert texts(answering, task, tmp_path / "workers", "rl.workers=1")[0] == drawn[0]
