"""A job as a Slurm script: one launcher on each node; recovery is the launchers' own, so Slurm must not end the job."""

import shlex

from liaoyuan.compute.scheduler import JobRequest


def slurm_script(job: JobRequest, program: tuple[str, ...] = ("liaoyuan",)) -> str:
    """Return the script for `sbatch`; options on sbatch's own command line override the `#SBATCH` lines.

    A lost node does not end the job (--no-kill), a launcher that fails does not end the others
    (--kill-on-bad-exit=0), and before the time limit or a preemption the workers are asked to save.
    """
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={job.processes * job.cores}",
        *([f"--gpus-per-node={_cards(job)}"] if job.accelerator else []),
        f"--output={job.name}-%j.log",
        "--open-mode=append",
        "--no-kill",
        "--requeue",
        f"--signal=TERM@{job.grace}",
    ]
    command = shlex.join([*program, *job.command])
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        "# Submitted again, the same script goes on from the newest checkpoint.",
        "set -euo pipefail",
        f"cd {shlex.quote(job.folder)}",
        "exec srun --ntasks-per-node=1 --no-kill --kill-on-bad-exit=0 --wait=0 \\",
        f"    {command}",
    ]
    return "\n".join(lines) + "\n"


def _cards(job: JobRequest) -> str:
    kind = "" if job.accelerator in (None, "gpu") else f"{job.accelerator}:"
    return f"{kind}{job.processes}"
