"""What one process sends, collective by collective, measured as the collectives pass PyTorch's dispatcher.

FSDP, DTensor, the pipeline's schedules and our own collectives all pass there, backward passes included (autograd
hands the recorder on to its threads). `closed_form.py` has the same numbers as formulas.

Bytes sent are those of the algorithm that sends least, per process in a group of n (Thakur et al. 2005, "Optimization
of collective communication operations in MPICH", sec. 4): all-gather and reduce-scatter (n - 1) / n of the whole,
all-reduce twice that, all-to-all all but one's own share, send all of it, broadcast all of it at the root.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from liaoyuan.parallel.layout import Layout
from liaoyuan.parallel.mesh import Mesh

Key = tuple[str, str]  # axis, collective
COLLECTIVES = {  # operators of c10d and of the functional collectives -> collective, place of what a process puts in
    "_allgather_base_": ("all-gather", 1),
    "allgather_into_tensor_coalesced_": ("all-gather", 1),
    "allgather_": ("all-gather", 1),
    "all_gather_into_tensor": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor": ("reduce-scatter", 0),
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "all_reduce": ("all-reduce", 0),
    "all_reduce_": ("all-reduce", 0),
    "alltoall_base_": ("all-to-all", 1),
    "alltoall_": ("all-to-all", 1),
    "all_to_all_single": ("all-to-all", 0),
    "send": ("send", 0),
    "broadcast_": ("broadcast", 0),
}
COUNTS = "all-to-all of counts"  # by which the processes of ep tell each other how many rows will come
SILENT = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd"}
# Who uses a group that is that of several axes, which happens where an axis has all processes there are.
USERS = {
    "all-reduce": ("tp", "dp"),
    "all-to-all": ("ulysses", "ep"),
    "send": ("pp", "ring"),
    "broadcast": ("pp",),
}
GATHERERS = {True: ("shard", "expert_shard"), False: ("tp",)}  # FSDP's buffers are flat, ours have rows


@dataclass(frozen=True)
class Sent:
    """How often a process took part in a collective, and the bytes that it sent."""

    calls: int = 0
    bytes: int = 0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.calls + other.calls, self.bytes + other.bytes)


Traffic = dict[Key, Sent]


def sent_bytes(collective: str, given: int, size: int) -> int:
    """Return the bytes that a process sends which puts `given` bytes into a collective of `size` processes.

    The exchanges of all-to-all are even here.
    """
    if collective == "all-gather":
        return given * (size - 1)
    if collective == "all-reduce":
        return 2 * given * (size - 1) // size
    return given if collective == "send" else given * (size - 1) // size


def common_name(layout: Layout, axis: str) -> str:
    """Return the name under which an axis is counted.

    With ep = tp (both 1, as a rule) the axes shard and expert_shard are the same processes: "shard". Ulysses and ep
    exchange rows in the same way: where both have all processes, and so one group, they are "ulysses/ep".
    """
    everybody = layout.pp * layout.dp * layout.fsdp * layout.context * layout.tp
    if axis == "expert_shard" and layout.ep == layout.tp:
        return "shard"
    return "ulysses/ep" if axis in ("ulysses", "ep") and layout.ep == layout.cp.ulysses == everybody else axis


@contextmanager
def record_traffic(mesh: Mesh | None) -> Iterator[Traffic]:
    """Record what this process sends while the context lasts, by axis of the layout and collective.

    Axes are those of `Mesh`, and "world" for groups that are of none. Where one group serves several axes (an axis has
    all processes), the collective tells them apart; those that it cannot are counted as one (`common_name`).
    Groups of one process do not count.
    """
    recorder = _Recorder(mesh)
    with recorder:
        yield recorder.traffic


class _Recorder(TorchDispatchMode):
    def __init__(self, mesh: Mesh | None) -> None:
        super().__init__()
        self.traffic: Traffic = {}
        self._known = Collectives(mesh)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if found := self._known.of(func, args):
            count(found, self.traffic)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Collective:
    """A collective in which a process takes part: along which axis, of which kind, and the bytes that it sends."""

    axis: str
    kind: str
    ranks: tuple[int, ...]  # of the world
    bytes: int


def count(collective: Collective, traffic: Traffic) -> None:
    """Add one more to what a process has sent."""
    key = collective.axis, collective.kind
    traffic[key] = traffic.get(key, Sent()) + Sent(1, collective.bytes)


class Collectives:
    """Tells what an operator's call exchanges between the processes of a mesh (None: of no layout)."""

    def __init__(self, mesh: Mesh | None) -> None:
        self.mesh, self._axes = mesh, _axes_by_group(mesh) if mesh else {}

    def of(self, func: Any, args: Sequence[Any]) -> Collective | None:
        """Return what this call exchanges, None if it is no collective or one of a group of one process.

        Raises:
            NotImplementedError: it is a collective whose bytes are not known.
        """
        name = func.overloadpacket.__name__
        if func.namespace not in ("c10d", "_c10d_functional") or name in SILENT:
            return None
        if name not in COLLECTIVES:
            raise NotImplementedError(f"the collective {name} is not among those whose bytes are known")
        group = _group(args)
        if group.size() == 1:
            return None
        kind, place = COLLECTIVES[name]
        given = _tensors(args[place])
        counts = kind == "all-to-all" and given[0].dtype is torch.int64
        axis = self._axis(group, kind, flat=given[0].ndim == 1 and not counts)
        ranks = tuple(dist.get_process_group_ranks(group))
        return Collective(axis, COUNTS if counts else kind, ranks, _sent(kind, given, group, args))

    def _axis(self, group: ProcessGroup, kind: str, flat: bool) -> str:
        axes = self._axes.get(group.group_name, [])
        by_form = kind in ("all-gather", "reduce-scatter") or (kind == "all-to-all" and flat)
        users = GATHERERS[flat] if by_form else USERS[kind]
        others = [] if group is dist.group.WORLD else axes
        found = next((axis for axis in (*users, *others) if axis in axes), "world")
        return common_name(self.mesh.layout, found) if self.mesh else found


