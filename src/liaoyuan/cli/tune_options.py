"""Options that several verbs of `liaoyuan tune` have, and how they become settings."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RunFile = Annotated[Path | None, typer.Argument(help="TOML file with the settings (none: defaults).")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the run file.")]
Model = Annotated[Path | None, typer.Option(help="Folder of the model to begin with, with its tokenizer.")]
Out = Annotated[Path, typer.Option(help="Run folder; the result is its folder model, or adapter.")]
Lora = Annotated[bool, typer.Option("--lora", help="Train an adapter alone (method = lora).")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on with the good records if there are bad ones.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Judged = Annotated[Path | None, typer.Option(help="Examples with a chosen and a rejected answer.")]
HeldOut = Annotated[Path | None, typer.Option(help="Such records to measure on (none: a tenth of the prompts).")]
Task = Annotated[str | None, typer.Option(help="A task by its name, or a task file (TOML).")]
Problems = Annotated[Path | None, typer.Option(help="Problems, in place of the task file's own.")]


def read_config(schema: Any, run_file: Path | None, overrides: list[str] | None, shortcuts: dict[str, Any]) -> Any:
    """Return the config of a run file, the overrides over it, and the shortcuts that are given over both."""
    from liaoyuan import config as configuration

    given = {key: str(value) if isinstance(value, Path) else value for key, value in shortcuts.items()}
    told = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    return configuration.load(schema, run_file, [*(overrides or []), *told])
