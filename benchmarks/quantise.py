"""What weights of few bits cost and gain: bits a byte, agreement of the next token, memory, speed at 1, 8 and 32.

Accuracy is that of a trained model on texts it has not seen: bits per byte, the share of places where the most probable
token is the same, and the divergence of the distributions in nats, all against the whole weights. Speed is of random
weights in the shape of engine_speed.py's models, in one run: the sides take turns, medians. Bytes are those of weights
and buffers together, embedding included. `--products 768x4608` times single products instead, of weights [4608, 768]
that come from memory: the sides take turns, and the shortest times of a second or so are shown, which other work on the
machine disturbs least.

    python benchmarks/quantise.py --model DIR --texts FILE.jsonl.zst --sizes m30 m120 --json quantise.json
    python benchmarks/quantise.py --products 768x4608 2304x768 --rows 1 8 32 128
"""

import argparse
import io
import json
import statistics
import time
from pathlib import Path

from liaoyuan.cli.process import tune_process

SETTINGS = tune_process()

import torch  # noqa: E402  (after the allocator's settings)
import zstandard  # noqa: E402

from engine_speed import SIZES, config_of, ours  # noqa: E402
from liaoyuan.checkpoint import load_model  # noqa: E402
from liaoyuan.data import Tokenizer  # noqa: E402
from liaoyuan.device import cpu_name, select_device  # noqa: E402
from liaoyuan.evaluation import agreement  # noqa: E402
from liaoyuan.models import Decoder, Quantisation, initialise, quantise_model  # noqa: E402
from liaoyuan.ops import QuantisedWeight, linear, quantise, quantised_linear  # noqa: E402

WAYS = {
    "whole": None,
    "int8": Quantisation("int8"),
    "int8, head whole": Quantisation("int8", head=None),
    "fp8": Quantisation("fp8"),
    "int4 groups of 32": Quantisation("int4"),
    "int4 groups of 128": Quantisation("int4", 128),
    "int4 of 32, zeros": Quantisation("int4", 32, False),
    "int4 of 32, fp8 head": Quantisation("int4", head="fp8"),
}
FAST = ("whole", "int8", "fp8", "int4 groups of 32")
KINDS = {name: how for name, how in WAYS.items() if name in FAST and how is not None}
BEYOND_CACHES = 2**27  # bytes of whole weights, which no cache holds


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    print(f"{cpu_name()}, {options.threads} threads, {options.dtype}")
    rows = [row for model in options.model for row in accuracy(Path(model), options)]
    rows += [row for size in options.sizes for row in speed(size, options)]
    rows += [row for shape in options.products for row in products(shape, options)]
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": rows, "settings": vars(options)}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=[], help="folders of trained models with their tokenizers")
    parser.add_argument("--texts", help="JSON lines with a 'text' each, plain or zstd")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--skip", type=int, default=0, help="texts to leave out at the start")
    parser.add_argument("--sizes", nargs="*", default=[], choices=SIZES)
    parser.add_argument("--products", nargs="*", default=[], metavar="DEPTHxOUTPUTS", help="shapes of single products")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128], help="of a product")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number of rows of a product")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    dtype = str(select_device("cpu").default_dtype).removeprefix("torch.")
    parser.add_argument("--dtype", default=dtype, choices=["bfloat16", "float32"], help="of the models for speed")
    parser.add_argument("--json", help="where to write the figures")
    return parser.parse_args()


def texts(options: argparse.Namespace) -> list[str]:
    with Path(options.texts).open("rb") as file:
        plain = zstandard.ZstdDecompressor().stream_reader(file) if options.texts.endswith(".zst") else file
        lines = (json.loads(line)["text"] for line in io.TextIOWrapper(plain, encoding="utf-8"))
        return [text for _, text in zip(range(options.skip + options.documents), lines, strict=False)][options.skip :]


