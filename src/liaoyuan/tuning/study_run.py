"""A user's own study: does reinforcement learning bring more than the same compute spent otherwise, seed by seed?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from liaoyuan.config import Config
from liaoyuan.rundir import Progress, Report, remember, silent, write_json
from liaoyuan.tuning.study import StudyConfig, study
from liaoyuan.tuning.summary import curves, summarise

FREE = ("seeds", "first_seed", "study.workers")  # on these the result of a seed does not depend


class StudyRunConfig(Config):
    """`model` to begin with, what a study does, and with how many seeds, the first of which is `first_seed`."""

    model: Path
    study: StudyConfig = StudyConfig()
    seeds: int = Field(3, gt=0)
    first_seed: int = Field(0, ge=0)


def run_study(
    config: StudyRunConfig, folder: Path, report: Report = silent, prepare: Callable[[], object] | None = None
) -> dict[str, Any]:
    """Run the study of each seed in `folder/seed-N`, going on from what is there; return and write `summary.json`.

    Raises:
        LiaoyuanError: the folder holds a study with other settings.
    """
    remember(config, folder, has_begun=True, free=FREE)
    studies = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):

        def tell(progress: Progress, seed: int = seed) -> None:
            done, text = 1000 * (seed - config.first_seed) + progress.done, f"seed {seed}, {progress.text}"
            note = f"seed {seed}: {progress.note}" if progress.note else ""
            report(Progress(done, 1000 * config.seeds, progress.unit, text, note=note))

        studies.append(study(config.study.with_seed(seed), config.model, folder / f"seed-{seed}", tell, prepare))
    summary = summarise(studies) | {"metrics": {"rl": curves(folder, studies, "rl")}}
    write_json(folder / "summary.json", summary)
    return summary
