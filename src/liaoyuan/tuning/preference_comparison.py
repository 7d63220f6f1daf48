"""What preference tuning did, measured on answers that it did not learn from, and on a task's test problems."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from liaoyuan.config import Config
from liaoyuan.data import Tokenizer
from liaoyuan.evaluation import bootstrap, measure_accuracy
from liaoyuan.inference import Engine
from liaoyuan.models import Decoder
from liaoyuan.models.lora import kept_adapters
from liaoyuan.rundir import Progress, Report
from liaoyuan.tasks import Right, Task, check_levels, find_task, held_out_problems
from liaoyuan.tuning.preference_batches import Judged
from liaoyuan.tuning.preference_objective import PreferenceLoss


class Questions(Config):
    """The section `[ask]`: test problems of a task that the models are asked before and after; no task, none."""

    task: str = ""
    levels: tuple[int, ...] = ()  # none: all that the task has
    problems: int = Field(500, gt=0)
    samples: int = Field(4, gt=0)  # of each, beside the greedy answer

    @property
    def chosen(self) -> tuple[Task, list[int]]:
        """The task and the levels that are asked.

        Raises:
            LiaoyuanError: there is no such task, or it lacks a level.
        """
        task = find_task(self.task)
        levels = list(self.levels or task.levels)
        check_levels(task, levels, "ask.levels")
        return task, levels


@dataclass(frozen=True)
class Judgement:
    """How a model judges held-out answers, given the sums of their log-probabilities [A]; before: of the model that
    tuning begins with.

    Of a pair, its accuracy is whether the better answer is the more probable one (a reward model: has the higher
    reward), and its margin by how many nats (by how much); a mean over tokens says the same of answers whose length
    does not count. What the loss takes for rewards is shown while it is trained.
    """

    settings: PreferenceLoss
    items: Sequence[Judged]
    before: Tensor

    def values(self, total: Tensor) -> dict[str, float]:
        """Return what is shown of a model in the metrics: accuracy and margin of the loss's rewards."""
        rewards = self.settings.rewards(total, self._sizes, self.before)
        good, bad = self._pairs(rewards)
        if not len(good):
            return {}
        return {
            "held_out_accuracy": float((good > bad).float().mean()),
            "held_out_margin": float((good - bad).mean()),
        }

    def outcomes(self, total: Tensor) -> dict[str, np.ndarray]:
        """Return accuracy and margin of each pair, [P]."""
        if self.settings.loss == "reward":
            good, bad = self._pairs(self.settings.rewards(total, self._sizes, self.before))
            return {"accuracy": (good > bad).double().numpy(), "margin": (good - bad).double().numpy()}
        good, bad = self._pairs(total)
        good_mean, bad_mean = self._pairs(total / self._sizes)
        return {
            "accuracy": (good > bad).double().numpy(),
            "accuracy_of_means": (good_mean > bad_mean).double().numpy(),
            "margin": (good - bad).double().numpy(),
        }

    @property
    def _sizes(self) -> Tensor:
        return torch.tensor([sum(answer.weights) for item in self.items for answer in item.answers])

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of the better and the worse answers of the items that are pairs."""
        both = [part for part in x.split([len(item.answers) for item in self.items]) if len(part) == 2]
        return tuple(torch.stack(both).unbind(1)) if both else (x[:0], x[:0])  # type: ignore[return-value]


def compare(
    judgement: Judgement,
    found: Mapping[str, Tensor],
    models: Mapping[str, Callable[[], Decoder]],
    tokenizer: Tokenizer,
    ask: Questions,
    report: Report,
) -> dict[str, Any]:
    """Return measures of each model with intervals, and paired differences of "model" to each of the others.

    found: of each model the log-probabilities of the held-out answers; models: what loads it.
    """
    outcomes = {name: judgement.outcomes(total) for name, total in found.items()}
    if ask.task:
        for name, load in models.items():
            outcomes[name] |= _of_task(name, load(), tokenizer, ask, report)
    measures = {
        name: {key: bootstrap(value[None]).to_dict() for key, value in of_one.items() if len(value)}
        for name, of_one in outcomes.items()
    }
    differences = {
        f"model - {name}": {
            key: bootstrap((value - of_one[key])[None]).to_dict()
            for key, value in outcomes["model"].items()
            if len(value)
        }
        for name, of_one in outcomes.items()
        if name != "model"
    }
    return {"held_out": len(judgement.items), **measures, **differences}


def _of_task(name: str, model: Decoder, tokenizer: Tokenizer, ask: Questions, report: Report) -> dict[str, np.ndarray]:
    """Return what a model reaches on a task's test problems, greedy and sampled."""
    task, levels = ask.chosen

    def tell(progress: Progress) -> None:
        report(replace(progress, text=f"{ask.task} asked of {name}"))

    problems = held_out_problems(task, levels, ask.problems)
    with torch.inference_mode(), kept_adapters(model):
        answers = measure_accuracy(Engine(model.eval()), tokenizer, Right(task), problems, ask.samples, report=tell)
    return {"greedy": answers.greedy.astype(float), "sampled": answers.sampled_mean}
