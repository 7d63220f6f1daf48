"""`liaoyuan launch`: another verb on many processes and hosts, restarted by itself when some of them are lost."""

import contextlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liaoyuan.cli.process import ProcessSettings, available_cores, importing
from liaoyuan.errors import LiaoyuanError, nearest

if TYPE_CHECKING:
    from liaoyuan.compute import LaunchConfig

LOGS = "logs"
RENDEZVOUS = "rendezvous"
FILE_OPTIONS = ("slurm", "kubernetes", "accelerator", "image", "claim", "arguments")  # not options of the job itself


def launch(
    context: typer.Context,
    arguments: Annotated[
        list[str], typer.Argument(metavar="VERB ...", help="train, or tune sft, dpo or reward, with its options.")
    ],
    nproc: Annotated[str, typer.Option(help="Processes of this host: a number, a range 2:4, or auto.")] = "auto",
    nnodes: Annotated[str, typer.Option(help="Hosts that run together: a number, or a range 1:4.")] = "1",
    rendezvous: Annotated[
        Path | None, typer.Option(help="Folder where the hosts meet; all must share it (default: the run folder).")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Where other hosts reach this one.")] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Tries that come no further, before giving up.")] = 3,
    hang_timeout: Annotated[float, typer.Option(min=0, help="Seconds without a step: hung (0: never).")] = 600.0,
    lost_after: Annotated[float, typer.Option(min=2, help="Seconds without a sign of life: host lost.")] = 30.0,
    join_timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for other hosts.")] = 600.0,
    slurm: Annotated[Path | None, typer.Option(help="Write this Slurm script instead of running.")] = None,
    kubernetes: Annotated[Path | None, typer.Option(help="Write this manifest instead of running.")] = None,
    accelerator: Annotated[str | None, typer.Option(help="Scheduler's name of the card per process.")] = None,
    image: Annotated[str, typer.Option(help="Kubernetes: container image.")] = "liaoyuan:latest",
    claim: Annotated[str, typer.Option(help="Kubernetes: volume claim with corpus and runs.")] = "liaoyuan",
) -> None:
    """Run a verb on many processes and hosts; go on by itself when one dies, hangs or is lost."""
    with importing():
        from liaoyuan.compute import LaunchConfig
        from liaoyuan.compute import launch as run

    _refuse_endpoint(rendezvous)
    hosts = parse_range("--nnodes", nnodes)
    given = None if nproc == "auto" else parse_range("--nproc", nproc)
    verb = resolve(arguments)
    processes = given or _automatic(planned=bool(slurm or kubernetes))
    _refuse_illegal(verb.legal, hosts, processes)
    if slurm or kubernetes:
        _write_jobs(context, verb, arguments, processes[1], hosts[1])
        return
    _share_threads(context.obj, processes[1])
    config = LaunchConfig(
        processes=processes,
        logs=verb.out / LOGS,
        hosts=hosts,
        rendezvous=(rendezvous or verb.out / RENDEZVOUS) if hosts[1] > 1 else rendezvous,
        address=address,
        max_restarts=max_restarts,
        hang_timeout=hang_timeout,
        join_timeout=join_timeout,
        lost_after=lost_after,
        legal=verb.legal,
    )
    _run(run, arguments, config)


def _run(run: Callable[..., None], arguments: list[str], config: "LaunchConfig") -> None:
    from liaoyuan.cli.worker import worker_command

    def tell(sentence: str) -> None:
        with contextlib.suppress(OSError):  # a log on a full disk must not end the job
            print(f"launch: {sentence}", file=sys.stderr, flush=True)

    run(lambda folder: worker_command(folder, arguments), config, tell)


@dataclass(frozen=True)
class Verb:
    """A verb that runs on several processes: its run folder, and which numbers of processes divide its batches."""

    out: Path
    legal: Callable[[int], bool]


def resolve(arguments: list[str]) -> Verb:
    """Check a command line as the verb itself would, before anything is started.

    Raises:
        LiaoyuanError: the verb is unknown or runs in one process, or its config is wrong.
        UsageError (of typer): an option of the verb is wrong.
    """
    from liaoyuan.cli.main import app

    command: Any = typer.main.get_command(app)
    words = list(arguments)
    names: list[str] = []
    while known_verbs := getattr(command, "commands", None):  # a group of verbs
        word = words.pop(0) if words else ""
        if word not in known_verbs:
            known = nearest(word, known_verbs) or "."
            raise LiaoyuanError(f"There is no verb '{' '.join([*names, word]).strip()}' to launch{known}")
        names.append(word)
        command = known_verbs[word]
    read = CONFIGS.get(" ".join(names))
    if read is None:
        raise LiaoyuanError(f"'{' '.join(names)}' runs in one process; what can be launched is: {', '.join(CONFIGS)}.")
    with command.make_context("liaoyuan " + " ".join(names), words) as inner:
        return Verb(inner.params["out"], _divides(read(inner.params)))


def _train(params: dict[str, Any]) -> Any:
    from liaoyuan.cli.train import train_config

    return train_config(params["run_file"], params["set_"], params["corpus"])


