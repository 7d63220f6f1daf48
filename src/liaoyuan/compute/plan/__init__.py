"""Know before you run: what a job will hold, compute and send, from a dry run of the program that trains."""

from liaoyuan.compute.plan.machine.cluster import Accelerator, Cluster, Link, cluster_names, read_cluster
from liaoyuan.compute.plan.program.dry_run import Job, dry_run
from liaoyuan.compute.plan.program.footprint import Footprint, footprints
from liaoyuan.compute.plan.program.trace import Event, Held, Trace
from liaoyuan.compute.plan.step.predict import Memory, Prediction, predict

__all__ = [
    "Accelerator",
    "Cluster",
    "Event",
    "Footprint",
    "Held",
    "Job",
    "Link",
    "Memory",
    "Prediction",
    "Trace",
    "cluster_names",
    "dry_run",
    "footprints",
    "predict",
    "read_cluster",
]
