"""The page of a plan: a predicted step, the ranking that it is the best of, and what failures make of the job."""

from pathlib import Path
from typing import TYPE_CHECKING

from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.compute.plan import Cluster, Job, Prediction
    from liaoyuan.compute.plan.goodput import Goodput
    from liaoyuan.compute.plan.machine.profile import DeviceProfile
    from liaoyuan.compute.plan.search.search import Ranking
    from liaoyuan.training.pretrain import PretrainConfig

PAGE = "report.html"
LIVES = 500  # of the job among failures


def page_path(asked: Path | None, json: bool) -> Path | None:
    """Return where the page goes: where it was asked for, else here; None with JSON alone.

    Raises:
        LiaoyuanError: here is a page that is no plan's, such as a run's report.
    """
    if asked or json:
        return asked
    from liaoyuan.compute.plan.page import TITLE

    path = Path(PAGE)
    if path.exists() and f"<title>{TITLE.en}</title>" not in path.read_text(encoding="utf-8", errors="replace"):
        raise LiaoyuanError(f"{path} in this folder is another report: say where that of the plan goes, --report FILE.")
    return path


def write_page(
    path: Path,
    config: "PretrainConfig",
    job: "Job",
    cluster: "Cluster",
    profile: "DeviceProfile",
    found: "Prediction | None" = None,
    ranking: "Ranking | None" = None,
    quiet: bool = False,
) -> None:
    """Write the page; found: the prediction with details, made here if there is none.

    Raises:
        LiaoyuanError: the file cannot be written.
    """
    from liaoyuan.cli.progress import bar
    from liaoyuan.compute.plan.page import goodput_section, plan_page, ranking_section
    from liaoyuan.compute.plan.search.reasons import reasons
    from liaoyuan.compute.plan.step.predict import predict
    from liaoyuan.rundir import Progress, write_atomic

    if found is None:
        with bar("Page", quiet=quiet) as report:
            found = predict(job, cluster, profile, details=True)
            report(Progress(1, 1, "layout", job.resolved.describe()))
    sections = [ranking_section(ranking, reasons(ranking, profile))] if ranking else []
    sections.append(goodput_section(_among_failures(config, job, cluster, found)))
    told = (
        f"{job.model.num_parameters():,} weights, {job.processes:,} x {cluster.accelerator.name}, "
        f"{job.resolved.describe()}, {job.train.batch_tokens:,} tokens a step"
    )
    try:
        write_atomic(path, plan_page(told, found, sections).html())
    except OSError as error:
        raise LiaoyuanError(f"The page cannot be written to {path}: {error.strerror}.") from error
    if not quiet:
        print(f"Page: {path}")


def _among_failures(config: "PretrainConfig", job: "Job", cluster: "Cluster", found: "Prediction") -> "Goodput":
    from liaoyuan.compute.plan.goodput import Run, goodput
    from liaoyuan.compute.plan.goodput.state import state_bytes

    run = Run.of(config.train, config.checkpoint, found.step.seconds, job.processes, state_bytes(job.model, job.train))
    return goodput(run, cluster, LIVES)
