"""Options that several verbs of `liaoyuan tune` have, and how they become settings."""

from pathlib import Path
from typing import Annotated, Any

import typer

RunFile = Annotated[Path | None, typer.Argument(help="TOML file with the settings (none: defaults).")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the run file.")]
Model = Annotated[Path | None, typer.Option(help="Folder of the model to begin with, with its tokenizer.")]
Out = Annotated[Path, typer.Option(help="Run folder; the result is its folder model, or adapter.")]
Lora = Annotated[bool, typer.Option("--lora", help="Train an adapter alone (method = lora, or as --set says).")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on with the good records if there are bad ones.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Judged = Annotated[Path | None, typer.Option(help="Examples with a chosen and a rejected answer.")]
HeldOut = Annotated[Path | None, typer.Option(help="Such records to measure on (none: a tenth of the prompts).")]
Task = Annotated[str | None, typer.Option(help="A task by its name, or a task file (TOML).")]
Problems = Annotated[Path | None, typer.Option(help="Problems, in place of the task file's own.")]


def read_config(schema: Any, run_file: Path | None, overrides: list[str] | None, shortcuts: dict[str, Any]) -> Any:
    """Return the config of a run file, with what overrides and shortcuts say over it.

    Raises:
        LiaoyuanError: it is wrong, or an override and a shortcut give one key different values.
    """
    from liaoyuan import config as configuration

    return configuration.load(schema, run_file, configuration.combine(overrides or [], shortcuts))


def adapter_method(lora: bool, overrides: list[str] | None) -> str | None:
    """Return the method that `--lora` stands for: "lora", but where an override names another one of adapters."""
    from liaoyuan import config as configuration

    named = configuration.overridden(overrides or [], "method")
    return "lora" if lora and named not in ("rslora", "dora") else None


def with_flags(overrides: list[str] | None, **flags: bool) -> list[str]:
    """Return the overrides, and those of the flags that are given; raises as `read_config` does."""
    from liaoyuan import config as configuration

    return configuration.combine(overrides or [], {key: True for key, given in flags.items() if given})
