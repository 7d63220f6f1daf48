"""The quickstart's steps in their order; each goes on from what a killed run left.

corpus/        text, tokenizer, tokens           config.toml    what the run does, fixed before step 2
pretrain/      the language model                seed-0/ ...    teaching and measuring, one folder a seed
model/         what is served                    summary.json, report.html
"""

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from liaoyuan import __version__
from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.cli.process import tune_allocator
from liaoyuan.cli.progress import bar, clock_time
from liaoyuan.cli.quickstart_plan import QuickstartConfig, corpus_config, resolve
from liaoyuan.cli.quickstart_report import write_report
from liaoyuan.cli.summary_table import accuracy_table
from liaoyuan.data import Corpus, prepare_corpus
from liaoyuan.device import cpu_name, select_device
from liaoyuan.evaluation import bits_per_byte, gzip_bits_per_byte, xz_bits_per_byte
from liaoyuan.models import Decoder
from liaoyuan.rundir import read_json, sweep, write_json
from liaoyuan.serving import About, Words
from liaoyuan.training.flops import utilisation
from liaoyuan.training.pretrain import pretrain
from liaoyuan.tuning import study, summarise
from liaoyuan.tuning.summary import curves

SUMMARY, TIMINGS, COMPRESSION = "summary.json", "timings.json", "bits_per_byte.json"
EXAMPLES = 6  # questions that the chat page offers


def run_quickstart(folder: Path, text: Path | None, minutes: float, seeds: int, quiet: bool = False) -> Path:
    """Run, or go on with, the quickstart in `folder`; return the folder of the model that thinks."""
    sweep(folder)
    with _timed(folder, "data"), bar("1/5 data", quiet) as report:
        corpus = prepare_corpus(corpus_config(text), folder / "corpus", report)
    with _timed(folder, "sizes"), bar("    sizes", quiet) as report:
        config = resolve(folder, corpus, text, minutes, seeds, report)
    with _timed(folder, "pretrain"), bar("2/5 pretraining", quiet) as report:
        pretrained = pretrain(config.pretrain, folder / "pretrain", report)
    with bar("    bits per byte", quiet) as report:
        compression = _compression(folder, corpus, config, report)
    studies = []
    for seed in range(seeds):
        with _timed(folder, f"study {seed}"), bar(f"3/5 thinking, 4/5 measuring (seed {seed})", quiet) as report:
            place = folder / f"seed-{seed}"
            studies.append(
                study(config.study.with_seed(seed), folder / "pretrain" / "model", place, report, tune_allocator)
            )
    model = _publish(folder, studies[0])
    shape = load_model(folder / "pretrain" / "model").config
    summary = summarise(studies)
    summary["tokens_per_second"]["pretrain"] = pretrained.tokens_per_second
    summary |= {
        "bits_per_byte": compression,
        "mfu": utilisation(pretrained.tokens_per_second, shape, config.measured.gemm_flops),
        "peak_memory": select_device(config.pretrain.device).peak_memory(),
        "model": {"parameters": shape.num_parameters()}
        | {name: getattr(shape, name) for name in ("num_hidden_layers", "hidden_size", "vocab_size", "dtype")},
        "corpus": _corpus_facts(corpus),
        "metrics": _metrics(folder, studies),
        "machine": _machine(),
        "versions": {name: version(name) for name in ("torch", "tokenizers", "safetensors")}
        | {"python": platform.python_version(), "liaoyuan": __version__},
    }
    seconds = read_json(folder / TIMINGS)
    summary["timings"] = [{"step": name, "seconds": value} for name, value in seconds.items()]
    summary["seconds"] = sum(seconds.values())
    write_json(folder / SUMMARY, summary)
    write_report(folder)
    return model


