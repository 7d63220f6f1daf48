"""Generation speed of the engine beside transformers, llama.cpp and vLLM, on the same random weights, in one run.

Sides take turns, each round measures all of them once, and medians are shown. Prompts have one length (no padding
for anybody) and are new in every round, decoding is greedy, nobody stops early. The dtype is the one that this machine
multiplies fast. Modes of transformers: `generate` (dynamic cache, SDPA), the static cache with a compiled step (a
minute or two to compile, which is not counted), and with `--continuous` its continuous batching (`generate_batch`).
With `--peers FOLDER` also llama.cpp and vLLM, each in a process of its own; `engine_peers.py` prepares the folder.
With `--quantise int8` our own engine once more with weights of 8 bits, to stand beside llama.cpp's q8_0; with
`--beside decode_steps=1 graphs=false` once more with these values of `EngineConfig`, to see what they bring.

Beside each rate is its share of the limit that memory sets: a step reads all weights, in the dtype, and every
sequence's keys and values once, at the faster of the rates of reading that were measured just before and just after
that round of that side, since a host that others share changes its rate by half within minutes (weights of few bits
may pass it). The median of the rounds is shown. `--shared 512`: prompts that begin alike.
`--startup`: seconds from the start of each process to its first token, and the memory that it holds then.

    python benchmarks/engine_speed.py --models m30 m120 --concurrency 1 8 32 --rounds 3 --json engine_speed.json
    python benchmarks/engine_peers.py prepare peers
    python benchmarks/engine_speed.py --models m30 --peers peers --startup --shared 0 512
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from liaoyuan.cli.process import tune_process

SETTINGS = tune_process()

import tokenizers  # noqa: E402
import torch  # noqa: E402  (after the allocator's settings, which hold for every side)
import transformers  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from liaoyuan import ops  # noqa: E402
from liaoyuan.checkpoint import load_model, save_model  # noqa: E402
from liaoyuan.device import cpu_name, select_device  # noqa: E402
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams  # noqa: E402
from liaoyuan.models import Decoder, ModelConfig, initialise  # noqa: E402
from liaoyuan.models.quantised import quantisation_named  # noqa: E402
from liaoyuan.ops.quantised_linear import GROUPS  # noqa: E402

SIZES = {  # hidden, intermediate, layers, query heads, key-value heads, vocabulary
    "m1": (128, 384, 4, 4, 2, 2048),
    "m10": (320, 960, 6, 5, 5, 8192),
    "m30": (512, 1536, 8, 8, 4, 16384),
    "m120": (768, 2304, 12, 12, 4, 32768),
    "m500": (896, 4864, 24, 14, 2, 151936),
}
Side = Callable[[list[list[int]], int], int]  # (prompts, new tokens) -> tokens made


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    ops.configure(dict(pair.partition("=")[::2] for pair in options.ops))
    print(f"{cpu_name()}, {options.threads} threads, {options.dtype}")
    rows: list[dict] = []
    for name in options.models:
        model = initialise(Decoder(config_of(name, options.dtype)), 0).eval()
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / name
            save_model(model, place)
            if options.startup:
                write_tokenizer(place, model.config.vocab_size)
                print(f"{name:>5} liaoyuan serve: {start_of_ours(place, options.threads)}", flush=True)
            sides = all_sides(model, place, options)
            for shared in options.shared:
                for concurrency in options.concurrency:
                    measured = measure(sides, model.config, concurrency, shared, options)
                    rows += [{"model": name, "parameters": model.config.num_parameters(), **row} for row in measured]
                    show(rows[-len(measured) :])
            for side in sides.values():
                if isinstance(side, Peer):
                    side.close()
    if options.json:
        result = {"rows": rows, "settings": vars(options), "process": vars(SETTINGS), "machine": machine()}
        Path(options.json).write_text(json.dumps(result, indent=2, default=str) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["m30"], choices=SIZES)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="new tokens of a request")
    parser.add_argument("--shared", nargs="+", type=int, default=[0], help="tokens in front that all prompts share")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    dtype = str(select_device("cpu").default_dtype).removeprefix("torch.")
    parser.add_argument("--dtype", default=dtype, choices=["bfloat16", "float32"], help="of all sides")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out the compiled step")
    parser.add_argument("--continuous", action="store_true", help="also generate_batch (needs psutil; slow to start)")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--peers", type=Path, help="folder with virtual environments `llama` and `vllm`")
    parser.add_argument("--peer", nargs="+", default=["llama-bf16", "llama-q8_0", "vllm"], help="which of them")
    parser.add_argument("--quantise", nargs="*", default=[], choices=GROUPS, help="ours also with weights of few bits")
    parser.add_argument("--beside", nargs="*", default=[], metavar="NAME=VALUE", help="of our engine's configuration")
    parser.add_argument("--startup", action="store_true", help="also time the start of each process")
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
    sides = {"liaoyuan": ours(load_model(folder))}  # read from the folder, as every side does
    if options.beside:
        values = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in options.beside)}
        sides[f"liaoyuan {' '.join(options.beside)}"] = ours(load_model(folder), **values)
    for kind in options.quantise:
        sides[f"liaoyuan {kind}"] = ours(load_model(folder, quantisation=quantisation_named(kind)))
    if options.peers:
        for peer in options.peer:
            sides[peer] = Peer(peer, folder, options)
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


def ours(model: Decoder, **values: object) -> Side:
    engine = Engine(model, EngineConfig.model_validate({"max_sequences": 64} | values))

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


class Peer:
    """A side in a process of its own (`engine_peers.py`)."""

    def __init__(self, name: str, folder: Path, options: argparse.Namespace) -> None:
        python = options.peers.absolute() / name.partition("-")[0] / "bin" / "python"
        command = [str(python), str(Path(__file__).with_name("engine_peers.py")), "serve", name, str(folder)]
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, "--threads", str(options.threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        ready = self._reply()
        if options.startup:
            seconds, resident = time.perf_counter() - start, ready["resident"] / 1e6
            print(f"      {name}: {seconds:.1f} s to the first token, {resident:.0f} MB", flush=True)

    def __call__(self, prompts: list[list[int]], new: int) -> int:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self._process.stdin.flush()
        return self._reply()["made"]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _reply(self) -> dict:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process ended; run its command by hand to see why")
        return json.loads(line)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Give a model a tokenizer of as many words, since a server speaks text; the benchmark speaks token ids."""
    words = tokenizers.models.WordLevel({f"t{place}": place for place in range(vocabulary)}, unk_token="t0")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))


