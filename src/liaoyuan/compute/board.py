"""The folder in which the hosts of a job meet. Every host reads and writes it; no host has to stay for the others.

`member-<id>.json` is a host's sign of life, `round-<n>.json` says who runs together, `verdict-<n>.json` that this is
over and why. A round and a verdict are created once by whoever comes first: creating is atomic on a shared folder too.
"""

import json
import os
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import TEMPORARY

KEPT_ROUNDS = 5
READ_TRIES, READ_PAUSE = 5, 0.05  # seconds


@dataclass(frozen=True)
class Member:
    """A host of the job: what it offers and what it does. `beat` grows while its launcher lives."""

    id: str
    host: str
    machine: str  # the same for launchers on one machine
    address: str  # where the others reach it
    slots: int  # processes that it offers
    phase: str = "waiting"  # or "running", "done"
    round: int = 0
    beat: int = 0


@dataclass(frozen=True)
class Seat:
    """A host's part in a round; hosts in the order of their ranks."""

    id: str
    host: str
    processes: int


@dataclass(frozen=True)
class Round:
    """Who runs together, and where the first host's store listens."""

    number: int
    seats: tuple[Seat, ...]
    address: str
    port: int

    @property
    def processes(self) -> int:
        return sum(seat.processes for seat in self.seats)


@dataclass(frozen=True)
class Verdict:
    """The end of a round: "done", or "again" with the reason. `gentle`: the workers are well and shall save first."""

    outcome: str
    reason: str = ""
    gentle: bool = False


class Board:
    """Reads and writes the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self) -> None:
        """Make the folder; raises LiaoyuanError if it cannot be reached or written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f"{TEMPORARY}{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise LiaoyuanError(
                f"The rendezvous {self.folder} is unreachable: {error.strerror}. "
                "Give --rendezvous a folder that every host can write."
            ) from error

    def show(self, member: Member) -> None:
        """Put up this host's sign of life."""
        self._put(self._member(member.id), asdict(member), replace=True)

    def leave(self, member_id: str) -> None:
        """Take this host's sign of life down."""
        self._member(member_id).unlink(missing_ok=True)

    def members(self) -> list[str]:
        """Return the ids of all hosts that show themselves, dead ones too, in the order of ranks."""
        return sorted(path.stem.removeprefix("member-") for path in self.folder.glob("member-*.json"))

    def member(self, member_id: str) -> Member | None:
        found = _read(self._member(member_id))
        return Member(**found) if found else None

    def propose(self, round_: Round) -> bool:
        """Create the round; False if another host was first. Rounds long past are deleted."""
        created = self._put(self.folder / f"round-{round_.number:06d}.json", asdict(round_), replace=False)
        for number in self._rounds()[:-KEPT_ROUNDS] if created else []:
            for kind in ("round", "verdict"):
                (self.folder / f"{kind}-{number:06d}.json").unlink(missing_ok=True)
        return created

    def latest(self) -> Round | None:
        """Return the newest round."""
        numbers = self._rounds()
        found = _read(self.folder / f"round-{numbers[-1]:06d}.json") if numbers else None
        return Round(**{**found, "seats": tuple(Seat(**seat) for seat in found["seats"])}) if found else None

    def end(self, number: int, verdict: Verdict) -> None:
        """End a round; the first verdict stays."""
        self._put(self._verdict(number), asdict(verdict), replace=False)

    def verdict(self, number: int) -> Verdict | None:
        found = _read(self._verdict(number))
        return Verdict(**found) if found else None

    def _rounds(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.json"))

    def _member(self, member_id: str) -> Path:
        return self.folder / f"member-{member_id}.json"

    def _verdict(self, number: int) -> Path:
        return self.folder / f"verdict-{number:06d}.json"

    def _put(self, path: Path, value: dict[str, Any], replace: bool) -> bool:
        """Write under another name, then rename (a sign of life) or link (what may be created only once)."""
        part = self.folder / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            part.write_text(json.dumps(value), encoding="utf-8")
            if replace:
                part.replace(path)
            else:
                os.link(part, path)
        except FileExistsError:
            return False
        finally:
            part.unlink(missing_ok=True)
        return True


def _read(path: Path) -> dict[str, Any] | None:
    """Return what the file holds, None if it is absent (a network file system may need a second try)."""
    for _ in range(READ_TRIES):
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        except FileNotFoundError:
            return None
        except (OSError, json.JSONDecodeError):
            time.sleep(READ_PAUSE)
    return None
