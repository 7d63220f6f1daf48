"""`liaoyuan convert`: weights from one folder to another: dtype, shards, training checkpoint to model folder."""

import contextlib
import json as json_format
import re
from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liaoyuan.cli.export import one_of, refuse_with_export, run_export
from liaoyuan.cli.process import importing
from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.checkpoint.convert import Converted
    from liaoyuan.checkpoint.sources import Source

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Dtype(Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Kind(Enum):
    folder = "folder"
    state = "state"


def convert(
    source: Annotated[
        Path | None, typer.Argument(help="Model folder, run folder, its state, or one state/step-...")
    ] = None,
    target: Annotated[Path | None, typer.Argument(help="Folder to write (with --to state: a new run folder).")] = None,
    model: Annotated[Path | None, typer.Option(help="The same as SOURCE.")] = None,
    out: Annotated[Path | None, typer.Option(help="The same as TARGET.")] = None,
    merge: Annotated[
        Path | None,
        typer.Option(help="Adapter to merge into SOURCE, or into what it was trained on."),
    ] = None,
    quantise: Annotated[str | None, typer.Option(help="Weights of few bits: int8, int4 or fp8.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Held-out examples to compare the result on, if not the run's own.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on with the good lines of --texts.")] = False,
    task: Annotated[str | None, typer.Option(help="A task whose problems are compared too.")] = None,
    max_divergence: Annotated[float | None, typer.Option(min=0, help="Tolerated, in nats a token.")] = None,
    max_drop: Annotated[float | None, typer.Option(min=0, help="Tolerated drop of accuracy, a share.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; the source's own if left out.")] = None,
    max_shard: Annotated[str, typer.Option(help="Largest weight file: 5GB, 500MB.")] = "5GB",
    step: Annotated[int | None, typer.Option(min=0, help="Which checkpoint of a run; the newest if left out.")] = None,
    to: Annotated[Kind, typer.Option(help="folder, or state: what train goes on from, of step 0.")] = Kind.folder,
    run_file: Annotated[Path | None, typer.Option(help="With --to state: the run file of the training.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --to state: override a key of it.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer files, if not the source's.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model folder that is there; export beyond the tolerance.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write the weights of SOURCE to TARGET as a Hugging Face folder: other dtype, other shards, or from a run.

    With --merge or --quantise the result is compared with what was trained, and refused where it differs too much.
    """
    with importing():
        from liaoyuan.checkpoint.sources import open_source

    if merge and source is None and model is None:
        from liaoyuan.checkpoint.adapters import base_of

        model = base_of(merge)
    source, target = one_of(source, model, "SOURCE", "--model"), one_of(target, out, "TARGET", "--out")
    if merge or quantise:
        refuse_with_export(to is not Kind.folder, bool(run_file or set_), step is not None, tokenizer is not None)
        value, size = dtype.value if dtype else None, shard_bytes(max_shard)
        run_export(
            source, target, merge, quantise, value, size, texts, task, max_divergence, max_drop, force, skip_bad, json
        )
        return
    if texts or skip_bad or task or max_divergence is not None or max_drop is not None:
        raise LiaoyuanError(
            "--texts, --skip-bad, --task, --max-divergence and --max-drop are for --merge and --quantise."
        )
    limit = shard_bytes(max_shard)
    if tokenizer and not (tokenizer / "tokenizer.json").exists():
        raise LiaoyuanError(f"--tokenizer {tokenizer}: there is no tokenizer.json.")
    if to is Kind.state and (dtype or tokenizer or force):
        raise LiaoyuanError(
            "With --to state the run file says dtype and tokenizer, and nothing is replaced by --force."
        )
    if to is Kind.state and run_file is None:
        raise LiaoyuanError("--to state needs --run-file: the training that will go on, with its corpus and optimiser.")
    if to is Kind.folder and (run_file or set_):
        raise LiaoyuanError("--run-file and --set are for --to state.")
    with _stoppable(), open_source(source, step) as opened:
        if to is Kind.state:
            result: dict[str, Any] = _to_state(opened, target, run_file, set_ or [])
            text = _state_summary(opened, result)
        else:
            done = _to_folder(opened, source, target, dtype.value if dtype else None, limit, tokenizer, force)
            result, text = asdict(done), _summary(opened, target, done)
        result = {"source": str(opened), "target": str(target), **result}
    print(json_format.dumps(result, indent=2) if json else text)


class Stopped(LiaoyuanError):  # noqa: N818  (not an error: it was asked for)
    """Ctrl-C came."""

    exit_code = 130


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped("Stopped; nothing was written. The same command begins again.") from None


def shard_bytes(text: str) -> int:
    """Return the bytes of a size such as 5GB; LiaoyuanError if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise LiaoyuanError(f"--max-shard {text} must be a size such as 5GB or 500MB.")
    return size


def _to_folder(
    opened: "Source", source: Path, target: Path, dtype: str | None, limit: int, tokenizer: Path | None, force: bool
) -> "Converted":
    from liaoyuan.checkpoint.convert import convert_to_folder, refuse_target
    from liaoyuan.cli.progress import bar

    refuse_target(target, source, force, mark="config.json")
    with bar("Convert") as report:
        return convert_to_folder(opened, target, dtype, limit, tokenizer, report)


def _to_state(opened: "Source", target: Path, run_file: Path | None, overrides: list[str]) -> dict[str, Any]:
    from liaoyuan import config as configuration
    from liaoyuan.checkpoint.fresh import write_fresh_state
    from liaoyuan.cli.progress import bar
    from liaoyuan.training.loop import STATE
    from liaoyuan.training.pretrain import PretrainConfig, first_state

    config = configuration.load(PretrainConfig, run_file, overrides)
    model, optimiser, extra = first_state(config, opened.config)
    if (target / STATE).exists() and any((target / STATE).iterdir()):
        raise LiaoyuanError(f"{target} already holds a run's checkpoints: choose another folder.")
    with bar("Convert") as report:
        size = write_fresh_state(opened, target / STATE, model, optimiser, extra, report)
    return {"state": str(target / STATE), "dtype": model.config.dtype, "bytes": size, "left_out": opened.left_out}


def _summary(opened: "Source", target: Path, done: "Converted") -> str:
    files = "1 file" if done.shards == 1 else f"{done.shards} files"
    lines = [f"{opened} -> {target}", f"  {done.bytes / 1e6:,.1f} MB of weights in {done.dtype}, {files}"]
    if "tokenizer.json" in done.files:
        lines.append(f"  beside them: {', '.join(done.files)}")
    else:
        lines.append("  no tokenizer was found: name its folder with --tokenizer, or copy tokenizer.json there.")
    if done.left_out:
        lines.append(f"  left out: {len(done.left_out)} tensors that the decoder does not need: {done.left_out[0]} ...")
    return "\n".join(lines)


def _state_summary(opened: "Source", result: dict[str, Any]) -> str:
    return (
        f"{opened} -> {result['state']}/step-000000\n"
        f"  {result['bytes'] / 1e6:,.1f} MB: weights in {result['dtype']}, and fresh moments of the optimiser (zero).\n"
        f"  The same run file goes on from it: liaoyuan train RUN_FILE --out {Path(result['state']).parent}"
    )
