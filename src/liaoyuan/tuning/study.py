"""Steps 3 and 4 of the quickstart for one seed: teach to think, and measure it against controls of the same compute.

From one model: SFT on few worked solutions (fast and slow in one model), RL on fresh problems, and from the very SFT
checkpoint two controls (see `controls`). RL and each control choose one of three learning rates in the same way: every
rate runs a share `trial` of the budget, the best on validation runs whole, and its best checkpoint on validation is
what is measured. The same SFT and RL from random weights are measured beside it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from liaoyuan.config import Config
from liaoyuan.rundir import Progress, Report, silent, write_json
from liaoyuan.training import TrainConfig
from liaoyuan.tuning.controls import Prices, control_tokens, own_samples_tokens
from liaoyuan.tuning.jobs import Job, run_jobs
from liaoyuan.tuning.reinforce import ReinforceConfig, ReinforceResult
from liaoyuan.tuning.stages import (
    VALIDATIONS,
    Lesson,
    draw_own_samples,
    measure,
    tune_reinforced,
    tune_supervised,
)

WEIGHT_DECAY = 0.3  # of SFT and the controls: what few solutions teach generalises better, and stays open to RL

# Shares of the whole that the parts take, for the progress line (measured).
SHARES = {"sft": 0.1, "rl trials": 0.13, "rl": 0.22, "control trials": 0.18, "controls": 0.2, "measuring": 0.17}


class StudyConfig(Config):
    """Everything that a study does is fixed here in counts; no clock is read."""

    lesson: Lesson = Lesson()
    rl: ReinforceConfig = ReinforceConfig()
    sft_steps: int = Field(200, gt=0)
    sft_learning_rate: float = Field(30e-3, gt=0)
    batch_tokens: int = Field(1024, gt=0)  # of one step of SFT and of the controls, which all use Muon
    rl_learning_rates: tuple[float, ...] = (5e-4, 8e-4, 1.2e-3)
    control_learning_rates: tuple[float, ...] = (8e-3, 16e-3, 32e-3)
    prices: Prices = Prices()  # from which the controls' budgets follow
    trial: float = Field(0.15, gt=0, le=1)
    scratch: bool = True  # whether the same is done from random weights
    workers: int = Field(2, ge=0)  # processes at once; results do not depend on it

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
    rl = steps.reinforced(sft, scratch)
    controls = steps.controls(sft, rl)
    found = {"sft": sft, **rl, **controls}
    result = {"stages": found, "measured": steps.measured(found)}
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

    def reinforced(self, sft: dict[str, Any], scratch: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
        """Choose RL's learning rate, run it whole; beside it draw control B's samples and run RL from scratch."""
        rates = self.config.rl_learning_rates
        until = max(1, round(self.config.trial * self.config.rl.steps))
        own = self._job("own_samples", draw_own_samples, rl=self.config.rl, start=sft["model"])
        trials = [self._rl(f"rl/{number}", "trial", sft, rate, until) for number, rate in enumerate(rates)]
        drawn, *tried = self._run("rl trials", [own, *trials])
        best = _best(tried)
        jobs = [self._rl(f"rl/{best}", "whole", sft, rates[best])]
        if scratch:
            jobs.append(self._rl("scratch_rl", "whole", scratch, rates[best]))
        found = dict(zip(("rl", "scratch"), self._run("rl", jobs), strict=False))
        return {"rl": found.pop("rl"), "own_samples": drawn, **found}

    def controls(self, sft: dict[str, Any], rl: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Choose each control's learning rate and run it whole, with budgets that follow from what RL did."""
        spent = ReinforceResult(**{key: rl["rl"][key] for key in ReinforceResult.__dataclass_fields__})
        drawn = rl["own_samples"]["generated_tokens"]
        prices = self.config.prices
        budgets = {
            "control": control_tokens(spent, prices),
            "control_own_samples": own_samples_tokens(spent, drawn, prices),
        }
        samples = {"control": "", "control_own_samples": rl["own_samples"]["samples"]}
        if not rl["own_samples"]["records"]:
            samples["control_own_samples"] = ""  # nothing was right: the worked solutions are all there is
        rates = self.config.control_learning_rates
        trials = [
            self._control(name, f"trial-{number}", sft, rate, self.config.trial * budgets[name], samples[name])
            for name in budgets
            for number, rate in enumerate(rates)
        ]
        tried = self._run("control trials", trials)
        chosen = {name: _best(tried[place * len(rates) :][: len(rates)]) for place, name in enumerate(budgets)}
        wholes = [
            self._control(name, "whole", sft, rates[chosen[name]], budgets[name], samples[name]) for name in budgets
        ]
        return dict(zip(budgets, self._run("controls", wholes), strict=True))

    def measured(self, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Measure the models on the test problems; "fast" is the RL model answering without a thought."""
        names = [name for name in ("sft", "rl", "control", "control_own_samples", "scratch") if name in found]
        jobs = [self._job(f"measured/{name}", measure, model=found[name]["model"]) for name in names]
        jobs.append(self._job("measured/fast", measure, model=found["rl"]["model"], thinking=False))
        return dict(zip([*names, "fast"], self._run("measuring", jobs), strict=True))

    def _rl(self, name: str, part: str, start: dict[str, Any], rate: float, until: int | None = None) -> Job:
        run = str(self.folder / name)
        arguments = {"rl": self._rl_config(rate), "start": start["model"], "run": run, "until": until}
        return self._job(f"{name}/{part}", tune_reinforced, **arguments)

    def _control(self, name: str, part: str, sft: dict[str, Any], rate: float, tokens: float, samples: str) -> Job:
        train = self._train(max(1, round(tokens / self.config.batch_tokens)), rate)
        return self._job(f"{name}/{part}", tune_supervised, train=train, start=sft["model"], samples=samples)

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


def _best(results: Sequence[dict[str, Any]]) -> int:
    """Return which result is best on validation, the first of equals."""
    return max(range(len(results)), key=lambda number: (results[number]["value"], -number))
