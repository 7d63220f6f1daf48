"""What a job asks of a cluster's scheduler; `slurm` and `kubernetes` write it in their words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class JobRequest:
    """A job of `nodes` hosts with `processes` workers each that runs `command` (arguments of `liaoyuan`).

    folder: where the job runs, on a file system that all hosts share. Paths in `command` are relative to it.
    accelerator: the scheduler's name of the card that each process gets ("gpu", "nvidia.com/gpu"); None: CPU only.
    """

    name: str
    command: tuple[str, ...]
    folder: str
    nodes: int = 1
    processes: int = 1
    cores: int = 1  # of each process
    accelerator: str | None = None
    image: str = "liaoyuan:latest"  # Kubernetes: container image
    claim: str = "liaoyuan"  # Kubernetes: the persistent volume claim that holds `folder`
    grace: int = 300  # seconds that the workers have for saving before the scheduler kills them
