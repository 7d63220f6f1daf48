"""Speed of supervised fine-tuning beside transformers' Trainer with packing: same weights, records and row length.

Both learn the same worked solutions (GSM8K of `../shared/data`), packed into rows of one length: ours by the batches
and the loop of `tune sft`, theirs first fit into rows whose `position_ids` begin anew with every record, so that
transformers' own masks keep records apart (which is checked, as is the loss). Useful tokens are predictions of
records; padding counts for nobody. Sides take turns in one process; medians of steps, the first of every turn left
out. A step is everything from one optimiser step to the next: batch, forward, backward, clipping, AdamW.

    python benchmarks/sft_speed.py --models m8 m34 --threads 1 2 --rounds 3 --json sft_speed.json

On a machine that does other work too, believe the CPU-seconds.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from liaoyuan.cli.process import tune_process

SETTINGS = tune_process()

import torch  # noqa: E402  (after the allocator's settings, which hold for every side)
import transformers  # noqa: E402

from liaoyuan.checkpoint import load_model, save_model  # noqa: E402
from liaoyuan.data import RecordBatches, TokenisedRecord, Tokenizer, train_tokenizer  # noqa: E402
from liaoyuan.data.records import read_lines  # noqa: E402
from liaoyuan.device import cpu_name, select_device  # noqa: E402
from liaoyuan.models import Decoder, ModelConfig, initialise  # noqa: E402
from liaoyuan.parallel import Program, World  # noqa: E402
from liaoyuan.training.loop import TrainConfig, make_optimiser, take_step  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared" / "data"
SIZES = {  # hidden, intermediate, layers, query heads, key-value heads, vocabulary
    "m8": (320, 960, 6, 5, 5, 4096),
    "m34": (512, 1536, 8, 8, 4, 16384),
}
MODES = {  # of the peer: the dtype of its parameters, and whether bf16 autocast is on
    "fp32": (torch.float32, False),
    "fp32, bf16 autocast": (torch.float32, True),
    "bf16 parameters": (torch.bfloat16, False),
}
RATE, CLIP, DECAY, RECORDS, VOCABULARY = 1e-4, 1.0, 0.01, 800, 4096
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Lap:
    """Wall and CPU seconds, and useful tokens, of steps one after another; the first of a turn warms up."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, int]] = []
        self._before: tuple[float, float] | None = None

    def begin(self) -> None:
        self._before = None

    def step(self, useful: int) -> None:
        now = (time.perf_counter(), time.process_time())
        if self._before:
            self.rows.append((now[0] - self._before[0], now[1] - self._before[1], useful))
        self._before = now


