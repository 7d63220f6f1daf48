"""A user's own reinforcement learning: a run folder whose result is `model`."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from liaoyuan.checkpoint import load_model
from liaoyuan.config import Config, to_toml
from liaoyuan.data import Tokenizer
from liaoyuan.device import select_device
from liaoyuan.inference import require_exact
from liaoyuan.ops import configure
from liaoyuan.rundir import Report, atomic_folder, silent, write_atomic
from liaoyuan.tasks import Right, check_levels, find_task, spread
from liaoyuan.tasks.seen import Seen, read_seen, write_seen
from liaoyuan.tuning.recipe import ReinforceConfig
from liaoyuan.tuning.reinforce import reinforce
from liaoyuan.tuning.validation import Best


class RlConfig(Config):
    """`model` to begin with, the task, how to reinforce, and how many validation problems choose the checkpoint."""

    model: Path
    task: str = "addition"
    rl: ReinforceConfig = ReinforceConfig()
    validation_problems: int = Field(200, gt=0)
    device: str = "auto"
    ops: dict[str, str] = Field(default_factory=dict)  # kernels, where not those chosen
    exact: bool = False  # no run unless rollouts have training's bits; where no compiler is, that takes slower kernels


def run_rl(config: RlConfig, folder: Path, report: Report = silent) -> dict[str, Any]:
    """Reinforce and export the best checkpoint as `folder/model`; goes on from what is in `folder`.

    Raises:
        LiaoyuanError: the model is missing or wrong, the task is unknown or lacks a level, or the model is not exact
            and must be.
    """
    configure(config.ops)
    task, tokenizer = find_task(config.task), Tokenizer.load(config.model)
    check_levels(task, config.rl.levels, "rl.levels")
    write_atomic(folder / "config.toml", to_toml(config))
    problems = spread(task, 7, config.rl.levels, config.validation_problems, "validation")
    best = Best(tokenizer, config.model, Right(task), problems, folder, config.rl.max_tokens)
    model = load_model(config.model, device=select_device(config.device).torch)
    if config.exact:
        require_exact(model.eval())
    Seen(folder, config.model)
    done = reinforce(model, tokenizer, task, config.rl, folder, report, best)
    with atomic_folder(folder / "model") as part:
        shutil.copytree(best.model_folder, part, dirs_exist_ok=True)
        write_seen(part, read_seen(folder))
    figures = {name: value for name, value in asdict(done).items() if isinstance(value, int | float)}
    return figures | {"validation": best.value}
