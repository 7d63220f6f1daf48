"""What each process of a replica does with its own part of the model when all are told to."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from liaoyuan import ops
from liaoyuan.checkpoint import read_parts
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.exactness.recorder import Recordings
from liaoyuan.inference.spread.trained import Trained
from liaoyuan.models import read_config
from liaoyuan.ops import checksum
from liaoyuan.parallel import Program, full_weights, local, whole_part


class Part:
    """This process's part of the weights."""

    def __init__(self, program: Program, control: ProcessGroup) -> None:
        self._program, self._control = program, control
        self._new: dict[str, Tensor] = {}
        self._dropped: dict[torch.UntypedStorage, int] = {}

    def read(self, folder: Path) -> Mapping[str, Tensor]:
        """Read this process's part of the weights of a folder beside its own.

        Raises:
            LiaoyuanError: some process cannot read its part, or may not take it.
        """
        new: dict[str, Tensor] = {}
        refusal = _refusal(new, self._program, folder)
        failed = torch.tensor(int(bool(refusal)))
        dist.all_reduce(failed, group=self._control)
        if failed:
            raise LiaoyuanError(refusal or f"Another process of this model cannot read its part of {folder}.")
        self._new = new
        return new

    @torch.no_grad()
    def take(self) -> None:
        """Copy what was read into the model, each expert to all of its copies."""
        own, placed = self._own(), self._program.placed
        for name, tensor in self._new.items():
            if placed and name in placed:
                placed.fill(name, tensor)
            else:
                own[name].copy_(tensor)
        self._new = {}

    def move(self, placement: Tensor) -> int:
        """Bring the experts to a placement; see `PlacedExperts.move`."""
        placed = self._program.placed
        if placed is None or self._dropped:
            raise LiaoyuanError("There are no experts here that could be moved.")
        return placed.move(placement.numpy(), self._control)

    def checksum(self) -> str:
        """Return what `weights.weights_checksum` returns of the whole model; all processes must ask."""
        total, few_bits, placed = 0, self._program.few_bits, self._program.placed
        for name, tensor in sorted(self._program.named_tensors()):
            path, _, leaf = name.rpartition(".")
            if path in few_bits and leaf != "bias":
                whole = whole_part(self._program.models[0].get_submodule(path), few_bits[path], leaf)
            else:
                ((_, whole),) = full_weights([(name, placed.collect(name, tensor) if placed else tensor)])
            total = checksum(whole, before=total)
        return f"{total:016x}"

    def drop_weights(self) -> None:
        pieces = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in self._own().values()}
        self._dropped = {piece: piece.nbytes() for piece in pieces.values()}
        for piece in self._dropped:
            piece.resize_(0)

    def take_memory(self) -> None:
        for piece, size in self._dropped.items():
            piece.resize_(size)
        self._dropped = {}

    def _own(self) -> dict[str, Tensor]:
        return {name: local(tensor.detach()) for name, tensor in self._program.named_tensors()}


class Evidence:
    """What this process has to say in a proof of exactness."""

    def __init__(self, program: Program, control: ProcessGroup) -> None:
        (self._model,) = program.models
        self._control, self._device = control, program.device
        self.trained, self.recordings = Trained(program), Recordings(control.rank(), control.size())

    def record(self, learns: bool, text: Tensor) -> None:
        """Record from now on what the model, or that of training, gives for a text."""
        self.recordings.begin(self.trained.model if learns else self._model, text, learns)

    def first_differences(self) -> list[int]:
        """Return where the recordings of each process part."""
        return self._of_all(torch.tensor([self.recordings.end()])).flatten().tolist()

    def promised(self) -> set[str]:
        """Return the operators whose kernels are exact in all processes."""
        rows = ops.status(self._device.type)
        everywhere = self._of_all(torch.tensor([bool(row.exact) for row in rows]).long()).all(0)
        return {row.operator for row, is_exact in zip(rows, everywhere.tolist(), strict=True) if is_exact}

    def _of_all(self, values: Tensor) -> Tensor:
        found = values.new_empty(self._control.size(), len(values))
        dist.all_gather_single(found.flatten(), values, group=self._control)
        return found


def _refusal(new: dict[str, Tensor], program: Program, folder: Path) -> str:
    """Read new weights into `new`; return why they cannot be taken, or nothing."""
    try:
        config = program.config
        found = read_config(folder, bool(config.further_layers))
        if config.further_layers and not found.further_layers:  # as training writes: they only guess, and stay
            config = replace(config, further_layers=0)
        if found != config:
            return f"The config.json of {folder} is that of another model than the one that is served."
        new.update(read_parts(program, folder, config))
    except LiaoyuanError as error:
        return str(error)
    wrong = [name for name, tensor in new.items() if not bool(tensor.isfinite().all())]
    return f"The new weight '{wrong[0]}' of {folder} has values that are not numbers." if wrong else ""
