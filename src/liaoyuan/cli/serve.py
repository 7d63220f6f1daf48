"""`liaoyuan serve`: an OpenAI-compatible API and a chat page for a model folder."""

import json as json_text
from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[Path, typer.Option(help="Folder of the model (config.json, safetensors, tokenizer.json).")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")] = 8000,
    device: Annotated[str, typer.Option(help="auto, cpu, or an accelerator such as cuda:0.")] = "auto",
    exact: Annotated[bool, typer.Option("--exact", help="Prove at the start that no batch changes a bit.")] = False,
    name: Annotated[str | None, typer.Option(help="What the API calls the model; else the folder's name.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Say where it serves as one line of JSON.")] = False,
    tp: Annotated[int, typer.Option(min=1, help="Processes over which the model is spread (tensor parallel).")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Of these, how many share the experts; the rest cut each.")] = 1,
    replicas: Annotated[int, typer.Option(min=1, help="Servers of this model behind the one address.")] = 1,
    control: Annotated[
        bool, typer.Option("--control", help="Let clients pause, put to sleep, update weights.")
    ] = False,
    replica: Annotated[bool, typer.Option(help="End when standard input does.", hidden=True)] = False,
) -> None:
    """Serve a model: chat page and OpenAI-compatible API. Ctrl-C ends it."""
    from liaoyuan.cli.replicas import replica_command, run_replica, threads_of_each
    from liaoyuan.errors import LiaoyuanError
    from liaoyuan.inference import EngineConfig
    from liaoyuan.parallel import Layout
    from liaoyuan.serving import LOOPBACK, open_front, open_server

    if exact and tp > 1:
        raise LiaoyuanError("--exact is proven of a model in one process: leave out --tp, or --exact.")
    layout, engine = Layout(tp=tp, ep=ep, fsdp=1), EngineConfig(exact=exact or None)
    if replicas > 1:
        threads = threads_of_each(replicas)
        server = open_front(model, replica_command(), replicas, layout, threads, host, port)
    else:
        server = open_server(model, host, port, device, name, engine=engine, layout=layout, control=control)
    if json:
        print(json_text.dumps({"url": server.url, "api": server.url + "/v1"}), flush=True)
    else:
        if host not in LOOPBACK:
            print("Whoever can reach this machine can use it: there are no passwords.", flush=True)
        print(f"Chat page  {server.url}\nAPI        {server.url}/v1\nCtrl-C ends it.", flush=True)
    run_replica(server) if replica else server.run()