def _axes_by_group(mesh: Mesh) -> dict[str, list[str]]:
    """Return the axes, of more than one process, that each group is of."""
    groups = [
        (axis, part[axis].get_group()) for part in (mesh.dense, mesh.tokens, mesh.experts) for axis in _names(part)
    ]
    groups.append(("stage", mesh.stage))
    axes: dict[str, list[str]] = {}
    for axis, group in groups:
        if group.size() > 1:
            axes.setdefault(group.group_name, []).append(axis)
    return axes


def _names(mesh: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = mesh.mesh_dim_names
    return names


def _group(args: Sequence[Any]) -> ProcessGroup:
    """Return the group among an operator's arguments: an object, or in functional collectives its name, the last."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return ProcessGroup.unbox(arg)
    named: ProcessGroup = dist.distributed_c10d._resolve_process_group(args[-1])  # type: ignore[attr-defined]
    return named


def _tensors(arg: Any) -> list[Tensor]:
    """Return the tensors of an argument: one, a list, or a list of lists."""
    return [arg] if isinstance(arg, Tensor) else [x for part in arg for x in _tensors(part)]


def _sent(collective: str, given: Sequence[Tensor], group: ProcessGroup, args: Sequence[Any]) -> int:
    total = sum(x.numel() * x.element_size() for x in given)
    if collective == "all-to-all":
        return total - _own_share(given, group, args)
    if collective == "broadcast":
        return total if args[2] == group.rank() else 0
    return sent_bytes(collective, total, group.size())


def _own_share(given: Sequence[Tensor], group: ProcessGroup, args: Sequence[Any]) -> int:
    """Return the bytes that an all-to-all leaves where they are."""
    if len(given) > 1:
        own = given[group.rank()]
        return own.numel() * own.element_size()
    (x,) = given
    splits = [arg for arg in args if isinstance(arg, (list, tuple)) and all(isinstance(n, int) for n in arg)]
    sent = splits[-1] if splits else []  # rows for each process; none: equally many
    rows = sent[group.rank()] if sent else len(x) // group.size()
    return rows * math.prod(x.shape[1:]) * x.element_size()