def show(folder: Path, as_json: bool) -> None:
    """Print the figures of `folder/summary.json` for people, or the file itself."""
    summary = read_json(folder / SUMMARY)
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
        return
    out = Console()
    out.print(accuracy_table(summary))
    bits, speed = summary["bits_per_byte"], summary["tokens_per_second"]
    out.print(
        f"bits per byte of unseen text: model {bits['model']:.3f}, xz -9 {bits['xz']:.3f}, gzip -9 {bits['gzip']:.3f}"
    )
    out.print(
        f"tokens/s: pretraining {speed['pretrain']:,.0f} ({100 * summary['mfu']:.1f}% of the matrix-product rate), "
        f"on one thread: SFT {speed['sft']:,.0f}, rollouts {speed['rollout']:,.0f}"
    )
    out.print(f"{clock_time(summary['seconds'])} in all. Report: {folder / 'report.html'}")


@contextmanager
def _timed(folder: Path, step: str) -> Iterator[None]:
    """Add the wall time of a step to `timings.json`; of a killed attempt the time is lost, of a finished one kept."""
    start = time.perf_counter()
    yield
    path = folder / TIMINGS
    timings = read_json(path) if path.exists() else {}
    timings[step] = round(timings.get(step, 0.0) + time.perf_counter() - start, 2)
    write_json(path, timings)


def _compression(folder: Path, corpus: Corpus, config: QuickstartConfig, report: Any) -> dict[str, float]:
    """Return bits per byte of the model and of gzip and xz over the same held-out bytes."""
    path = folder / COMPRESSION
    if path.exists():
        found: dict[str, float] = read_json(path)
        return found
    text = corpus.held_out_bytes()
    model = load_model(folder / "pretrain" / "model", device=select_device(config.pretrain.device).torch)
    values = {
        "model": bits_per_byte(model, corpus.held_out_documents(), config.pretrain.sequence_length, report),
        "gzip": gzip_bits_per_byte(text),
        "xz": xz_bits_per_byte(text),
    }
    write_json(path, values)
    return values


def _publish(folder: Path, result: dict[str, Any]) -> Path:
    """Write the model that thinks to `folder/model`, with what the chat page says of it."""
    best, target = Path(result["stages"]["rl"]["model"]), folder / "model"
    model: Decoder = load_model(best)
    save_model(model, target, best)
    shown = result["measured"]["rl"]["shown"]
    right = [row["question"] for row in shown if row["right"]] or [row["question"] for row in shown]
    about = About(
        about=Words(
            en="A small model that was made on this machine. It adds two numbers of two to four digits and shows its "
            "work: it writes the columns down first, then answers.",
            zh="在这台机器上从零训练的小模型。它会做两个两位到四位数的加法，并写出过程：先逐列计算，再给出答案。",
        ),
        cannot=Words(
            en="It cannot chat, knows no facts and no other sums: it learned to continue Python code and to add.",
            zh="它不会聊天，没有常识，也不会其他算术：它只学过续写 Python 代码和做加法。",
        ),
        examples=[Words(en=question, zh=question) for question in right[:EXAMPLES]],
        single_turn=True,
        temperature=0.0,
    )
    write_json(target / "liaoyuan.json", about.model_dump(mode="json"))
    return target


def _corpus_facts(corpus: Corpus) -> dict[str, Any]:
    manifest = corpus.manifest
    return {
        "source": manifest["source"]["name"],
        "documents": sum(manifest["documents"].values()),
        "bytes": sum(manifest["bytes"].values()),
        "tokens": sum(manifest["tokens"].values()),
        "held_out_bytes": manifest["bytes"]["held_out"],
        "duplicates": manifest["duplicates"],
        "skipped": manifest["skipped"],
    }


def _metrics(folder: Path, studies: list[dict[str, Any]]) -> dict[str, Any]:
    """Return where the curves are, relative to the run folder."""
    stages = {stage: curves(folder, studies, stage) for stage in ("sft", "rl")}
    return {"pretrain": "pretrain/metrics.jsonl", **stages}


def _machine() -> dict[str, str]:
    return {
        "processor": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "device": str(select_device().torch),
        "system": platform.platform(terse=True),
    }
