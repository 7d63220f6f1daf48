"""Many processes on many hosts: start them, watch them, and go on from the newest checkpoint when some are lost.

torch elastic starts the processes of a host; what the hosts agree on lies in a folder that all of them share.
"""

from liaoyuan.compute.kubernetes import kubernetes_manifest
from liaoyuan.compute.launcher import LaunchConfig, launch
from liaoyuan.compute.scheduler import JobRequest
from liaoyuan.compute.slurm import slurm_script

__all__ = ["JobRequest", "LaunchConfig", "kubernetes_manifest", "launch", "slurm_script"]
