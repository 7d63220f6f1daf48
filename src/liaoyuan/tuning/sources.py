"""Where rollouts come from: the training process itself, on the very weights that are trained.

`rollout_workers` has the other source, processes of their own; `reinforce` does not know which of the two it has.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from liaoyuan.data import Tokenizer
from liaoyuan.models import Decoder
from liaoyuan.models.lora import kept_adapters
from liaoyuan.tasks import Problem, Reward, Task
from liaoyuan.tuning.curriculum import Shares, draw_levels, level_weights
from liaoyuan.tuning.recipe import ReinforceConfig, sample_seed, sampling_of
from liaoyuan.tuning.rollout import Rollouts, join, roll_out
from liaoyuan.tuning.update import teaches
from liaoyuan.tuning.validation import tuning_engine


@dataclass(frozen=True)
class Drawn:
    """A step's rollouts, and the levels of their problems.

    cpu_seconds: that it took, over all processes. staleness: by how many steps the weights that made them are older
    than those that learn from them.
    """

    rollouts: Rollouts
    levels: list[int]
    cpu_seconds: float
    staleness: int = 0


class Source(Protocol):
    """Gives the rollouts of one step after another."""

    def draw(self, step: int, shares: Shares) -> Drawn: ...

    def save(self, folder: Path, step: int) -> None:
        """Write what a run that goes on from `step` needs beside its state."""
        ...

    def load(self, folder: Path, step: int) -> None: ...

    def close(self) -> None: ...


class LocalRollouts:
    """Rolls out in this process."""

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, task: Task, reward: Reward, config: ReinforceConfig
    ) -> None:
        self._model, self._engine = model, tuning_engine(model, config.max_tokens)
        self._tokenizer, self._task, self._reward, self._config = tokenizer, task, reward, config
        self._sampling = sampling_of(config, tokenizer)

    def draw(self, step: int, shares: Shares) -> Drawn:
        """Roll out a step's problems.

        With `further_draws`, groups that teach nothing are followed by others, until enough teach or it has been done
        so often (dynamic sampling: DAPO, arXiv 2503.14476, sec. 3.2).
        """
        begin, parts, levels = time.process_time(), list[Rollouts](), list[int]()
        for number in range(self._config.further_draws + 1):
            fresh = levels_of(self._config, step, number, shares, missing(parts, self._config))
            if not fresh:
                break
            parts.append(self.roll_out(step, number, len(levels), fresh))
            levels += fresh
        return Drawn(join(parts), levels, time.process_time() - begin)

    def roll_out(self, step: int, number: int, begin: int, levels: Sequence[int], first: int = 0) -> Rollouts:
        """Roll out problems `begin`, ... of a step, which are of these levels.

        number: of the draw; first: how many problems of this draw come before these.
        """
        config = self._config
        problems = problems_of(self._task, config, step, levels, begin)
        seed, sizes = sample_seed(config, step, number), (config.group, config.max_tokens)
        with kept_adapters(self._model):
            return roll_out(
                self._engine,
                self._tokenizer,
                self._reward,
                problems,
                sizes[0],
                seed,
                sizes[1],
                self._sampling,
                config.overlong_tokens,
                first,
            )

    def save(self, folder: Path, step: int) -> None:
        """Nothing is under way between two steps."""

    def load(self, folder: Path, step: int) -> None:
        """Nothing was."""

    def close(self) -> None:
        """Nothing is held."""


def missing(parts: Sequence[Rollouts], config: ReinforceConfig) -> int:
    """Return how many groups that teach are wanted beside those that are there."""
    return config.problems - sum(int(teaches(part, config).sum()) for part in parts)


def levels_of(config: ReinforceConfig, step: int, number: int, shares: Shares, count: int) -> list[int]:
    """Return the levels of the problems of a step's draw."""
    weights = level_weights(config.staging, shares, config.solved_between)
    name = f"levels/{config.seed}/{step}" + (f"/{number}" if number else "")
    return draw_levels(weights, config.levels, max(0, count), name)


def problems_of(task: Task, config: ReinforceConfig, step: int, levels: Sequence[int], begin: int = 0) -> list[Problem]:
    """Return the fresh training problems of a step from `begin` on, one of each of `levels`.

    Those of further draws, from `config.problems` on, follow all of the run's first ones.
    """
    found = []
    for place, level in enumerate(levels, begin):
        draw, number = divmod(place, config.problems)
        index = (draw * config.steps + step) * config.problems + number
        found.append(task.problem(config.seed, index, level, "train"))
    return found
