"""The whole prediction of one layout (`predict.py`), as a ranking tells it."""

from collections.abc import Callable

from liaoyuan.compute.plan.cluster import Cluster
from liaoyuan.compute.plan.dry_run import Job
from liaoyuan.compute.plan.profile import DeviceProfile
from liaoyuan.compute.plan.reckoned import Reckoned, by_formulas


def predicting(cluster: Cluster, profile: DeviceProfile) -> Callable[[Job], Reckoned]:
    """Return what predicts a layout as a whole."""
    return by_formulas(cluster, profile)