def start_of_ours(folder: Path, threads: int) -> str:
    """Return the seconds from the start of `liaoyuan serve` to its first answer, those of importing torch in them, and
    the memory it holds then.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, env=environment)
    importing = time.perf_counter() - start
    start = time.perf_counter()
    command = [sys.executable, "-m", "liaoyuan", "serve", "--model", str(folder), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert server.stdout
    try:
        url = next(word for line in server.stdout for word in line.split() if word.startswith("http://")).rstrip("/.")
        body = json.dumps({"model": folder.name, "prompt": [1, 2, 3], "max_tokens": 1}).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers)).read()
        seconds = time.perf_counter() - start
        pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
    finally:
        server.terminate()
        server.wait()
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return f"{seconds:.1f} s to the first answer ({importing:.1f} s of it importing torch), {resident:.0f} MB"


class Round(NamedTuple):
    """What a side did in one turn, in tokens per second."""

    rate: float
    steps: float  # without the prompts
    reading: float  # bytes per second, the faster of just before and just after


def reading_rate(data: torch.Tensor) -> float:
    """Return the bytes per second at which all threads read memory, the most of three times."""

    def once() -> float:
        start = time.perf_counter()
        ops.square_sum(data)
        return data.nbytes / (time.perf_counter() - start)

    return max(once() for _ in range(3))


def bytes_of_step(config: ModelConfig, concurrency: int, options: argparse.Namespace, shared: int) -> float:
    """Return what a step of decoding must read, on average: all weights, and each sequence's keys and values."""
    width = config.num_hidden_layers * config.num_key_value_heads * 2 * config.head_dim
    length = shared + options.prompt + options.output / 2
    return (config.num_parameters() + concurrency * length * width) * config.torch_dtype.itemsize


def measure(
    sides: dict[str, Side], config: ModelConfig, concurrency: int, shared: int, options: argparse.Namespace
) -> list[dict]:
    generator = torch.Generator().manual_seed(concurrency + 1000 * shared)
    own = 32 if shared else options.prompt
    data = torch.ones(2**27, dtype=torch.bfloat16)
    token = bytes_of_step(config, concurrency, options, shared) / concurrency  # bytes
    rounds: dict[str, list[Round]] = {name: [] for name in sides}
    for turn in range(options.rounds + 1):
        prompts, others = torch.randint(1, config.vocab_size, (2, concurrency, shared + own), generator=generator)
        prompts[:, :shared] = prompts[0, :shared].clone()
        others[:, :shared] = others[0, :shared].clone()
        reading = reading_rate(data)
        for name, run in list(sides.items()):
            start = time.perf_counter()
            try:
                made = run(prompts.tolist(), options.output)
                seconds = time.perf_counter() - start
                run(others.tolist(), 1)
                first = time.perf_counter() - start - seconds
            except Exception as error:  # a mode that does not work here is said so, and left out
                print(f"{name}: left out ({type(error).__name__}: {str(error)[:200]})", file=sys.stderr)
                del sides[name], rounds[name]
                continue
            if made != concurrency * options.output:
                print(f"{name}: made {made} tokens instead of {concurrency * options.output}", file=sys.stderr)
            before, reading = reading, reading_rate(data)
            if turn:  # the first turn warms up
                steps = (made - concurrency) / max(seconds - first, 1e-9)
                rounds[name].append(Round(made / seconds, steps, max(before, reading)))
    return [
        {
            "side": name,
            "concurrency": concurrency,
            "shared": shared,
            "tokens_per_second": statistics.median(of.rate for of in values),
            "without_prompts": statistics.median(of.steps for of in values),
            "share": statistics.median(of.rate * token / of.reading for of in values),
            "share_without_prompts": statistics.median(of.steps * token / of.reading for of in values),
            "reading": [of.reading for of in values],
            "rounds": [of.rate for of in values],
        }
        for name, values in rounds.items()
    ]


def show(rows: list[dict]) -> None:
    best = max((row["tokens_per_second"] for row in rows if not is_ours(row)), default=None)
    for row in rows:
        ratio = f"  {row['tokens_per_second'] / best:5.2f} x best peer" if best and is_ours(row) else ""
        shared = f", {row['shared']} shared" if row["shared"] else ""
        print(
            f"{row['model']:>5} ({row['parameters'] / 1e6:6.1f}M)  {row['concurrency']:>3} at once{shared}  "
            f"{row['side']:<36} {row['tokens_per_second']:8.0f} tokens/s, "
            f"{row['share']:4.0%} of the limit, {row['share_without_prompts']:4.0%} without the prompts{ratio}",
            flush=True,
        )
    readings = [rate / 1e9 for row in rows for rate in row["reading"]]
    print(f"      memory was read at {min(readings):.0f} to {max(readings):.0f} GB/s", flush=True)


def is_ours(row: dict) -> bool:
    return row["side"].startswith("liaoyuan")


def machine() -> dict[str, str]:
    return {
        "processor": cpu_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
