"""The fast tier: each process saves all that it holds to a folder of its own machine, more often than the durable one.

Such a state is read only by a run with the same processes and layout, and only if every process has it whole; it
saves a crashed job, whose machines are still there, the steps since the last durable state.
"""

import secrets
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from liaoyuan.checkpoint.plan import PartPlan
from liaoyuan.checkpoint.reading import crc32
from liaoyuan.checkpoint.writer import Local, Piece, read_header, state_name, states, step_of
from liaoyuan.parallel import World
from liaoyuan.rundir import disk_errors, sweep, write_atomic

NAME = ".local-tier"  # in the folder of durable states: the name of the run in local folders
KEPT = 2  # processes may be one save apart when a job dies


@dataclass(frozen=True)
class LocalTier:
    """This process's states in `folder`."""

    folder: Path

    @staticmethod
    def open(durable: Path, local: Path, world: World) -> "LocalTier":
        """Return the tier of the run whose durable states are in `durable`.

        A run folder that was deleted and begun anew has another name, and does not see the states of the old one.
        """
        name = ""
        if world.is_first:
            with disk_errors(durable):
                durable.mkdir(parents=True, exist_ok=True)
                if not (durable / NAME).exists():
                    write_atomic(durable / NAME, secrets.token_hex(8))
                name = (durable / NAME).read_text(encoding="utf-8")
        return LocalTier(local / world.broadcast(name) / f"rank-{world.rank:04d}")

    def job(self, step: int, about: dict[str, Any]) -> Local:
        """Return the job that saves a step here."""
        return Local(str(self.folder), step, KEPT, about)

    def steps(self) -> list[int]:
        """Return the steps that are saved here, the newest first."""
        return [step_of(path) for path in states(self.folder)]

    def read(self, step: int, plan: PartPlan) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return what was saved about a step, and this process's tensors by name.

        None if the file is missing, damaged, or of another layout than `plan`.
        """
        path, blocks = self.folder / f"{state_name(step)}.safetensors", {}
        try:
            pieces, checksums, about = read_header(path)
            if {_place(piece) for piece in pieces} != {_place(piece) for piece in plan.pieces}:
                return None
            with safe_open(path, framework="pt") as file:
                for piece, checksum in zip(pieces, checksums, strict=True):
                    blocks[piece.name] = file.get_tensor(piece.name)
                    if crc32(blocks[piece.name]) != checksum:
                        return None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None
        return about, blocks

    def clear(self) -> None:
        """Delete all that is here."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.exists() and not any(self.folder.parent.iterdir()):
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def sweep(self) -> None:
        """Delete what a killed process left half written."""
        if self.folder.exists():
            sweep(self.folder)


def _place(piece: Piece) -> Piece:
    return replace(piece, start=0)
