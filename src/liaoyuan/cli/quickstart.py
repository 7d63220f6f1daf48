"""`liaoyuan quickstart`: from raw text to a served model that thinks, in one command."""

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    text: Annotated[
        Path | None, typer.Option(help="Folder of text to learn from; without it Python's own library is read.")
    ] = None,
    run: Annotated[Path, typer.Option(help="Folder of the run; the same command goes on from what is there.")] = Path(
        "runs/quickstart"
    ),
    minutes: Annotated[float, typer.Option(min=0.1, help="About how long it may take here; fixes all sizes.")] = 10.0,
    seeds: Annotated[int, typer.Option(min=1, max=20, help="Repeat teaching and measuring; each adds time.")] = 1,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Serve the model when it is done.")] = True,
    port: Annotated[int, typer.Option(help="Port of the chat page and the API; 0 takes any free one.")] = 8000,
    json: Annotated[bool, typer.Option("--json", help="Print summary.json instead of a table.")] = False,
) -> None:
    """Text -> tokenizer -> model -> reasoner -> report -> chat page and API. Resumes after any interruption."""
    from liaoyuan.cli.quickstart_steps import run_quickstart, show
    from liaoyuan.serving import check_port, open_server

    if serve:
        check_port(port=port)
    model = run_quickstart(run, text, minutes, seeds, quiet=json)
    show(run, json)
    if serve:
        server = open_server(model, port=port, name="quickstart")
        print(f"Chat page  {server.url}\nAPI        {server.url}/v1\nCtrl-C ends it.", flush=True)
        server.run()
