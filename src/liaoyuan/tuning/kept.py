"""Which checkpoint of a fine-tuning is kept, and what the model was before it and is with it."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from liaoyuan.data import TokenisedRecord
from liaoyuan.parallel import Program, World
from liaoyuan.rundir import atomic_folder, read_json, read_metrics, write_json
from liaoyuan.training.loop import METRICS
from liaoyuan.tuning.held_out import Outcomes, compare, measure
from liaoyuan.tuning.sft_config import SftConfig

BEST, START, COMPARISON = "best", "start.json", "comparison.json"
Sets = Mapping[str, Sequence[TokenisedRecord]]  # what is measured, by name


class Kept:
    """Called between steps with the model: measures it, and saves it to `folder/best` if its held-out loss is lowest.

    `sets` are the held-out records ("held_out") and perhaps general text ("general"), which chooses nothing. A resumed
    run comes to the same choice: what it repeats has the same value, and only a lower one replaces what is kept. All
    processes make each call.
    """

    def __init__(self, program: Program, config: SftConfig, folder: Path, sets: Sets, world: World) -> None:
        self.program, self.config, self.folder, self.sets, self.world = program, config, folder, sets, world
        self._lowest = float(world.broadcast(str(self._read(f"{BEST}.json").get("value", "inf"))))
        self._latest: dict[str, Outcomes] | None = None

    @property
    def result(self) -> Path:
        """The folder of the model or the adapter that the run ends with."""
        return self.folder / self.config.start.name

    def measure_start(self) -> None:
        """Measure the model that the run begins with, unless that has been done."""
        if self.world.broadcast(str((self.folder / START).exists())) == "False":
            found = self._measure()
            if self.world.is_first:
                write_json(self.folder / START, _plain(found))

    def __call__(self, _: Any) -> dict[str, float]:
        self._latest = found = self._measure()
        loss = found["held_out"].loss
        if self.config.keep == "best" and loss < self._lowest:
            self._save(self.folder / BEST)
            self._lowest = loss
            if self.world.is_first:
                write_json(self.folder / f"{BEST}.json", {"value": loss, **_plain(found)})
        general = {"general_loss": found["general"].loss} if "general" in found else {}
        return {"validation_loss": loss, "validation_accuracy": found["held_out"].accuracy, **general}

    def finish(self) -> dict[str, Any]:
        """Write the result; return how it compares to the start, and keep that as `comparison.json`."""
        is_best = self.config.keep == "best" and self._lowest < math.inf
        if not is_best:
            self._save(self.result)
        elif self.world.is_first:
            with atomic_folder(self.result) as part:
                shutil.copytree(self.folder / BEST, part, dirs_exist_ok=True)
        after = None if is_best or not self.sets else self._latest or self._measure()
        if not self.world.is_first or not self.sets:
            return {}
        rows = self._read(f"{BEST}.json") if after is None else _plain(after)
        start = self._read(START)
        compared = {
            name: compare(Outcomes.from_dict(start[name]), Outcomes.from_dict(rows[name])) for name in self.sets
        }
        result = {"kept": self._kept(rows.get("value")), **compared}
        write_json(self.folder / COMPARISON, result)
        return result

    def _kept(self, value: float | None) -> dict[str, Any]:
        """Say which checkpoint is kept."""
        rows = read_metrics(self.folder / METRICS)
        if value is None:
            return {"step": len(rows), "choice": "the last checkpoint"}
        step = next((row["step"] + 1 for row in rows if row.get("validation_loss") == value), None)
        return {"step": step, "choice": "the checkpoint with the lowest held-out loss"}

    def _measure(self) -> dict[str, Outcomes]:
        self.program.eval()
        return {name: measure(self.program, records, self.world) for name, records in self.sets.items()}

    def _save(self, place: Path) -> None:
        self.config.start.save(self.program, place, self.world)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        found: dict[str, Any] = read_json(path) if path.exists() else {}
        return found


def _plain(found: dict[str, Outcomes]) -> dict[str, Any]:
    return {name: outcomes.to_dict() for name, outcomes in found.items()}
