"""What work and messages cost: by the figures of a card and its links, and by how many processes a core has."""

from liaoyuan.compute.plan.machine.cluster import Cluster
from liaoyuan.compute.plan.machine.cost import seconds
from liaoyuan.compute.plan.machine.fabric import Fabric, Transfer
from liaoyuan.compute.plan.machine.profile import DeviceProfile
from liaoyuan.compute.plan.program.dry_run import Job
from liaoyuan.compute.plan.program.work import Work
from liaoyuan.parallel.traffic import Collective


class Prices:
    """What work and messages cost by a profile whose figures are certain.

    streams: whether the host goes on while the device computes. crowd: how many processes share a core; full: whether
    every core has one, so that what carries messages (the profile's `carrying`) takes its part from computing.
    everybody: how many processes there are in the world, if more than in the sample.
    """

    def __init__(
        self,
        profile: DeviceProfile,
        fabric: Fabric,
        streams: bool,
        crowd: float = 1.0,
        everybody: int = 0,
        full: bool = False,
    ) -> None:
        self.profile, self.fabric, self.streams, self.crowd = profile, fabric, streams, crowd
        self.everybody = tuple(range(everybody))
        self.launch = profile.launch.median * crowd
        self.asking = profile.asking * crowd
        self.carrying = profile.carrying if full else {}
        self.contention = 1.0 if self.carrying else max(1.0, profile.contention.median)
        self._works: dict[Work, float] = {}
        self._messages: dict[Collective, Transfer] = {}

    @classmethod
    def of(cls, job: Job, cluster: Cluster, profile: DeviceProfile) -> "Prices":
        """Return what they cost each process of a job on a cluster."""
        fabric, streams = Fabric(cluster, profile), job.device != "cpu"
        return cls(profile, fabric, streams, crowd(job, cluster), full=full(job, cluster))

    def work(self, work: Work) -> float:
        """Return seconds of work."""
        found = self._works.get(work)
        if found is None:
            found = self._works[work] = seconds(work, self.profile) * self.crowd
        return found

    def carried(self, message: Collective) -> float:
        """Return the seconds that computing waits for what carries a message."""
        carry = self.carrying.get(message.kind)
        return (carry.message + carry.byte * message.bytes) * self.crowd if carry else 0.0

    def message(self, message: Collective) -> Transfer:
        """Return what a message takes."""
        found = self._messages.get(message)
        if found is None:
            ranks = self.everybody if message.axis == "world" and self.everybody else message.ranks
            found = self._messages[message] = self.fabric.transfer(message.kind, message.bytes, ranks)
        return found


def crowd(job: Job, cluster: Cluster) -> float:
    """Return how many processes share a core: of a cluster of CPUs joined by one level, which is one machine."""
    alone = job.device != "cpu" or len(cluster.links) > 1
    return 1.0 if alone else max(1.0, job.processes / cluster.per_node)


def full(job: Job, cluster: Cluster) -> bool:
    """Return whether every core of a machine has a process of the job, so that messages take cores from computing."""
    return job.device == "cpu" and job.processes >= cluster.per_node
