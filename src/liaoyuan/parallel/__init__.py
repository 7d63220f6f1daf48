"""Distribution: the process group and FSDP. The model knows nothing of it; `World(0, 1)` is a single process."""

from liaoyuan.parallel.fsdp import full_weights, local, shard
from liaoyuan.parallel.world import World, start

__all__ = ["World", "full_weights", "local", "shard", "start"]
