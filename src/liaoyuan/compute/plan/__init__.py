"""Know before you run: what a job will hold, compute and send, from a dry run of the program that trains."""

from liaoyuan.compute.plan.cluster import Accelerator, Cluster, Link, cluster_names, read_cluster
from liaoyuan.compute.plan.dry_run import Job, dry_run
from liaoyuan.compute.plan.footprint import Footprint, footprints
from liaoyuan.compute.plan.predict import Memory, Prediction, predict
from liaoyuan.compute.plan.trace import Event, Held, Trace

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
