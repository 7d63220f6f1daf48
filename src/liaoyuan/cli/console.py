"""`liaoyuan console`: the runs in a folder on a page that follows them."""

import json as json_text
from pathlib import Path
from typing import Annotated

import typer


def console(
    runs: Annotated[Path, typer.Argument(metavar="FOLDER", help="The run folders are in it, at any depth.")] = Path(
        "runs"
    ),
    port: Annotated[int, typer.Option(metavar="N", help="0 takes any free one.")] = 8100,
    json: Annotated[bool, typer.Option("--json", help="Say where it serves as one line of JSON.")] = False,
) -> None:
    """Show runs on a page of this machine: curves over each other, rollouts browsed. Ctrl-C ends it."""
    from liaoyuan.serving.console import open_console

    server = open_console(runs, port)
    print(json_text.dumps({"url": server.url}) if json else f"Console  {server.url}\nCtrl-C ends it.", flush=True)
    server.run()
