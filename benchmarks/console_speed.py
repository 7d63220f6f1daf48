"""What the console's answers cost: a run of 1,000 steps with 10,000 rollouts, of which each is about 1 kB.

    python benchmarks/console_speed.py [--steps 1000] [--rollouts 10] [--json FILE]

Prints, for each question, CPU milliseconds of the server the first time and again, and the bytes of the answer.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import zstandard
from starlette.testclient import TestClient

from liaoyuan.runs import Folder
from liaoyuan.serving.console import build_console

FIGURES = 25  # columns of the metrics
TEXT = "Add the ones, carry, add the tens. "  # repeated, for a thought of about 700 characters


def main() -> None:
    """Make the run, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rollouts", type=int, default=10, help="of a step")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        make_run(Path(place) / "run", options.steps, options.rollouts)
        client = TestClient(build_console(Folder(Path(place))), base_url="http://127.0.0.1")
        rows = [ask(client, name, path, args) for name, path, args in questions(options.steps)]
    for row in rows:
        print(f"{row['question']:<44} {row['first_ms']:>8.1f} ms {row['again_ms']:>8.1f} ms {row['bytes']:>10,} bytes")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def questions(steps: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Return name, path and arguments of what is asked."""
    figures = [f"figure_{place}" for place in range(12)]
    return [
        ("the list of runs", "runs", {}),
        ("12 curves over all steps", "curves", {"run": "run", "figure": figures}),
        ("the steps that have rollouts", "steps", {"run": "run"}),
        ("a step's rollouts", "rollouts", {"run": "run", "step": steps // 2}),
        ("another step, only wrong ones", "rollouts", {"run": "run", "step": steps // 3, "verdict": "wrong"}),
        ("a search over all steps", "search", {"run": "run", "words": f"{steps - 1}+1="}),
    ]


def make_run(folder: Path, steps: int, rollouts: int) -> None:
    """Write a run as `tune rl` does."""
    (folder / "rollouts").mkdir(parents=True)
    row = {f"figure_{place}": 0.123456 * place for place in range(FIGURES)}
    lines = (json.dumps({"step": step, "reward": step / steps, **row}) for step in range(steps))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for step in range(steps):
        texts = "".join(json.dumps(rollout(step, place)) + "\n" for place in range(rollouts))
        (folder / "rollouts" / f"{step:06d}.jsonl.zst").write_bytes(zstandard.compress(texts.encode()))


def rollout(step: int, place: int) -> dict[str, Any]:
    """Return a line of a step's file."""
    answer = str(step + place // 5)
    facts = {"step": step, "group": place // 5, "sample": place % 5, "problem": f"p{place}", "task": "addition"}
    texts = {"question": f"{step}+{place // 5}=?", "gold": answer, "thought": TEXT * 20, "text": answer, "flaw": ""}
    return facts | texts | {"level": 2, "reward": float(place % 2), "parsed": answer, "tokens": 200, "advantage": 0.5}


def ask(client: TestClient, name: str, path: str, args: dict[str, Any]) -> dict[str, Any]:
    """Ask twice; a search goes on until it has been everywhere."""
    spent = []
    for _ in range(2):
        begin = time.process_time()
        reply = client.get(f"/data/{path}", params=args)
        while path == "search" and reply.json()["next"] is not None:
            reply = client.get(f"/data/{path}", params=args | {"begin": reply.json()["next"]})
        spent.append(1e3 * (time.process_time() - begin))
        assert reply.status_code == 200, reply.text
    return {"question": name, "first_ms": spent[0], "again_ms": spent[1], "bytes": len(reply.content)}


if __name__ == "__main__":
    main()
