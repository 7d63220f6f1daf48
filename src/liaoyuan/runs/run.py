"""What a run is, told by its files alone: its kind, how far it is, whether it runs, its last figures, its findings."""

import fcntl
import json
import socket
import struct
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from liaoyuan.runs.curves import METRICS, Curves
from liaoyuan.runs.folder import Absent, Folder
from liaoyuan.runs.text import as_text

CONFIG, RESULT, FINDINGS, LOCK = "config.toml", "result.json", "findings.jsonl", ".lock"
COMPARISON = "comparison.json"  # with the model that a run began from, where the result does not have it
NO_RUNS = frozenset(
    {"model", "best", "state", "rollouts", "adapter", "measured", "__pycache__"}
)  # folders of a run's own parts
DEEPEST, MOST_FOLDERS, MOST_RUNS = 6, 5_000, 1_000
MOST_BYTES = 2**22  # of a config, a result, or findings, that are read
FLOCK = "hhqqi"  # struct flock of 64-bit Linux: type, whence, start, length, holder
FRESH_SECONDS = 120.0  # in which a run on another host, whose lock is not seen here, has written if it lives
KINDS = ("rl", "dpo", "sft", "pretrain", "run")
SECTIONS = {"rl": "rl", "dpo": "dpo", "preference": "dpo"}  # of a config, and what they tell
HEADLINES = ("reward", "validation_greedy", "loss", "validation_loss", "held_out_loss", "held_out_accuracy")
State = Literal["running", "stopped", "ended"]
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """What the doctor found: at which steps (first, last, how often), how bad it is, and what to do."""

    name: str
    severity: Severity
    what: str
    do: str
    first: int
    last: int
    times: int = 1


@dataclass(frozen=True)
class Run:
    """A run as a list shows it; `total` steps are None where no file says it, times are seconds since 1970."""

    name: str
    kind: str
    state: State
    done: int
    total: int | None
    last: dict[str, float]
    findings: dict[str, int]
    rollouts: bool
    began: float | None
    changed: float


def find_runs(folder: Folder) -> list[str]:
    """Return the names, as a/b, of the run folders in and below `folder`; "." is the folder itself. Raises Absent."""
    folder.entries()
    found: list[str] = []
    looked = 0
    waiting: list[tuple[str, ...]] = [()]
    while waiting and looked < MOST_FOLDERS and len(found) < MOST_RUNS:
        parts, looked = waiting.pop(0), looked + 1
        try:
            entries = folder.below(*parts).entries()
        except Absent:
            continue  # removed while we looked
        files = {name for name, is_folder in entries if not is_folder}
        if METRICS in files or {CONFIG, LOCK} <= files:
            found.append("/".join(parts) or ".")
        if len(parts) < DEEPEST:
            inner = (name for name, is_folder in entries if is_folder)
            waiting += [(*parts, name) for name in inner if name not in NO_RUNS and not name.startswith(".")]
    return sorted(found)


def run_folder(folder: Folder, name: str) -> Folder:
    """Return the folder of the run `name` of `find_runs`. Raises Absent if it is none (any more)."""
    run = folder if name == "." else folder.below(*name.split("/"))
    if not {METRICS, CONFIG} & set(run.names()):
        raise Absent(f"There is no run {name} in {folder.path} (any more).")
    return run


def describe(folder: Folder, name: str, curves: Curves, state: State | None = None) -> Run:
    """Return what the files in the run's folder tell; `curves` are its own, read on.

    state: where it is known. The process that holds the run's lock must say it: that it looks at the lock's file, as
    `state_of` does, would open the lock.
    """
    config = read_config(folder)
    steps = curves.columns.get("step")
    done = int(steps[-1]) + 1 if steps else 0
    names = folder.names()
    total = _total_steps(config)
    written = folder.status(CONFIG)
    counts: dict[str, int] = dict.fromkeys(SEVERITIES, 0)
    for finding in read_findings(folder):
        counts[finding.severity] += 1
    last = {name: value for name in HEADLINES if (value := curves.last(name)) is not None}
    return Run(
        name,
        kind_of(config, curves),
        state or state_of(folder, names, done, total, curves.changed),
        done,
        total,
        last,
        counts,
        "rollouts" in names,
        written.st_mtime if written else None,
        curves.changed or (written.st_mtime if written else 0.0),
    )


