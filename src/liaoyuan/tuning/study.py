"""Steps 3 and 4 of the quickstart for one seed: teach to think, and measure it against controls of the same compute.

From one model: SFT on few worked solutions (fast and slow in one model), RL on fresh problems, and from the very SFT
checkpoint two controls (see `controls`). RL and each control choose one of three learning rates in the same way: every
rate runs a share `trial` of the budget, the best on validation runs whole, and its best checkpoint on validation is
what is measured. The same SFT and RL from random weights are measured beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from liaoyuan.config import Config
from liaoyuan.rundir import Progress, Report, silent, write_json
from liaoyuan.training import TrainConfig
from liaoyuan.tuning.controls import Prices, control_tokens, own_samples_tokens
from liaoyuan.tuning.jobs import Job, run_jobs
from liaoyuan.tuning.recipe import ReinforceConfig
from liaoyuan.tuning.reinforce import result_of
from liaoyuan.tuning.stages import (
    VALIDATIONS,
    Lesson,
    draw_own_samples,
    measure,
    tune_reinforced,
    tune_supervised,
)
from liaoyuan.tuning.start_check import look_at_start
from liaoyuan.tuning.task_studies import filled_in

WEIGHT_DECAY = 0.3  # of SFT and the controls: what few solutions teach generalises better, and stays open to RL

# Shares of the whole that the parts take, for the progress line (measured).
SHARES = {
    "sft": 0.15,
    "start": 0.01,
    "rl trials": 0.12,
    "rl": 0.22,
    "control trials": 0.1,
    "controls": 0.16,
    "last control": 0.16,
    "measuring": 0.08,
}


class StudyConfig(Config):
    """Everything that a study does is fixed here in counts; no clock is read.

    What is not given is as it suits the task (see `task_studies`), else as it stands here.
    """

    lesson: Lesson = Lesson()
    rl: ReinforceConfig = ReinforceConfig()
    sft_steps: int = Field(350, gt=0)
    sft_learning_rate: float = Field(20e-3, gt=0)
    batch_tokens: int = Field(1024, gt=0)  # of one step of SFT and of the controls, which all use Muon
    rl_learning_rates: tuple[float, ...] = (5e-4, 8e-4, 1.2e-3)
    control_learning_rates: tuple[float, ...] = (4e-3, 8e-3, 16e-3)
    prices: Prices = Prices()  # from which the controls' budgets follow
    trial: float = Field(0.15, gt=0, le=1)
    scratch: bool = True  # whether the same is done from random weights
    workers: int = Field(2, ge=0)  # processes at once; results do not depend on it

    @model_validator(mode="before")
    @classmethod
    def _suited(cls, values: Any) -> Any:
        return filled_in(values) if isinstance(values, dict) else values

    def with_seed(self, seed: int) -> "StudyConfig":
        lesson = self.lesson.model_copy(update={"seed": seed})
        return self.model_copy(update={"lesson": lesson, "rl": self.rl.model_copy(update={"seed": seed})})


def study(
    config: StudyConfig,
    start: Path,
    folder: Path,
    report: Report = silent,
    prepare: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Run the study of one seed in `folder`, from the model folder `start`; return what `folder/study.json` holds.

    The model that thinks is the folder `models.rl` of the result. `report` is told thousandths of the whole;
    `prepare` sets up each worker process. Killed and started again it goes on, with the same result.
    """
    steps = _Steps(config, start, folder, report, prepare)
    sft, scratch = steps.supervised()
    start_check = steps.looked_at(sft)
    rl = steps.reinforced(sft, scratch)
    controls = steps.controls(sft, rl)
    found = {"sft": sft, **rl, **controls}
    result = {"stages": found, "start": start_check, "measured": steps.measured(found)}
    write_json(folder / "study.json", result)
    return result