def accuracy(folder: Path, options: argparse.Namespace) -> list[dict]:
    tokenizer, whole = Tokenizer.load(folder), load_model(folder)
    longest = whole.config.max_position_embeddings
    lists, size = [], 0
    for text in texts(options):
        ids = tokenizer.encode(text)[:longest]
        lists.append(ids)
        size += len(tokenizer.decode(ids[1:]).encode())
    print(f"\n{folder.name}: {whole.config.num_parameters() / 1e6:.2f}M, {sum(map(len, lists))} tokens, {size} bytes")
    rows = []
    for name, how in WAYS.items():
        model = load_model(folder, quantisation=how)
        found = agreement(whole, model, lists)
        to_bits = found.places / size / 0.6931471805599453
        row = {"model": str(folder), "way": name, "bytes": held(model), **vars(found), "bits": found.loss * to_bits}
        rows.append(row)
        print(
            f"{name:<22} {held(model) / 1e6:8.2f} MB  {row['bits']:.4f} bits a byte "
            f"({row['bits'] - found.reference_loss * to_bits:+.4f})  same first token {100 * found.same_first:6.2f}%  "
            f"divergence {found.divergence:.5f} (99%: {found.worst:.4f})",
            flush=True,
        )
    return rows


def speed(size: str, options: argparse.Namespace) -> list[dict]:
    config = config_of(size, options.dtype)
    models = {name: initialise(Decoder(config), 0).eval() for name in FAST}
    for name in FAST:
        if (how := WAYS[name]) is not None:
            quantise_model(models[name], how)
    sides = {name: ours(model) for name, model in models.items()}
    print(f"\n{size}: {config.num_parameters() / 1e6:.1f}M, tokens/s of {options.prompt} + {options.output} tokens")
    rows = []
    for concurrency in options.concurrency:
        rates = measure(sides, config.vocab_size, concurrency, options)
        for name, rate in rates.items():
            rows.append({"size": size, "way": name, "concurrency": concurrency, "tokens_per_second": rate})
        shown = "  ".join(f"{name} {rate:6.0f} ({rate / rates['whole']:.2f}x)" for name, rate in rates.items())
        print(f"{concurrency:>3} at once  {shown}", flush=True)
    print("MB  " + "  ".join(f"{name} {held(model) / 1e6:.1f}" for name, model in models.items()))
    return rows


def measure(sides: dict, vocabulary: int, concurrency: int, options: argparse.Namespace) -> dict[str, float]:
    generator = torch.Generator().manual_seed(concurrency)
    prompts = torch.randint(1, vocabulary, (concurrency, options.prompt), generator=generator).tolist()
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            made = run(prompts, options.output)
            if turn:  # the first turn warms up
                rates[name].append(made / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def products(shape: str, options: argparse.Namespace) -> list[dict]:
    depth, outputs = map(int, shape.split("x"))
    whole = [torch.randn(outputs, depth) for _ in range(max(2, BEYOND_CACHES // (2 * depth * outputs)))]
    dtype, rows = getattr(torch, options.dtype), []
    few = {name: [few_bits(one, how) for one in whole] for name, how in KINDS.items()}
    weights: dict[str, list] = {"whole": [one.to(dtype) for one in whole], **few}
    print(f"\n{shape}, microseconds")
    for count in options.rows:
        x = torch.randn(count, depth).to(dtype)
        shortest = dict.fromkeys(weights, float("inf"))
        end, turn = time.perf_counter() + options.seconds, 0
        while time.perf_counter() < end:
            turn += 1
            for name, some in weights.items():
                weight = some[turn % len(some)]
                start = time.perf_counter()
                linear(x, weight) if name == "whole" else quantised_linear(x, weight)
                shortest[name] = min(shortest[name], time.perf_counter() - start)
        rows += [{"shape": shape, "rows": count, "way": name, "seconds": value} for name, value in shortest.items()]
        shown = (f"{name} {1e6 * value:7.1f} ({shortest['whole'] / value:.2f}x)" for name, value in shortest.items())
        print(f"{count:>4} rows  " + "  ".join(shown), flush=True)
    return rows


def few_bits(weight: torch.Tensor, how: Quantisation) -> QuantisedWeight:
    return quantise(weight, how.kind, how.group_size)


def held(model: Decoder) -> int:
    """Bytes of the model's weights and buffers."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


if __name__ == "__main__":
    main()
