"""Too long for the suite: a quickstart killed with kill -9 again and again must end as one never interrupted.

Runs the quickstart twice with the same resolved sizes: once through, once killed at random moments and started
again. All weights must be the same, byte for byte. `make soak ARGS="--minutes 10 --seeds 3 --kills 20"`.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    whole, killed = options.folder / "whole", options.folder / "killed"
    seconds = _run(whole, options)
    if not (killed / "config.toml").exists():  # sizes are measured once, in the first run
        killed.mkdir()
        shutil.copy(whole / "config.toml", killed / "config.toml")
    kills = _run_killed(killed, options, seconds)
    ours, theirs = _digests(whole), _digests(killed)
    wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    print(f"uninterrupted: {seconds:.0f} s; interrupted: {kills} kills; {len(ours)} files of weights compared")
    result = {"seconds": seconds, "kills": kills, "files": len(ours), "different": wrong}
    (options.folder / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
    if wrong or not ours:
        sys.exit(f"DIFFERENT: {', '.join(wrong) or 'no weights were found'}")
    print("the same, byte for byte")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="size of the quickstart")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20, help="how often the second run is killed")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    return parser.parse_args()


def _command(folder: Path, options: argparse.Namespace) -> list[str]:
    sizes = ["--minutes", f"{options.minutes:g}", "--seeds", str(options.seeds)]
    return [sys.executable, "-m", "liaoyuan", "quickstart", "--no-serve", "--run", str(folder), *sizes]


def _run(folder: Path, options: argparse.Namespace) -> float:
    """Run to the end; return the seconds that took."""
    start = time.monotonic()
    if subprocess.run(_command(folder, options)).returncode:
        sys.exit(f"The quickstart in {folder} failed.")
    return time.monotonic() - start


def _run_killed(folder: Path, options: argparse.Namespace, seconds: float) -> int:
    """Run, killing the process after a random time, then let it end; return how often it was killed."""
    draw, kills = random.Random(0), 0
    while kills < options.kills:
        process = subprocess.Popen(_command(folder, options))
        try:
            process.wait(timeout=draw.uniform(1.0, 2.0 * seconds / options.kills))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            break
    _run(folder, options)
    return kills


def _digests(folder: Path) -> dict[str, str]:
    """Return the hash of every file of weights below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("model*.safetensors"))
    }


if __name__ == "__main__":
    main()
