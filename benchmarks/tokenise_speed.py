"""Tokenising conversations with their loss masks beside the tokenizers library's own batch speed on the same text.

Sides take turns, each time in a process of its own, as a run has: with nothing in the library's cache, and the
command line's settings. Medians. "library": `encode_batch` of the rendered texts, which are given. "records": records
in memory -> token ids and loss weights in flat arrays (rendering, encoding, mask). "file": a file of examples -> the
same, on disk (reading, recognising, checking, and all of that). "again": the file once more, from the cache. CPU
seconds are of all threads: on a machine with other work they say more than the clock does.

    python benchmarks/tokenise_speed.py --data examples.jsonl.zst --model DIR --rounds 9 --json tokenise_speed.json

Without `--model`, a tokenizer of 16,000 tokens is trained on the text first; the chat template is that of models made
here.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liaoyuan.cli.process import tune_process

tune_process()

from liaoyuan.data import Record, Tokenizer, read_examples, tokenise_file, train_tokenizer  # noqa: E402
from liaoyuan.data.chat import Renderer  # noqa: E402
from liaoyuan.data.record_cache import KINDS, tokenise_in_memory  # noqa: E402
from liaoyuan.data.records import conversations  # noqa: E402
from liaoyuan.device import cpu_name  # noqa: E402

VOCABULARY = 16_000
ASIDE = ("library", "records", "file", "again")
KEPT = "again"  # folder of the cache for the side of this name


def main() -> None:
    options = parse()
    if options.side:
        print(json.dumps(take(options.side, options.data[0], options.work)))
        return
    rows = [measure(path, options) for path in options.data]
    if options.json:
        machine = {"cpu": cpu_name(), "cores": os.cpu_count()}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=ASIDE, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Let the sides take turns on one file; return and print their medians."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        row = prepare(path, options.model, work)
        command = [sys.executable, __file__, "--data", str(path), "--work", str(work), "--side"]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ASIDE}
        for place in range(options.rounds + 1):
            for name in ASIDE:
                said = subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout
                if place:  # the first round fills the cache of "again", and the kernel's
                    times[name].append(tuple(json.loads(said)))
    return row | show(row, times)


def prepare(path: Path, model: Path | None, work: Path) -> dict[str, Any]:
    """Write the tokenizer and the rendered texts of a file into the folder `work`; return what there is of them."""
    records = wanted(path)
    tokenizer = Tokenizer.load(model) if model else own_tokenizer(records)
    tokenizer.save(work)
    renderer = Renderer(tokenizer)
    texts = ["".join(renderer(part).texts) for record in records for part in conversations(record)]
    (work / "texts.json").write_text(json.dumps(texts))
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_rendered_batch(texts))
    size = sum(len(text.encode()) for text in texts)
    return {"file": path.name, "records": len(records), "megabytes": size / 1e6, "tokens": tokens}


def wanted(path: Path) -> list[Record]:
    return [record for record in read_examples(path, skip_bad=True)[0] if record.kind in KINDS]


def own_tokenizer(records: list[Record]) -> Tokenizer:
    texts = [message.content for record in records for message in (*record.messages, *record.chosen)]
    return train_tokenizer(texts, VOCABULARY)


def take(side: str, path: Path, work: Path) -> tuple[float, float]:
    """Do a side's work once; return wall and CPU seconds."""
    tokenizer = Tokenizer.load(work)
    if side == "library":
        texts = json.loads((work / "texts.json").read_text())
        return timed(lambda: tokenizer.encode_rendered_batch(texts))
    if side == "records":
        records = wanted(path)
        return timed(lambda: tokenise_in_memory(tokenizer, records))
    with tempfile.TemporaryDirectory(dir=work) as empty:
        cache = work / KEPT if side == KEPT else Path(empty)
        return timed(lambda: tokenise_file(path, tokenizer, KINDS, True, cache=cache))


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    kept = work()
    spent = time.perf_counter() - wall, time.process_time() - cpu
    del kept
    return spent


def show(row: dict[str, Any], times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    medians = {name: [statistics.median(kind) for kind in zip(*pairs, strict=True)] for name, pairs in times.items()}
    wall, cpu = medians["library"]
    print(f"{row['file']}: {row['records']:,} records, {row['megabytes']:.2f} MB rendered, {row['tokens']:,} tokens")
    print(f"  {'':<8} {'MB/s':>8} {'of library':>11} {'CPU s':>7} {'of library':>11}")
    for name, (seconds, used) in medians.items():
        rate = row["megabytes"] / seconds
        print(f"  {name:<8} {rate:>8.2f} {wall / seconds:>11.1%} {used:>7.3f} {cpu / used:>11.1%}")
    return {"medians": medians, "times": times}


if __name__ == "__main__":
    main()
