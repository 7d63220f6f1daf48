"""`liaoyuan tune sft` and `liaoyuan tune rl`: teach a model by examples, or by checked answers."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liaoyuan.cli.tune_study import study

if TYPE_CHECKING:
    from liaoyuan.tuning.sft_run import SftConfig

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Teach a model: sft (examples), rl (checked answers)."
)

app.command()(study)

RunFile = Annotated[Path | None, typer.Argument(help="TOML file with the settings (none: defaults).")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the run file.")]
Model = Annotated[Path | None, typer.Option(help="Folder of the model to begin with, with its tokenizer.")]
Out = Annotated[Path, typer.Option(help="Run folder; the result is its folder model.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on with the good records if there are bad ones.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def sft(
    run_file: RunFile = None,
    set_: Set = None,
    model: Model = None,
    data: Annotated[Path | None, typer.Option(help="Examples to learn: .jsonl or .json, also .zst.")] = None,
    out: Out = Path("runs/sft"),
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Fine-tune on conversations; only the assistant's tokens are learned. Also under torchrun (FSDP)."""
    from liaoyuan.cli.progress import bar
    from liaoyuan.device import select_device
    from liaoyuan.parallel import start
    from liaoyuan.tuning.sft_run import run_sft

    config = sft_config(run_file, [*(set_ or []), *(["skip_bad=true"] if skip_bad else [])], model, data)
    world = start(select_device(config.device))
    try:
        with bar("SFT", quiet=not world.is_first) as report:
            result = run_sft(config, out, report, world)
        if world.is_first:
            _show(result, out, json)
    finally:
        world.close()


@app.command()
def rl(
    run_file: RunFile = None,
    set_: Set = None,
    model: Model = None,
    task: Annotated[str | None, typer.Option(help="addition, modular or countdown.")] = None,
    out: Out = Path("runs/rl"),
    json: Json = False,
) -> None:
    """Reinforce on fresh problems, rewarded by the checked answer alone; the best checkpoint is kept."""
    from liaoyuan.cli.progress import bar
    from liaoyuan.tuning.rl_run import RlConfig, run_rl

    config = _config(RlConfig, run_file, set_, {"model": model, "task": task})
    with bar("RL") as report:
        result = run_rl(config, out, report)
    _show(result, out, json)


def sft_config(run_file: Path | None, set_: list[str] | None, model: Path | None, data: Path | None) -> "SftConfig":
    """Return the resolved config of the verb's arguments."""
    from liaoyuan.tuning.sft_run import SftConfig

    config: SftConfig = _config(SftConfig, run_file, set_, {"model": model, "data": data})
    return config


def _config(schema: Any, run_file: Path | None, overrides: list[str] | None, shortcuts: dict[str, Any]) -> Any:
    from liaoyuan import config as configuration

    given = [f"{key}={json_format.dumps(str(value))}" for key, value in shortcuts.items() if value is not None]
    return configuration.load(schema, run_file, [*(overrides or []), *given])


def _show(result: dict[str, Any], out: Path, json: bool) -> None:
    if json:
        print(json_format.dumps(result))
        return
    for key, value in result.items():
        print(f"  {key}: {value:,.4g}" if isinstance(value, float) else f"  {key}: {value:,}")
    print(f"The model is in {out / 'model'}.")
