"""Tokenising conversations with their loss masks beside the tokenizers library's own batch speed on the same text.

Sides take turns, in one process; medians. "library": `encode_batch` of the rendered texts, which are given. "records":
records in memory -> token ids and loss weights in flat arrays (rendering, encoding, mask). "file": a file of examples
-> the same, on disk (reading, recognising, checking, and all of that). "again": the file once more, from the cache.
CPU seconds are of all threads: on a machine with other work they say more than the clock does.

    python benchmarks/tokenise_speed.py --data examples.jsonl.zst --model DIR --rounds 5 --json tokenise_speed.json

Without `--model`, a tokenizer of 16,000 tokens is trained on the text first; the chat template is that of models made
here.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liaoyuan.data import Record, Tokenizer, read_examples, tokenise_file, train_tokenizer
from liaoyuan.data.chat import Renderer
from liaoyuan.data.record_cache import KINDS, tokenise_in_memory
from liaoyuan.data.records import conversations
from liaoyuan.device import cpu_name

VOCABULARY = 16_000
ASIDE = ("library", "records", "file", "again")


def main() -> None:
    options = parse()
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
    return parser.parse_args()


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    records = [record for record in read_examples(path, skip_bad=True)[0] if record.kind in KINDS]
    tokenizer = Tokenizer.load(options.model) if options.model else own_tokenizer(records)
    renderer = Renderer(tokenizer)
    texts = ["".join(renderer(part).texts) for record in records for part in conversations(record)]
    size = sum(len(text.encode()) for text in texts)
    gc.freeze()  # what is alive now is no work of the sides
    with tempfile.TemporaryDirectory() as cache:
        sides: dict[str, Callable[[], Any]] = {
            "library": lambda: tokenizer.encode_rendered_batch(texts),
            "records": lambda: tokenise_in_memory(tokenizer, records),
            "file": lambda: tokenise_file(path, tokenizer, KINDS, True, cache=Path(tempfile.mkdtemp(dir=cache))),
            "again": lambda: tokenise_file(path, tokenizer, KINDS, True, cache=Path(cache) / "kept"),
        }
        sides["again"]()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ASIDE}
        for _ in range(options.rounds):
            for name in ASIDE:
                times[name].append(timed(sides[name]))
    tokens = sum(len(encoding.ids) for encoding in sides["library"]())
    row = {"file": path.name, "records": len(records), "megabytes": size / 1e6, "tokens": tokens}
    return row | show(row, times)


def own_tokenizer(records: list[Record]) -> Tokenizer:
    texts = [message.content for record in records for message in (*record.messages, *record.chosen)]
    return train_tokenizer(texts, VOCABULARY)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


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
