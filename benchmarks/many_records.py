"""Fine-tuning on many records: time, memory and records a second of `tune sft` on a tiny model, run as users run it.

"first" tokenises the file and trains a few steps; "other" is another run on the same file, whose tokens are kept by
the file's content; "again" is the first command once more, which prepares as a resumed run does and finds all steps
done. Each is a process of its own; shown is the most memory that it held, on Linux and macOS. A few records beside the
many say what is there anyway. The records, short chats of two turns, are a function of their numbers.

    python benchmarks/many_records.py --records 1000 1000000
    python benchmarks/many_records.py --records 1000000 --stage first --folder DIR      (one stage of it, in a folder)
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from liaoyuan.checkpoint import save_model
from liaoyuan.data import train_tokenizer
from liaoyuan.data.permutation import number
from liaoyuan.device import cpu_name
from liaoyuan.models import Decoder, ModelConfig, initialise
from liaoyuan.ops.build import cache_folder

STAGES = ("first", "other", "again")
STEPS = 8
WORDS = [
    "river",
    "stone",
    "lamp",
    "winter",
    "paper",
    "garden",
    "signal",
    "copper",
    "morning",
    "letter",
    "bridge",
    "cotton",
    "market",
    "silver",
    "window",
]
SAID = 8  # words of an answer
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def main() -> None:
    options = parse()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for count in options.records:
            folder = (options.folder or Path(place)) / str(count)
            if not (folder / "model").exists():
                write_model(folder / "model")
            if not (folder / "chats.jsonl").exists():
                write_chats(folder / "chats.jsonl", count)
            size = (folder / "chats.jsonl").stat().st_size
            print(f"{count:,} records, {size / 1e6:.1f} MB, {STEPS} steps", flush=True)
            for stage in options.stage or STAGES:
                rows.append({"records": count, "stage": stage} | run(folder, stage))
                show(rows[-1])
    if options.json:
        machine = {"cpu": cpu_name(), "cores": os.cpu_count()}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--stage", nargs="+", choices=STAGES, help="only these, in this order")
    parser.add_argument("--folder", type=Path, help="where data, cache and runs are kept, if not for this time only")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def own_cache(folder: Path) -> None:
    """Make a cache folder without tokens, but with what else is kept for this machine."""
    kept, own = cache_folder(), folder / "cache" / "liaoyuan"
    own.mkdir(parents=True)
    for item in kept.iterdir() if kept.exists() else ():
        if item.name != "records":
            (own / item.name).symlink_to(item)


def write_model(folder: Path) -> None:
    tokenizer = train_tokenizer([chat(n)["messages"][1]["content"] for n in range(300)], 600)
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        qk_norm=True,
        eos_token_id=tokenizer.eos_ids[0],
    )
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save(Path(place))
        save_model(initialise(Decoder(config), seed=0), folder, Path(place))


def write_chats(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            file.write(json.dumps(chat(n)) + "\n")


def chat(n: int) -> dict[str, Any]:
    """Return chat number `n`: every question is another one."""
    drawn = number(len(WORDS) ** SAID, n)
    said = " ".join(WORDS[drawn // len(WORDS) ** place % len(WORDS)] for place in range(SAID))
    return {
        "messages": [
            {"role": "user", "content": f"What did letter {n} say?"},
            {"role": "assistant", "content": f"Letter {n} said: {said}."},
        ]
    }


def run(folder: Path, stage: str) -> dict[str, float]:
    """Return seconds, CPU-seconds and bytes held at most of one run."""
    out = folder / ("other" if stage == "other" else "first")
    if stage != "again":
        shutil.rmtree(out, ignore_errors=True)
    if stage == "first":
        shutil.rmtree(folder / "cache", ignore_errors=True)
        own_cache(folder)
    settings = [f"train.steps={STEPS}", "train.batch_tokens=1024", "sequence_length=128"]
    command = [sys.executable, "-m", "liaoyuan", "tune", "sft"]
    command += ["--model", str(folder / "model"), "--data", str(folder / "chats.jsonl"), "--out", str(out)]
    command += [part for setting in settings for part in ("--set", setting)]
    begin = time.perf_counter()
    child = subprocess.Popen(
        command,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
        stdout=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * UNIT}


def show(row: dict[str, Any]) -> None:
    print(
        f"  {row['stage']:8} {row['seconds']:7.1f} s  {row['cpu_seconds']:7.1f} CPU s  "
        f"{row['records'] / row['seconds']:9,.0f} records/s  peak {row['peak'] / 1e6:6.0f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