class _Steps:
    """The parts of a study in their order; each starts its jobs and waits for them."""

    def __init__(
        self,
        config: StudyConfig,
        start: Path,
        folder: Path,
        report: Report,
        prepare: Callable[[], object] | None,
    ) -> None:
        self.config, self.start, self.folder = config, start, folder
        self.report, self.prepare = report, prepare
        self.shared = {"lesson": config.lesson}

    def supervised(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Fine-tune the model and, if it is asked for, the same shape from random weights."""
        train = self._train(self.config.sft_steps, self.config.sft_learning_rate)
        names = {"sft": False} | ({"scratch_sft": True} if self.config.scratch else {})
        jobs = [
            self._job(name, tune_supervised, train=train, start=str(self.start), fresh=fresh)
            for name, fresh in names.items()
        ]
        results = self._run("sft", jobs)
        return results[0], results[1] if self.config.scratch else None

    def looked_at(self, sft: dict[str, Any]) -> dict[str, Any]:
        """Say whether SFT has left RL something to choose, before minutes are spent on it."""
        found = self._run("start", [self._job("start", look_at_start, start=sft["model"])])[0]
        if found["finding"]:
            done = round(1000 * (SHARES["sft"] + SHARES["start"]))
            self.report(Progress(done, 1000, "‰", "start", note=found["finding"]))
        return found

    def reinforced(self, sft: dict[str, Any], scratch: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
        """Choose RL's learning rate and run it whole; the same rate is used from random weights beside it."""
        rates = self.config.rl_learning_rates
        until = max(1, round(self.config.trial * self.config.rl.steps))
        trials = [self._rl(f"rl/{number}", "trial", sft, rate, until) for number, rate in enumerate(rates)]
        best = _best(self._run("rl trials", trials))
        jobs = [self._rl(f"rl/{best}", "whole", sft, rates[best])]
        if scratch:
            jobs.append(self._rl("scratch_rl", "whole", scratch, rates[best]))
        return dict(zip(("rl", "scratch"), self._run("rl", jobs), strict=False))

    def controls(self, sft: dict[str, Any], rl: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Choose each control's learning rate and run it whole, with budgets that follow from what RL did.

        Control B learns from its own answers to the problems that RL drew, so it begins after RL. Models that are
        ready are measured meanwhile, so that no worker waits.
        """
        spent, prices = result_of(rl["rl"]), self.config.prices
        ready = {"sft": sft, **rl}
        own = self._job("own_samples", draw_own_samples, rl=self.config.rl, start=sft["model"], drawn=spent.drawn)
        more = _Control("control", sft, control_tokens(spent, prices), "")
        drawn, *tried = self._run("control trials", [own, *self._trials(more)])
        samples = drawn["samples"] if drawn["records"] else ""  # nothing was right: worked solutions are all there is
        tokens = own_samples_tokens(spent, drawn["generated_tokens"], prices)
        learned = _Control("control_own_samples", sft, tokens, samples)
        jobs = [self._whole(more, _best(tried)), *self._trials(learned), *self._measurements(ready, ["sft"])]
        result, *tried = self._run("controls", jobs)
        tried = tried[: len(self.config.control_learning_rates)]
        jobs = [self._whole(learned, _best(tried)), *self._measurements(ready, ["rl", "fast", "scratch"])]
        return {"own_samples": drawn, "control": result, "control_own_samples": self._run("last control", jobs)[0]}

    def measured(self, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Measure the models on the test problems; "fast" is the RL model answering without a thought."""
        names = ["sft", "rl", "control", "control_own_samples", *(["scratch"] if "scratch" in found else []), "fast"]
        return dict(zip(names, self._run("measuring", self._measurements(found, names)), strict=True))

    def _measurements(self, found: dict[str, dict[str, Any]], names: Sequence[str]) -> list[Job]:
        models = {name: found[name]["model"] for name in names if name in found}
        models |= {"fast": found["rl"]["model"]} if "fast" in names else {}
        return [
            self._job(f"measured/{name}", measure, model=model, thinking=name != "fast")
            for name, model in models.items()
        ]

    def _trials(self, control: "_Control") -> list[Job]:
        rates, budget = self.config.control_learning_rates, self.config.trial * control.tokens
        return [self._control(control, f"trial-{place}", rate, budget) for place, rate in enumerate(rates)]

    def _whole(self, control: "_Control", best: int) -> Job:
        return self._control(control, "whole", self.config.control_learning_rates[best], control.tokens)

    def _control(self, control: "_Control", part: str, rate: float, tokens: float) -> Job:
        train = self._train(max(1, round(tokens / self.config.batch_tokens)), rate)
        return self._job(
            f"{control.name}/{part}",
            tune_supervised,
            train=train,
            start=control.start["model"],
            samples=control.samples,
        )

    def _rl(self, name: str, part: str, start: dict[str, Any], rate: float, until: int | None = None) -> Job:
        run = str(self.folder / name)
        arguments = {"rl": self._rl_config(rate), "start": start["model"], "run": run, "until": until}
        return self._job(f"{name}/{part}", tune_reinforced, **arguments)

    def _rl_config(self, rate: float) -> ReinforceConfig:
        return self.config.rl.model_copy(update={"learning_rate": rate})

    def _train(self, steps: int, rate: float) -> TrainConfig:
        return TrainConfig(
            steps=steps,
            batch_tokens=self.config.batch_tokens,
            learning_rate=rate,
            warmup_steps=min(20, steps // 10),
            weight_decay=WEIGHT_DECAY,
            optimiser="muon",
            seed=self.config.lesson.seed,
            checkpoint_every=100,
            evaluate_every=max(1, steps // VALIDATIONS),
        )

    def _job(self, name: str, work: Callable[..., dict[str, Any]], **arguments: Any) -> Job:
        return Job(name, self.folder / name, work, self.shared | arguments)

    def _run(self, part: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        before = sum(share for name, share in SHARES.items() if list(SHARES).index(name) < list(SHARES).index(part))

        def tell(progress: Progress) -> None:
            done = before + SHARES[part] * progress.done / progress.total
            self.report(Progress(round(1000 * done), 1000, "‰", progress.text))

        return run_jobs(jobs, self.config.workers, tell, self.prepare)


@dataclass(frozen=True)
class _Control:
    """A control: the SFT result from which it starts, tokens that it trains on, and the file of samples it learns
    ("": the worked solutions).
    """

    name: str
    start: dict[str, Any]
    tokens: int
    samples: str


def _best(results: Sequence[dict[str, Any]]) -> int:
    """Return which result is best on validation, the first of equals."""
    return max(range(len(results)), key=lambda number: (results[number]["value"], -number))
