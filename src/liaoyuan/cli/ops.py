"""`liaoyuan ops`: where two runs part (compare), where a step's time goes (profile), kernels made ahead (build)."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liaoyuan.cli.process import importing
from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.compute.compare import Comparison
    from liaoyuan.compute.profile_subject import Mode

DIFFERENT = 1  # exit status of `compare` where the two differ beyond tolerance
ROWS, LENGTH = 2, 256  # of the batch that is compared, where --tokens does not say otherwise

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Operators: compare two runs, profile a step of one, build the kernels.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Run folder or model folder.")],
    b: Annotated[Path | None, typer.Argument(metavar="B", help="Another of the same architecture (none: A).")] = None,
    device: Annotated[str, typer.Option(help="One for both, or A's and B's: cpu,cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Likewise: float32,bfloat16 (auto: the model's own).")] = "auto",
    kernels: Annotated[
        str, typer.Option(help="Likewise: reference,native; or of one operator: auto,attention=reference.")
    ] = "auto",
    layout: Annotated[
        str | None, typer.Option(help="B is simulated processes: tp=2,fsdp=2 (gradients are compared).")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text to pass through (none: random tokens).")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens.")] = ROWS * LENGTH,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Share of the largest element (none: by dtype).")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every operator.")] = False,
    json: Json = False,
) -> None:
    """Name the first operator whose output or gradient differs between two runs. Exit status 1 if one does."""
    from liaoyuan.cli.ops_show import comparison_values, show_comparison

    found = _compare(a, b, device, dtype, kernels, layout, text, tokens, tolerance, json)
    if json:
        print(json_format.dumps(comparison_values(found)))
    else:
        show_comparison(found, every)
    if found.differs:
        raise typer.Exit(DIFFERENT)


@app.command()
def profile(
    run: Annotated[Path, typer.Argument(help="Run folder, model folder, or a run file (.toml).")],
    prefill: Annotated[bool, typer.Option("--prefill", help="A step is a prompt, not a training step.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="A step is one token of each sequence.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps measured, and as many plain ones.")] = 5,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a training step or prompt; of decoding, the context.")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Decoded at once.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, or an accelerator such as cuda or npu:1.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 (none: the model's own).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the run file.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for profile.html and profile.json.")] = None,
    json: Json = False,
) -> None:
    """Show where a step's time goes: each operator against what its FLOPs and bytes allow on this device."""
    with importing():
        from liaoyuan.cli.ops_show import show_profile
        from liaoyuan.cli.progress import bar
        from liaoyuan.compute.profile import profile as take
        from liaoyuan.compute.profile_page import profile_page
        from liaoyuan.compute.profile_subject import Size, open_subject
        from liaoyuan.device import select_device
        from liaoyuan.rundir import write_atomic, write_json

    size = Size(tokens, sequences, 2 * steps + 4)
    subject = open_subject(run, _mode(prefill, decode), select_device(device), dtype, size, set_ or [])
    with bar("Profile", quiet=json) as report:
        found = take(subject, steps, report)
    if out:
        write_json(out / "profile.json", found.to_dict())
        write_atomic(out / "profile.html", profile_page(found).html())
    if json:
        print(json_format.dumps(found.to_dict()))
    else:
        show_profile(found)
        print(*([f"\nThe picture is {out / 'profile.html'}."] if out else []))


@app.command()
def build() -> None:
    """Compile the kernels for this machine now; otherwise it happens when they are first used."""
    from liaoyuan.cli.progress import bar
    from liaoyuan.device import find_accelerator
    from liaoyuan.ops import build as compile_kernels
    from liaoyuan.ops import compile_ahead

    if accelerator := find_accelerator():  # first: where there is no C++ compiler, the other cannot be
        with bar(f"Kernels for {accelerator}") as report:
            own = compile_ahead(accelerator, report)
        print(f"{len(own)} operators have a kernel for {accelerator}: liaoyuan doctor ops says which, and why.")
    with bar("Kernels") as report:
        library = compile_kernels(report)
    print(f"The CPU kernels are in {library}.")


def _mode(prefill: bool, decode: bool) -> "Mode":
    if prefill and decode:
        raise LiaoyuanError("--prefill and --decode are two kinds of step: choose one.")
    return "prefill" if prefill else "decode" if decode else "train"


def _compare(
    a: Path, b: Path | None, device: str, dtype: str, kernels: str, layout: str | None, text: Path | None,
    tokens: int, tolerance: float | None, quiet: bool,
) -> "Comparison":  # fmt: skip
    with importing():
        from liaoyuan import config as configuration
        from liaoyuan.cli.progress import bar
        from liaoyuan.compute.compare import compare as run_both
        from liaoyuan.compute.compare import compare_layout
        from liaoyuan.compute.subject import random_stream, text_stream
        from liaoyuan.parallel import Layout

    rows = ROWS if layout is None else max(ROWS, tokens // LENGTH)
    length = max(1, tokens // rows)

    def stream(model: Any, tokenizer: Path | None, rows: int, length: int) -> Any:
        if text is None:
            return random_stream(model.config.vocab_size, rows, length)
        return text_stream(text, tokenizer, rows, length)

    ways = _ways(a, b, device, dtype, kernels)
    if layout is None:
        with bar("Compare", quiet) as report:
            return run_both(ways[0], ways[1], stream, rows, length, tolerance, report)
    if b is not None or ways[0] != ways[1]:
        raise LiaoyuanError(
            "--layout compares one process with simulated ones: leave out B and what tells the two apart."
        )
    axes = [axis.strip() for axis in layout.split(",")]
    return compare_layout(ways[0], configuration.load(Layout, None, axes), stream, rows, length, tolerance)


def _ways(a: Path, b: Path | None, device: str, dtype: str, kernels: str) -> list[Any]:
    from liaoyuan.compute.compare import Way
    from liaoyuan.device import select_device

    devices, dtypes, chosen = (
        _both(name, value) for name, value in (("device", device), ("dtype", dtype), ("kernels", kernels))
    )
    return [
        Way(folder, select_device(where), None if kind == "auto" else kind, _kernels(kernel))
        for folder, where, kind, kernel in zip((a, b or a), devices, dtypes, chosen, strict=True)
    ]


def _both(name: str, value: str) -> tuple[str, str]:
    """Return A's and B's part of an option's value."""
    parts = [part.strip() for part in value.split(",")]
    if len(parts) > 2 or not all(parts):
        raise LiaoyuanError(f"--{name} {value} must be one value for both, or two with a comma: A's and B's.")
    return parts[0], parts[-1]


def _kernels(value: str) -> dict[str, str]:
    """Return operator -> kernel from "native", or "attention=reference+linear=reference"."""
    pairs = [part.partition("=") for part in value.split("+")]
    return {operator if equals else "": kernel if equals else operator for operator, equals, kernel in pairs}
