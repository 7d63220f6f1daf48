"""The experts of a model that is used for inference, in slots of the processes of ep: some of them several times, and
moved from one to another while the model is at work.

A row finds an expert's copy by a number made of the row's own bits, so neither the batch nor what came before has a
say; and as all copies have the same weights, and no row's product depends on other rows, every copy gives it the same
bits. See `expert_table` for what a placement is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder
from liaoyuan.models.experts import MixtureOfExperts
from liaoyuan.parallel.expert import expert_layers
from liaoyuan.parallel.expert_table import Transfer, check_placement, copied, first_placement, moves, slot_table
from liaoyuan.parallel.fsdp import local
from liaoyuan.parallel.mesh import Mesh
from liaoyuan.parallel.parcels import Exchange, Parcel

# Of the weights of all experts, [experts, ...]: over the processes that hold the same experts, and over ep.
EXPERT_TABLE: dict[str, tuple[Placement, Placement]] = {
    "gate_up_proj": (Shard(1), Shard(0)),
    "gate_up_proj_bias": (Shard(1), Shard(0)),
    "down_proj": (Shard(2), Shard(0)),
    "down_proj_bias": (Replicate(), Shard(0)),
}
Arriving = tuple[Tensor, dict[int, Tensor]]  # a weight in slots, and memory for what comes to some of them
MIXED_COLUMNS = 16  # of a row, whose bits make its number
MIXER = 0x9E3779B1  # 2**32 over the golden ratio spreads what is counted up (Knuth, TAOCP vol. 3, sec. 6.4)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of as many bytes as a number of a row


class PlacedExperts:
    """The mixtures of experts of a model, where their experts are, and how many rows came to each slot.

    placement: int32 [layers, ranks, slots], of the layers with experts alone.
    busiest: int64 [layers], the sum over all calls so far of how many rows came to the rank that got the most; total:
        int64 [layers], how many came to all.
    """

    def __init__(self, model: Decoder, mesh: Mesh, copies: int = 0) -> None:
        """Spread the experts of `model`, on the meta device, over ep, with `copies` further slots for each process."""
        assert model.config.experts
        self.experts, self.ranks, self._mesh = model.config.experts.num_experts, mesh.layout.ep, mesh
        self.place, self.share = mesh.place("ep"), self.experts // self.ranks
        self.slots = self.share + copies
        named = dict(expert_layers(model))
        self.layers = list(named.values())
        self._first = first_placement(self.experts, self.ranks, self.slots)
        self.placement = np.stack([self._first] * len(named))
        self._routes: dict[int, Routes] = {}  # of each layer, when they are first asked for
        self._rows = np.zeros(self.placement.shape, dtype=np.int64)  # that came to each slot since the last move
        self._earlier = np.zeros((len(named), self.experts), dtype=np.int64)  # for each expert before it
        self.busiest, self.total = np.zeros((2, len(named)), dtype=np.int64)
        self._weights: dict[str, tuple[int, str]] = {}  # of each name: the number of its layer and its key there
        for number, (name, layer) in enumerate(named.items()):
            self._weights |= {f"{name}.experts.{key}": (number, key) for key in layer.experts._parameters}
            self._give_slots(layer)
        self._is_on_cpu = mesh.experts.device_type == "cpu"

    def slots_of(self, number: int, x: Tensor, chosen: Tensor) -> Tensor:
        """Return for rows x [N, H] the slots, int64 [N, K], of the experts `chosen` [N, K] of layer `number`."""
        if number not in self._routes:
            self._routes[number] = Routes.of(self.placement[number], self.experts, x.device)
        return self._routes[number].choose(x, chosen)

    def count(self, number: int, sizes: Tensor) -> list[int]:
        """Take up how many rows of a call came to each slot of a layer; return how many came to each rank."""
        rows = sizes.cpu().numpy().reshape(self.ranks, self.slots)
        of_ranks = rows.sum(1)
        self._rows[number] += rows
        self.busiest[number] += of_ranks.max()
        self.total[number] += of_ranks.sum()
        found: list[int] = of_ranks.tolist()
        return found

    def loads(self) -> np.ndarray:
        """Return how many rows came for each expert since `forget_loads`, int64 [layers, experts]."""
        found = self._earlier.copy()
        np.add.at(found, (np.arange(len(found))[:, None, None], self.placement), self._rows)
        return found

    def forget_loads(self) -> None:
        """Count from zero."""
        self._earlier[:], self._rows[:] = 0, 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of one layer in this process."""
        return sum(weight[:1].nbytes for weight in self._in_slots(0).values())

    @property
    def copies_bytes(self) -> int:
        """Bytes of all slots of this process beyond its share of the experts."""
        return self.expert_bytes * (self.slots - self.share) * len(self.layers)

    def in_order(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight as the whole model has it, [experts, ...], which is a view of each process's first slots.

        So it can be filled at the start; once experts have moved, `collect` has them in order and `fill` takes them.
        """
        if name not in self._weights:
            return weight
        return self._whole(name, local(weight.detach())[: self.share])

    def collect(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight with all experts in order, each from one of its copies; all processes must ask."""
        if name not in self._weights:
            return weight
        number, key = self._weights[name]
        slots = self._in_slots(number)[key]
        found = torch.empty_like(slots[: self.share])
        self._copy(slots, found, copied(self.placement[number], self._first[:, : self.share], self.experts))
        return self._whole(name, found)

    def fill(self, name: str, ordered: Tensor) -> None:
        """Copy this process's share of a weight in order, [experts / ranks, ...], to all copies; all must call it."""
        number, key = self._weights[name]
        slots = self._in_slots(number)[key]
        self._copy(ordered, slots, copied(self._first[:, : self.share], self.placement[number], self.experts))

    def __contains__(self, name: str) -> bool:
        """Return whether a weight lies in slots."""
        return name in self._weights

    @torch.no_grad()
    def move(self, placement: np.ndarray, control: ProcessGroup) -> int:
        """Bring the experts to a new placement, in all processes or in none; return how many were sent.

        Only what a process lacks is sent. It is kept beside the weights until all have all of it. control: a group of
        all processes.

        Raises:
            LiaoyuanError: the placement lacks an expert, or a process has no memory for what comes: nothing is changed.
        """
        if placement.shape != self.placement.shape:
            raise LiaoyuanError(f"A placement of this model is {self.placement.shape}, not {placement.shape}.")
        check_placement(placement, self.experts)
        changed = (placement != self.placement).any((1, 2))
        plans = [
            moves(before, after, self.experts) if differs else []
            for before, after, differs in zip(self.placement, placement, changed, strict=True)
        ]
        staged = self._stage(plans)
        if not _all_agree(staged is not None, control):
            raise LiaoyuanError("A process has no memory for the experts that come to it: they stay where they are.")
        assert staged is not None
        exchange, arriving = staged
        exchange.run()
        if not self._is_on_cpu:
            torch.accelerator.synchronize()  # what came may be on its way still
        _all_agree(True, control)  # who switches knows that nobody fails any more
        for slots, rows in arriving:
            for slot, row in rows.items():
                slots[slot].copy_(row)
        self._earlier, self._rows[:] = self.loads(), 0
        self.placement = placement.astype(np.int32)
        self._routes = {number: routes for number, routes in self._routes.items() if not changed[number]}
        return sum(transfer.is_sent for plan in plans for transfer in plan)

    def _stage(self, plans: Sequence[Sequence[Transfer]]) -> tuple[Exchange, list[Arriving]] | None:
        """Return what is to be exchanged, and for each weight memory for what comes to its slots; None if there is not
        so much.
        """
        parcels, arriving = [], []
        try:
            for number, plan in enumerate(plans):
                here = [transfer.target[1] for transfer in plan if transfer.target[0] == self.place]
                for slots in self._in_slots(number).values():
                    rows = {slot: torch.empty_like(slots[slot]) for slot in here}
                    parcels += _parcels(plan, slots, rows, self.place)
                    arriving.append((slots, rows))
            return Exchange(parcels, self._mesh.group("ep"), arriving[0][0].device), arriving
        except (MemoryError, RuntimeError):  # torch's own differs between devices
            return None

    def _copy(self, source: Tensor, target: Tensor, transfers: Sequence[Transfer]) -> None:
        rows = {slot: target[slot] for _, slot in (x.target for x in transfers if x.target[0] == self.place)}
        Exchange(_parcels(transfers, source, rows, self.place), self._mesh.group("ep"), source.device).run()

    def _give_slots(self, layer: MixtureOfExperts) -> None:
        over = self._mesh.experts["expert_shard", "ep"]
        for key, weight in list(layer.experts.named_parameters(recurse=False)):
            stack = weight.new_empty(self.ranks * self.slots, *weight.shape[1:])
            cut = distribute_tensor(stack, over, EXPERT_TABLE[key], src_data_rank=None)
            layer.experts._parameters[key] = nn.Parameter(cut, requires_grad=weight.requires_grad)

    def _in_slots(self, number: int) -> dict[str, Tensor]:
        """Return this process's part of each weight of a layer, [slots, ...]."""
        weights = self.layers[number].experts._parameters
        return {key: local(weight.detach()) for key, weight in weights.items() if weight is not None}

    def _whole(self, name: str, share: Tensor) -> Tensor:
        number, key = self._weights[name]
        weight = self.layers[number].experts._parameters[key]
        assert isinstance(weight, DTensor)
        like = torch.empty(self.experts, *weight.shape[1:], device="meta")
        return DTensor.from_local(
            share, weight.device_mesh, weight.placements, run_check=False, shape=like.shape, stride=like.stride()
        )


@dataclass(frozen=True)
class Routes:
    """Where the copies of a layer's experts are: `expert_table.slot_table` on a device."""

    slots: Tensor  # int64 [experts, most]
    counts: Tensor  # int64 [experts]

    @staticmethod
    def of(placement: np.ndarray, experts: int, device: torch.device) -> "Routes":
        slots, counts = (torch.from_numpy(x).to(device) for x in slot_table(placement, experts))
        return Routes(slots, counts)

    def choose(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return the slot of one of the copies of each expert that a row chose, [N, K]."""
        if self.slots.shape[1] == 1:
            return self.slots[chosen, 0]
        # Not by the experts chosen alone: the more rows choose the same ones, the more they are to be shared out.
        bits = x[:, :MIXED_COLUMNS].view(INTEGERS[x.element_size()]).sum(1, dtype=torch.int64) & 0x3FFFFFFF
        numbers = (bits[:, None] + chosen) * MIXER >> 16 & 0xFFFF
        return self.slots[chosen, numbers % self.counts[chosen]]


def _parcels(transfers: Sequence[Transfer], slots: Tensor, arriving: Mapping[int, Tensor], place: int) -> list[Parcel]:
    """Return transfers out of `slots` as parcels; arriving: memory for what comes to each slot of this process."""
    return [
        Parcel(
            transfer.source[0],
            transfer.target[0],
            slots[:1].nbytes,
            slots[transfer.source[1]] if transfer.source[0] == place else None,
            arriving[transfer.target[1]] if transfer.target[0] == place else None,
        )
        for transfer in transfers
    ]


def _all_agree(agrees: bool, control: ProcessGroup) -> bool:
    refusals = torch.tensor(int(not agrees))
    dist.all_reduce(refusals, group=control)
    return not int(refusals)
