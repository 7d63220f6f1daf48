"""`liaoyuan tune sft` and `liaoyuan tune rl`: teach a model by examples, or by checked answers."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liaoyuan.cli.tune_study import study

if TYPE_CHECKING:
    from liaoyuan.tuning.sft_config import SftConfig

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Teach a model: sft (examples), rl (checked answers)."
)

app.command()(study)

RunFile = Annotated[Path | None, typer.Argument(help="TOML file with the settings (none: defaults).")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the run file.")]
Model = Annotated[Path | None, typer.Option(help="Folder of the model to begin with, with its tokenizer.")]
Out = Annotated[Path, typer.Option(help="Run folder; the result is its folder model.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def sft(
    run_file: RunFile = None,
    set_: Set = None,
    model: Model = None,
    data: Annotated[Path | None, typer.Option(help="Records to learn: .jsonl or .jsonl.zst.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train an adapter alone (method = lora).")] = False,
    validation: Annotated[Path | None, typer.Option(help="Held-out records; else 5% of the data.")] = None,
    out: Out = Path("runs/sft"),
    json: Json = False,
) -> None:
    """Fine-tune on conversations, of which the assistant's tokens are learned, or texts. Also under torchrun (FSDP)."""
    from liaoyuan.cli.progress import bar
    from liaoyuan.device import select_device
    from liaoyuan.parallel import start
    from liaoyuan.tuning.sft_run import run_sft

    config = sft_config(run_file, set_, model, data, lora, validation)
    world = start(select_device(config.device))
    try:
        with bar("SFT", quiet=not world.is_first) as report:
            result = run_sft(config, out, report, world)
        if world.is_first:
            _show_sft(result, config, out, json)
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


def sft_config(
    run_file: Path | None,
    set_: list[str] | None,
    model: Path | None,
    data: Path | None,
    lora: bool = False,
    validation: Path | None = None,
) -> "SftConfig":
    """Return the config of the verb's arguments."""
    from liaoyuan.tuning.sft_config import SftConfig

    shortcuts = {"model": model, "data": data, "method": "lora" if lora else None, "validation": validation}
    config: SftConfig = _config(SftConfig, run_file, set_, shortcuts)
    return config


def _config(schema: Any, run_file: Path | None, overrides: list[str] | None, shortcuts: dict[str, Any]) -> Any:
    from liaoyuan import config as configuration

    given = [f"{key}={json_format.dumps(str(value))}" for key, value in shortcuts.items() if value is not None]
    return configuration.load(schema, run_file, [*(overrides or []), *given])


def _show_sft(result: dict[str, Any], config: "SftConfig", out: Path, json: bool) -> None:
    from liaoyuan.cli.comparison import comparison_lines

    if json:
        print(json_format.dumps(result))
        return
    compared = result.pop("comparison", None)
    if config.method == "full":
        _show(result, out, json)
    else:
        print("\n".join(_figures(result)))
        print(f"The adapter is in {out / 'adapter'}; a model of its own is made of it by")
        print(f"  liaoyuan convert --merge {out / 'adapter'} --model {config.model} --out DIR")
    if compared:
        print("\n".join(comparison_lines(compared)))
    else:
        print("No records were held out, so nothing says what it learned: give more of them, or --validation FILE.")


def _figures(result: dict[str, Any]) -> list[str]:
    return [
        f"  {key}: {value:,.4g}" if isinstance(value, float) else f"  {key}: {value:,}" for key, value in result.items()
    ]


def _show(result: dict[str, Any], out: Path, json: bool) -> None:
    if json:
        print(json_format.dumps(result))
        return
    print("\n".join(_figures(result)))
    print(f"The model is in {out / 'model'}.")