def read_config(folder: Folder) -> dict[str, Any]:
    """Return the resolved config of a run; empty where there is none that can be read."""
    try:
        return tomllib.loads(folder.read(CONFIG, most=MOST_BYTES))
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}


def read_result(folder: Folder) -> dict[str, Any]:
    """Return `result.json`, and what `comparison.json` adds to it; empty where there is none that can be read."""
    found: dict[str, Any] = {}
    for name in (COMPARISON, RESULT):
        try:
            read = json.loads(folder.read(name, most=MOST_BYTES) or "{}")
        except (ValueError, RecursionError):
            continue
        inner = read.get("comparison") if isinstance(read, dict) else None
        for part in (read, inner):  # what is compared stands beside the facts
            found |= (
                {key: value for key, value in part.items() if key != "comparison"} if isinstance(part, dict) else {}
            )
    return found


def kind_of(config: Mapping[str, Any], curves: Curves) -> str:
    """Return one of `KINDS`."""
    told = next((kind for section, kind in SECTIONS.items() if section in config), None)
    if told:
        return told
    if "train" in config:
        return "sft" if "data" in config and isinstance(config.get("model"), str) else "pretrain"
    return "rl" if "reward" in curves.columns else "run"


def _total_steps(config: Mapping[str, Any]) -> int | None:
    sections = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    steps = (section.get("steps") for section in sections)
    return next((number for number in steps if isinstance(number, int) and number > 0), None)


def state_of(folder: Folder, names: list[str], done: int, total: int | None, changed: float) -> State:
    """Return "running" if its lock is held, "ended" if it came to its result, else "stopped" (killed, or told to)."""
    if LOCK in names and _is_held(folder, changed):
        return "running"
    whole = total is not None and done >= total and {"model", "adapter"} & set(names)
    return "ended" if {RESULT, COMPARISON} & set(names) or whole else "stopped"


def _is_held(folder: Folder, changed: float) -> bool:
    """Return whether another process has the lock of the run, without taking it.

    The kernel opens a lock when its holder dies. A lock of another host may not be seen: then fresh metrics tell.
    """
    try:
        with folder.open(LOCK) as file:
            if sys.platform == "linux":
                asked = struct.pack(FLOCK, fcntl.F_RDLCK, 0, 0, 0, 0)
                if struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK:
                    return True
            host = json.loads(file.read(1000) or b"{}").get("host")
    except (Absent, OSError, ValueError, AttributeError):
        return False
    return host not in (None, socket.gethostname()) and time.time() - changed < FRESH_SECONDS


def read_findings(folder: Folder) -> list[Finding]:
    """Return the doctor's findings, worst first and newest before older; the same one of many steps is one."""
    found: dict[tuple[str, Severity], Finding] = {}
    for row in _json_lines(folder.read(FINDINGS, most=MOST_BYTES)):
        step = row["step"] if isinstance(row.get("step"), int) else 0
        severity: Severity = row["severity"] if row.get("severity") in SEVERITIES else "note"
        name = as_text(row.get("name"))
        before = found.get((name, severity))
        first, times = (before.first, before.times + 1) if before else (step, 1)
        words = as_text(row.get("what")), as_text(row.get("do"))
        found[name, severity] = Finding(name, severity, *words, first, step, times)
    return sorted(found.values(), key=lambda each: (SEVERITIES.index(each.severity), -each.last))


def _json_lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def open_run(path: Path) -> Folder:
    """Return the folder of a run that a user names. Raises LiaoyuanError if it is none."""
    folder = Folder(path)
    if not {METRICS, CONFIG} & set(folder.names()):
        known = find_runs(folder) if path.is_dir() else []
        hint = f"; there are runs in it: {', '.join(known[:5])}" if known else ""
        raise Absent(f"{path} is no run folder: it has no {METRICS}{hint}.")
    return folder