def _sft(params: dict[str, Any]) -> Any:
    from liaoyuan.cli.tune import sft_config

    names = ("run_file", "set_", "model", "data", "lora", "validation")
    return sft_config(*(params[name] for name in names))


def _preference(params: dict[str, Any]) -> Any:
    from liaoyuan.cli.tune import preference_config

    given: list[Any] = [params[name] for name in ("run_file", "set_", "model", "data", "held_out")]
    run_file, overrides, model, data, held_out = given
    return preference_config(run_file, overrides, model, data, held_out, params.get("loss", "reward"))


CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "train": _train,
    "tune sft": _sft,
    "tune dpo": _preference,
    "tune reward": _preference,
}


def _divides(config: Any) -> Callable[[int], bool]:
    """Return whether the layout and the batches of this config can be divided over a number of processes.

    What depends on the model as well (heads, layers) is refused by the workers, before they begin.
    """
    from liaoyuan.data.batches import Division

    if getattr(getattr(config, "plan", None), "auto", False):
        from liaoyuan.cli.auto_layout import legal_counts

        return legal_counts(config)
    layout, settings = config.layout, config.train
    alike = layout.pp * layout.context * layout.tp  # processes that work on the same part of a batch
    fewest = alike * layout.dp * (layout.fsdp or 1)

    def divide(processes: int) -> None:
        Division(settings.batch_tokens, config.sequence_length, settings.microbatches, 0, processes // alike)

    def legal(processes: int) -> bool:
        if processes % fewest or (layout.fsdp and processes != fewest):
            return False
        try:
            divide(processes)
        except LiaoyuanError:
            return False
        return True

    divide(fewest)
    return legal


def _refuse_illegal(legal: Callable[[int], bool], hosts: tuple[int, int], processes: tuple[int, int]) -> None:
    from liaoyuan.compute.layout import choose

    choose([processes[1]] * hosts[1], hosts[0] * processes[0], legal)


def _refuse_endpoint(rendezvous: Path | None) -> None:
    if rendezvous and re.fullmatch(r"[\w.-]+:\d+", str(rendezvous)):
        raise LiaoyuanError(
            f"--rendezvous {rendezvous} is a host and port; give a folder that all hosts share, since a host can be "
            "lost (the default is the run folder)."
        )


def parse_range(option: str, text: str) -> tuple[int, int]:
    """Return (fewest, most) of "4" or "2:4"; raises LiaoyuanError for anything else."""
    first, colon, last = text.partition(":")
    numbers = [int(part) if part.isdecimal() else 0 for part in (first, last if colon else first)]
    if min(numbers) < 1 or numbers[0] > numbers[1]:
        raise LiaoyuanError(f"{option} {text} is wrong: give a number above 0, or a range such as 2:4.")
    return numbers[0], numbers[1]


def _automatic(planned: bool) -> tuple[int, int]:
    """Return one process for each accelerator of this host, else one for each core."""
    if planned:
        raise LiaoyuanError("A job file needs a number: --nproc with the processes of each host.")
    from liaoyuan.device import find_accelerator

    if find_accelerator():
        import torch

        return (count := torch.accelerator.device_count(), count)
    return available_cores(), available_cores()


def _share_threads(settings: ProcessSettings | None, processes: int) -> None:
    """Give each worker its share of the cores, unless the user set the threads; the same after every restart."""
    if settings is None or settings.threads_from != "OMP_NUM_THREADS":
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_cores() // processes))


def _write_jobs(context: typer.Context, verb: Verb, arguments: list[str], processes: int, hosts: int) -> None:
    """Write the job files that were asked for: the same command without what concerns the file alone."""
    from liaoyuan.compute import JobRequest, kubernetes_manifest, slurm_script
    from liaoyuan.rundir import write_atomic

    given = context.params
    options = _given_options(context)
    job = JobRequest(
        name=_job_name(verb.out),
        command=("launch", *options, *arguments),
        folder=str(Path.cwd()),
        nodes=hosts,
        processes=processes,
        accelerator=given["accelerator"],
        image=given["image"],
        claim=given["claim"],
    )
    if path := given["slurm"]:
        write_atomic(path, slurm_script(job))
        print(f"sbatch {path}")
    if path := given["kubernetes"]:
        reachable = ("launch", "--address", "$(POD_IP)", *options, *arguments)
        write_atomic(path, kubernetes_manifest(replace(job, command=reachable)))
        print(f"kubectl apply -f {path}")


def _given_options(context: typer.Context) -> list[str]:
    """Return the options that differ from their defaults, as they are written on a command line."""
    options = []
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if option.name not in FILE_OPTIONS and value != option.default and option.opts[0].startswith("--"):
            options += [option.opts[0], str(value)]
    return options


def _job_name(out: Path) -> str:
    """Return a name that both schedulers allow: lower-case letters, digits and hyphens."""
    return "liaoyuan-" + (re.sub(r"[^a-z0-9]+", "-", out.name.lower()).strip("-") or "run")