def main() -> None:
    options = parse()
    print(f"{cpu_name()}, transformers {transformers.__version__}, load {os.getloadavg()[0]:.1f}", flush=True)
    tokenizer, records = read_solutions()
    rows = []
    for name, threads in itertools.product(options.models, options.threads):
        torch.set_num_threads(threads)
        measured = measure(name, threads, tokenizer, records, options)
        show(measured)
        rows += measured
    if options.json:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "cpu": cpu_name()}
        result = {"rows": rows, "settings": vars(options), "process": vars(SETTINGS), "machine": machine}
        Path(options.json).write_text(json.dumps(result | {"transformers": transformers.__version__}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["m8", "m34"], choices=SIZES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a side in a round")
    parser.add_argument("--json", help="where to write the figures")
    return parser.parse_args()


def read_solutions() -> tuple[Tokenizer, list[TokenisedRecord]]:
    """Return a tokenizer and GSM8K's solutions, of which the answer is learned."""
    path = Path(os.environ.get("LIAOYUAN_DATA", SHARED)) / "reason" / "gsm8k_train.jsonl.zst"
    if not path.exists():
        sys.exit(f"{path} is not there: name the folder of the data in LIAOYUAN_DATA.")
    rows = [json.loads(line) for _, line in itertools.islice(read_lines(path), RECORDS)]
    tokenizer = train_tokenizer([f"{row['question']}\n{row['answer']}" for row in rows], VOCABULARY)
    end = tokenizer.end_of_text_id
    assert end is not None
    records = []
    for row in rows:
        question, answer = (tokenizer.encode(row[key]) for key in ("question", "answer"))
        tokens = (end, *question, *answer, end)
        records.append(TokenisedRecord(tokens, (0.0,) * (len(question) + 1) + (1.0,) * (len(answer) + 1)))
    return tokenizer, [record for record in records if len(record.tokens) <= 512]


def measure(
    name: str, threads: int, tokenizer: Tokenizer, records: Sequence[TokenisedRecord], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for each side."""
    with tempfile.TemporaryDirectory() as place:
        folder, laps = Path(place) / "model", dict[str, Lap]()
        save_model(initialise(Decoder(config_of(name)), 0), folder)
        sides = all_sides(folder, records, options, Path(place), laps)
        losses = {side: turn() for side, turn in sides.items()}
        if max(losses.values()) - min(losses.values()) > 0.1:
            sys.exit(f"The sides do not begin with the same loss: {losses}")
        for lap in laps.values():
            lap.rows.clear()
        for _ in range(options.rounds):
            for turn in sides.values():
                turn()
    found = []
    for side, lap in laps.items():
        wall, cpu = (statistics.median(row[n] / row[2] for row in lap.rows) for n in (0, 1))
        found.append({"model": name, "threads": threads, "side": side, "tokens_per_second": 1 / wall})
        found[-1] |= {"cpu_seconds_per_token": cpu, "steps": len(lap.rows), "first_loss": losses[side]}
    return found


def all_sides(
    folder: Path, records: Sequence[TokenisedRecord], options: argparse.Namespace, place: Path, laps: dict[str, Lap]
) -> dict[str, Callable[[], float]]:
    """Return what takes a turn of each side and returns its first loss, and fill in `laps`."""
    sides = {}
    for dtype in ("float32", "bfloat16"):
        label = f"liaoyuan, {dtype}"
        laps[label] = Lap()
        sides[label] = our_turn(folder, getattr(torch, dtype), records, options, laps[label])
    packed = pack(records, options.sequence)
    check_masks(folder, packed)
    for mode, (dtype, autocast) in MODES.items():
        label = f"Trainer, {mode}"
        laps[label] = Lap()
        sides[label] = their_turn(folder, dtype, autocast, packed, options, place, laps[label])
    return sides


def our_turn(
    folder: Path, dtype: torch.dtype, records: Sequence[TokenisedRecord], options: argparse.Namespace, lap: Lap
) -> Callable[[], float]:
    program = Program([load_model(folder, dtype)]).train()
    optimiser = make_optimiser(program, TrainConfig(steps=1, weight_decay=DECAY))
    batches = RecordBatches(records, 0, options.rows * options.sequence, options.sequence)
    places = itertools.count()

    def turn() -> float:
        lap.begin()
        losses = []
        for _ in range(options.steps + 1):
            batch = batches(next(places))
            losses.append(take_step(program, optimiser, batch, RATE, CLIP, World()).loss)
            lap.step(len(batch[0].tokens) - batch[0].padding)
        return losses[0]

    return turn


def pack(records: Sequence[TokenisedRecord], length: int) -> list[dict[str, list[int]]]:
    """Return rows of whole records, first fit, filled up with padding that nobody learns."""
    rows: list[list[TokenisedRecord]] = []
    for record in records:
        row = next((r for r in rows[-8:] if sum(len(one.tokens) for one in r) + len(record.tokens) <= length), None)
        if row is None:
            rows.append([record])
        else:
            row.append(record)
    return [_packed(row, length) for row in rows]


def _packed(row: Sequence[TokenisedRecord], length: int) -> dict[str, list[int]]:
    tokens = [token for record in row for token in record.tokens]
    positions = [place for record in row for place in range(len(record.tokens))]
    labels = [
        token if weight else -100 for record in row for token, weight in zip(record.tokens, record.weights, strict=True)
    ]
    left = length - len(tokens)
    return {
        "input_ids": tokens + [0] * left,
        "position_ids": positions + list(range(left)),
        "labels": labels + [-100] * left,
    }


def useful(row: dict[str, list[int]]) -> int:
    """Return the predictions of a packed row: a record's tokens but its first, without the padding at the end."""
    last = max(place for place, label in enumerate(row["labels"]) if label != -100)
    return last + 1 - row["position_ids"][: last + 1].count(0)


def check_masks(folder: Path, packed: Sequence[dict[str, list[int]]]) -> None:
    """Leave if transformers lets records of one row see each other."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    row = {key: torch.tensor([values]) for key, values in packed[0].items()}
    second = packed[0]["position_ids"].index(0, 1)
    with torch.no_grad():
        whole = model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits
        alone = model(input_ids=row["input_ids"][:, second : second + 20], use_cache=False).logits
    if (whole[:, second : second + 20] - alone).abs().max() > 1e-3:
        sys.exit("transformers does not keep packed records apart here: the comparison would not be fair.")


def their_turn(
    folder: Path,
    dtype: torch.dtype,
    autocast: bool,
    packed: Sequence[dict[str, list[int]]],
    options: argparse.Namespace,
    place: Path,
    lap: Lap,
) -> Callable[[], float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    turns = itertools.count()

    def turn() -> float:
        first = next(turns) * (options.steps + 1) * options.rows
        count = (options.steps + 1) * options.rows
        data = [packed[(first + n) % len(packed)] for n in range(count)]
        arguments = transformers.TrainingArguments(
            output_dir=str(place / "theirs"),
            per_device_train_batch_size=options.rows,
            max_steps=options.steps + 1,
            learning_rate=RATE,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            optim="adamw_torch_fused",
            bf16=autocast,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        lap.begin()
        sizes = [sum(useful(row) for row in data[n : n + options.rows]) for n in range(0, count, options.rows)]
        watch = Watch(lap, iter(sizes))
        trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate, callbacks=[watch])
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
        return float(trainer.state.log_history[0]["loss"])

    return turn


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


class Watch(transformers.TrainerCallback):
    """Notes the end of every step."""

    def __init__(self, lap: Lap, sizes: Iterator[int]) -> None:
        self._lap, self._sizes = lap, sizes

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._lap.step(next(self._sizes))


def config_of(name: str) -> ModelConfig:
    hidden, intermediate, layers, heads, key_value_heads, vocabulary = SIZES[name]
    return ModelConfig(
        model_type="qwen3",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=64,
        tie_word_embeddings=True,
        qk_norm=True,
        dtype=str(select_device("cpu").default_dtype).removeprefix("torch."),
    )


def show(rows: list[dict[str, Any]]) -> None:
    """Print the sides, and the best of ours beside the best of theirs."""
    for row in rows:
        print(
            f"{row['model']:4} {row['threads']} threads  {row['side']:32} {row['tokens_per_second']:8,.0f} tokens/s  "
            f"{1e6 * row['cpu_seconds_per_token']:8.1f} CPU-us a token  first loss {row['first_loss']:.3f}",
            flush=True,
        )
    for key, title in (("tokens_per_second", "wall"), ("cpu_seconds_per_token", "CPU")):
        ours, theirs = (
            [row[key] for row in rows if row["side"].startswith("liaoyuan") is is_ours] for is_ours in (True, False)
        )
        ratio = max(ours) / max(theirs) if key == "tokens_per_second" else min(theirs) / min(ours)
        print(f"     best of ours against the best Trainer, {title}: {ratio:.2f}x", flush=True)


if __name__ == "__main__":
    main()
