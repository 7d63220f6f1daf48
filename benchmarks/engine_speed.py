"""Generation speed of the engine beside transformers, on the same random weights, in one process and one run.

Sides take turns, each round measures all of them once, and medians are shown. Prompts have one length (no padding
for anybody), decoding is greedy, nobody stops early. The dtype is the one that this machine multiplies fast. Modes of
transformers: `generate` (dynamic cache, SDPA), the static cache with a compiled step (a minute or two to compile, which
is not counted), and with `--continuous` its continuous batching (`generate_batch`).

    python benchmarks/engine_speed.py --models m30 m120 --concurrency 1 8 32 --rounds 3 --json engine_speed.json
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from liaoyuan.cli.process import tune_process

SETTINGS = tune_process()

import torch  # noqa: E402  (after the allocator's settings, which hold for every side)
import transformers  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from liaoyuan import ops  # noqa: E402
from liaoyuan.checkpoint import save_model  # noqa: E402
from liaoyuan.device import cpu_name, select_device  # noqa: E402
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams  # noqa: E402
from liaoyuan.models import Decoder, ModelConfig, initialise  # noqa: E402

SIZES = {  # hidden, intermediate, layers, query heads, key-value heads, vocabulary
    "m1": (128, 384, 4, 4, 2, 2048),
    "m10": (320, 960, 6, 5, 5, 8192),
    "m30": (512, 1536, 8, 8, 4, 16384),
    "m120": (768, 2304, 12, 12, 4, 32768),
}
Side = Callable[[list[list[int]], int], int]  # (prompts, new tokens) -> tokens made


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    ops.configure(dict(pair.partition("=")[::2] for pair in options.ops))
    print(f"{cpu_name()}, {options.threads} threads, {options.dtype}")
    rows = []
    for name in options.models:
        model = initialise(Decoder(config_of(name, options.dtype)), 0).eval()
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, Path(folder) / name)
            sides = all_sides(model, Path(folder) / name, options)
        for concurrency in options.concurrency:
            measured = measure(sides, model.config.vocab_size, concurrency, options)
            rows += [
                {"model": name, "parameters": model.config.num_parameters(), "concurrency": concurrency, **row}
                for row in measured
            ]
            show(rows[-len(measured) :])
    if options.json:
        result = {"rows": rows, "settings": vars(options), "process": vars(SETTINGS), "machine": machine()}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["m30"], choices=SIZES)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="new tokens of a request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    dtype = str(select_device("cpu").default_dtype).removeprefix("torch.")
    parser.add_argument("--dtype", default=dtype, choices=["bfloat16", "float32"], help="of all sides")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out the compiled step")
    parser.add_argument("--continuous", action="store_true", help="also generate_batch (needs psutil; slow to start)")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--ops", nargs="*", default=[], metavar="NAME=KERNEL", help="as [ops] of a run file, for ours")
    parser.add_argument("--json", help="where to write the figures")
    return parser.parse_args()


def config_of(name: str, dtype: str) -> ModelConfig:
    hidden, intermediate, layers, heads, key_value_heads, vocabulary = SIZES[name]
    return ModelConfig(
        model_type="qwen3",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=hidden // heads,
        tie_word_embeddings=True,
        qk_norm=True,
        dtype=dtype,
    )


def all_sides(model: Decoder, folder: Path, options: argparse.Namespace) -> dict[str, Side]:
    sides = {"liaoyuan": ours(model)}
    if options.only_ours:
        return sides
    sides["transformers generate"] = generate(load(folder, options.dtype, "sdpa"))
    if options.continuous:
        sides["transformers generate_batch"] = generate_batch(load(folder, options.dtype, "paged|sdpa"))
    if options.compile:
        # One model a concurrency: a compiled step is specialised to its batch.
        compiled = {count: generate(load(folder, options.dtype, "sdpa"), True) for count in options.concurrency}
        sides["transformers static cache, compiled"] = lambda prompts, new: compiled[len(prompts)](prompts, new)
    return sides


def load(folder: Path, dtype: str, attention: str):  # type: ignore[no-untyped-def]
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()


def ours(model: Decoder) -> Side:
    engine = Engine(model, EngineConfig(max_sequences=64))

    def run(prompts: list[list[int]], new: int) -> int:
        sampling = SamplingParams(max_tokens=new, temperature=0.0)
        done = engine.generate([Request(i, tuple(prompt), sampling) for i, prompt in enumerate(prompts)])
        return sum(len(completion.tokens) for completion in done)

    return run


def generate(model, compiled: bool = False) -> Side:  # type: ignore[no-untyped-def]
    extra = {}
    if compiled:
        model.forward = torch.compile(model.forward, dynamic=False)
        extra = {"cache_implementation": "static"}

    def run(prompts: list[list[int]], new: int) -> int:
        tokens = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                **extra,
            )
        return out.numel() - tokens.numel()

    return run


def generate_batch(model) -> Side:  # type: ignore[no-untyped-def]
    def run(prompts: list[list[int]], new: int) -> int:
        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        out = model.generate_batch(prompts, generation_config=config, progress_bar=False)
        return sum(len(result.generated_tokens) for result in out.values())

    return run


def measure(sides: dict[str, Side], vocabulary: int, concurrency: int, options: argparse.Namespace) -> list[dict]:
    generator = torch.Generator().manual_seed(concurrency)
    prompts = torch.randint(1, vocabulary, (concurrency, options.prompt), generator=generator).tolist()
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.rounds + 1):
        for name, run in list(sides.items()):
            start = time.perf_counter()
            try:
                made = run(prompts, options.output)
            except Exception as error:  # a mode that does not work here is said so, and left out
                print(f"{name}: left out ({type(error).__name__}: {str(error)[:200]})", file=sys.stderr)
                del sides[name], rates[name]
                continue
            if made != concurrency * options.output:
                print(f"{name}: made {made} tokens instead of {concurrency * options.output}", file=sys.stderr)
            if turn:  # the first turn warms up
                rates[name].append(made / (time.perf_counter() - start))
    return [
        {"side": name, "tokens_per_second": statistics.median(values), "rounds": values}
        for name, values in rates.items()
    ]


def show(rows: list[dict]) -> None:
    best = max((row["tokens_per_second"] for row in rows if row["side"] != "liaoyuan"), default=None)
    for row in rows:
        ratio = f"  {row['tokens_per_second'] / best:5.2f} x best peer" if best and row["side"] == "liaoyuan" else ""
        print(
            f"{row['model']:>5} ({row['parameters'] / 1e6:6.1f}M)  {row['concurrency']:>3} at once  "
            f"{row['side']:<36} {row['tokens_per_second']:8.0f} tokens/s{ratio}",
            flush=True,
        )


def machine() -> dict[str, str]:
    return {
        "processor": cpu_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
