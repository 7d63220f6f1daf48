"""Run folders as `tune` writes them, made without a model, and what a hostile model may have written."""

import json
from pathlib import Path
from typing import Any

import zstandard

HOSTILE = (
    "<img src=x onerror=alert(1)><script>alert(2)</script></pre></textarea>"  # HTML
    "\x1b[31mred\x1b[0m\x00\x07\r"  # a terminal's codes
    "\u202egnp.exe\u2066\u200f\u200b\ufeff"  # marks of direction, and what has no width
    "\ud800"  # half a character
    "\"'&{{constructor}}${1}"
)


def row(step: int, **more: Any) -> dict[str, Any]:
    """Return a row of the metrics of a run that learns."""
    return {
        "step": step,
        "reward": 0.2 + 0.5 * step / (step + 20),
        "entropy": 0.5,
        "cpu_seconds": 0.5 * (step + 1),
    } | more


def rollout(step: int, group: int, sample: int, **more: Any) -> dict[str, Any]:
    """Return a rollout; those of even places are right."""
    right = sample % 2 == 0
    return {
        "step": step,
        "group": group,
        "sample": sample,
        "problem": f"addition/{group}",
        "task": "addition",
        "level": 2 + group % 2,
        "question": f"{group}+{step}=?",
        "gold": str(group + step),
        "thought": f"carry {sample}",
        "text": str(group + step + (not right)),
        "flaw": "",
        "reward": float(right),
        "parsed": str(group + step + (not right)),
        "reason": "" if right else f"not {group + step}",
        "tokens": 7,
        "advantage": 1.0 if right else -1.0,
    } | more


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))


def write_rollouts(folder: Path, step: int, rollouts: list[Any], raw: bytes = b"") -> Path:
    """Write a step's file; `raw` follows the rollouts as it is."""
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    path = folder / "rollouts" / f"{step:06d}.jsonl.zst"
    path.write_bytes(zstandard.compress("".join(json.dumps(each) + "\n" for each in rollouts).encode() + raw))
    return path


def make_run(folder: Path, steps: int = 30, groups: int = 4, samples: int = 4, total: int | None = None) -> Path:
    """Write a run of reinforcement learning that has done `steps` of `total` steps, with rollouts of each step."""
    write_metrics(folder, [row(step) for step in range(steps)])
    (folder / "config.toml").write_text(f'model = "start"\ntask = "addition"\n\n[rl]\nsteps = {total or steps}\n')
    for step in range(steps):
        write_rollouts(folder, step, [rollout(step, group, one) for group in range(groups) for one in range(samples)])
    return folder
