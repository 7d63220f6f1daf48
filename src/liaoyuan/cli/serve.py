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
    name: Annotated[str | None, typer.Option(help="What the API calls the model; else the folder's name.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Say where it serves as one line of JSON.")] = False,
    tp: Annotated[int, typer.Option(min=1, help="Processes over which the model is spread (tensor parallel).")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Of these, how many share the experts; the rest cut each.")] = 1,
    replicas: Annotated[int, typer.Option(min=1, help="Servers of this model behind the one address.")] = 1,
    control: Annotated[
        bool, typer.Option("--control", help="Let clients pause, put to sleep, update weights.")
    ] = False,
    replica: Annotated[bool, typer.Option(help="End when standard input does.", hidden=True)] = False,
    quantise: Annotated[str | None, typer.Option(help="Keep the weights in few bits: int8, int4 or fp8.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER of a low-rank adapter; may be repeated.")] = None,
    lora_folder: Annotated[Path | None, typer.Option(help="Clients may load adapters from inside it.")] = None,
) -> None:
    """Serve a model: chat page and OpenAI-compatible API. Ctrl-C ends it."""
    from liaoyuan.cli.replicas import replica_command, run_replica, threads_of_each
    from liaoyuan.models import quantisation_named
    from liaoyuan.parallel import Layout
    from liaoyuan.serving import LOOPBACK, open_front, open_server

    few_bits, adapters = quantisation_named(quantise), _adapters(lora or [])
    layout = Layout(tp=tp, ep=ep, fsdp=1)
    if replicas > 1:
        threads = threads_of_each(replicas)
        server = open_front(model, replica_command(), replicas, layout, threads, host, port)
    else:
        server = open_server(
            model,
            host,
            port,
            device,
            name,
            layout=layout,
            control=control,
            quantisation=few_bits,
            adapters=adapters,
            adapter_folder=lora_folder,
        )
    if json:
        print(json_text.dumps({"url": server.url, "api": server.url + "/v1"}), flush=True)
    else:
        if host not in LOOPBACK:
            print("Whoever can reach this machine can use it: there are no passwords.", flush=True)
        print(f"Chat page  {server.url}\nAPI        {server.url}/v1\nCtrl-C ends it.", flush=True)
    run_replica(server) if replica else server.run()


def _adapters(given: list[str]) -> dict[str, Path]:
    """Return the folder of each adapter of the command line."""
    from liaoyuan.errors import LiaoyuanError

    found: dict[str, Path] = {}
    for word in given:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder) or name in found:
            raise LiaoyuanError(f"--lora {word} must look like NAME=FOLDER, and each name may come once.")
        found[name] = Path(folder)
    return found
