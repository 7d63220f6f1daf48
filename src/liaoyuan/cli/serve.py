"""`liaoyuan serve`: an OpenAI-compatible API and a chat page for a model folder."""

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liaoyuan.cli.process import allow_open_files, importing

if TYPE_CHECKING:
    from liaoyuan.inference.spread.balance import Balancing

REBALANCE_SECONDS = 60  # between two looks at where experts should lie, where there is room for copies
ENGINE, DOOR, MANY = "The engine's sizes", "Who may ask, and how much", "Many processes"


def serve(
    model: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the model, as Hugging Face has it.")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="What the API calls it; else the folder's.")] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, or one such as cuda:0.")] = "auto",
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="0.0.0.0 lets others in; a,b: both.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 takes any free one.")] = 8000,
    json: Annotated[bool, typer.Option("--json", help="Say where it serves as one line of JSON.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="As sampling.seed=1; see docs/serve.md."),
    ] = None,
    call_format: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="How it calls tools; else by its template.", rich_help_panel=ENGINE),
    ] = None,
    no_thinking: Annotated[
        bool, typer.Option("--no-thinking", help="Answer at once unless a request asks.", rich_help_panel=ENGINE)
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Prove at the start that no batch changes a bit.", rich_help_panel=ENGINE)
    ] = False,
    max_sequences: Annotated[
        int, typer.Option(min=1, metavar="N", help="Requests that run at once.", rich_help_panel=ENGINE)
    ] = 256,
    cache_gb: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="GB", help="For keys and values; else 1, or most of a card.", rich_help_panel=ENGINE
        ),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Most tokens of a request; else the model's.", rich_help_panel=ENGINE),
    ] = None,
    speculate: Annotated[
        str, typer.Option(metavar="HOW", help="Guess next tokens: ngram, or mtp.", rich_help_panel=ENGINE)
    ] = "",
    draft: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A small model that guesses them.", rich_help_panel=ENGINE)
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="May come several times.", rich_help_panel=DOOR)
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A line is a key, or a name and a key.", rich_help_panel=DOOR)
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(metavar="SITE", help="Its pages may ask (CORS).", rich_help_panel=DOOR)
    ] = None,
    control: Annotated[
        bool,
        typer.Option("--control", help="Who may ask may pause it and change its weights.", rich_help_panel=DOOR),
    ] = False,
    max_body_mb: Annotated[
        float, typer.Option(min=0, metavar="MB", help="Largest body of a request.", rich_help_panel=DOOR)
    ] = 4.0,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="HTTP requests answered at once.", rich_help_panel=DOOR)
    ] = None,
    max_queued: Annotated[
        int, typer.Option(min=0, metavar="N", help="Requests that may wait.", rich_help_panel=DOOR)
    ] = 256,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Within which an answer must end.", rich_help_panel=DOOR),
    ] = None,
    tp: Annotated[int, typer.Option(min=1, metavar="N", help="Processes per replica.", rich_help_panel=MANY)] = 1,
    ep: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many of them share the experts.", rich_help_panel=MANY)
    ] = 1,
    expert_copies: Annotated[
        int, typer.Option(min=0, metavar="N", help="Slots of each for busy experts.", rich_help_panel=MANY)
    ] = 0,
    rebalance_every: Annotated[
        str, typer.Option(metavar="S", help="Seconds between two moves of experts, or off.", rich_help_panel=MANY)
    ] = "",
    replicas: Annotated[
        int, typer.Option(min=1, metavar="N", help="Servers behind this address.", rich_help_panel=MANY)
    ] = 1,
    prefill: Annotated[
        int, typer.Option(min=0, metavar="N", help="Processes for prompts alone.", rich_help_panel=MANY)
    ] = 0,
    decode: Annotated[
        int, typer.Option(min=0, metavar="N", help="And for all else; both or none.", rich_help_panel=MANY)
    ] = 0,
    quantise: Annotated[
        str | None, typer.Option(metavar="KIND", help="Weights in int8, int4 or fp8.", rich_help_panel=ENGINE)
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="A low-rank adapter.", rich_help_panel=ENGINE)
    ] = None,
    lora_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Clients may load adapters of it.", rich_help_panel=DOOR)
    ] = None,
    replica: Annotated[bool, typer.Option(help="End when standard input does.", hidden=True)] = False,
) -> None:
    """Serve a model: chat page and OpenAI-compatible API. Ctrl-C ends it."""
    allow_open_files()
    with importing():
        from liaoyuan import config as configuration
        from liaoyuan.cli.replicas import replica_command, run_replica, threads_of_each
        from liaoyuan.errors import LiaoyuanError
        from liaoyuan.inference import EngineConfig
        from liaoyuan.models import quantisation_named
        from liaoyuan.parallel import Layout
        from liaoyuan.serving import Access, Settings, Sides, is_loopback, open_front, open_server, read_keys

    if bool(prefill) != bool(decode):
        raise LiaoyuanError("--prefill and --decode go together: say how many processes each side has, say 1 and 1.")
    if prefill and (tp > 1 or ep > 1 or replicas > 1 or expert_copies or rebalance_every):
        raise LiaoyuanError(
            "--prefill and --decode have one process for each worker, and one address: leave out --tp, --ep, "
            "--expert-copies, --rebalance-every and --replicas, or have more of each side."
        )
    keys = read_keys(api_key or (), api_key_file)
    access = Access(
        keys=keys,
        origins=tuple(allow_origin or ()),
        max_body_bytes=int(max_body_mb * 2**20),
        max_concurrent=max_concurrent,
        timeout=timeout,
    )
    if speculate not in ("", "ngram", "mtp"):
        raise LiaoyuanError(
            f"There is no speculation '{speculate}'; there are ngram (from the tokens before), mtp (by the model's own "
            "layer for it), and --draft FOLDER."
        )
    engine = EngineConfig(
        speculate=speculate,
        max_sequences=max_sequences,
        max_batch_tokens=max(EngineConfig().max_batch_tokens, max_sequences),
        cache_bytes=None if cache_gb is None else int(cache_gb * 2**30),
        exact=exact or None,
    )
    settings = configuration.load(Settings, None, set_ or [])
    few_bits, adapters = quantisation_named(quantise), _adapters(lora or [])
    layout = Layout(tp=tp, ep=ep, fsdp=1, exact=exact)
    balancing = read_balancing(expert_copies, rebalance_every)
    if replicas > 1:
        threads = threads_of_each(replicas)
        most = access.max_body_bytes
        server = open_front(model, replica_command(), replicas, layout, threads, host, port, most, balancing)
    else:
        server = open_server(
            model,
            host,
            port,
            device,
            name,
            engine=engine,
            access=access,
            max_queued=max_queued,
            context_length=context_length,
            control=control,
            thinking=not no_thinking,
            layout=layout,
            draft=draft,
            quantisation=few_bits,
            adapters=adapters,
            adapter_folder=lora_folder,
            call_format=call_format,
            sides=Sides(prefill, decode, threads_of_each(prefill + decode)) if prefill else None,
            settings=settings,
            balancing=balancing,
        )
    if json:
        print(json_text.dumps({"url": server.url, "api": server.url + "/v1"}), flush=True)
    else:
        if not is_loopback(host) and not keys:
            print("Whoever can reach this machine can use it: there are no keys (--api-key-file).", flush=True)
        page = f"Chat page  {server.url}\n" if settings.page else ""
        print(f"{page}API        {server.url}/v1\nCtrl-C ends it.", flush=True)
    run_replica(server) if replica else server.run()


def read_balancing(copies: int, every: str) -> "Balancing":
    """Return how experts are spread; by default they are moved where they have room for copies."""
    from liaoyuan.errors import LiaoyuanError
    from liaoyuan.inference.spread.balance import Balancing

    every = every or (str(REBALANCE_SECONDS) if copies else "off")
    if every == "off":
        return Balancing(copies)
    try:
        seconds = float(every)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise LiaoyuanError(f"--rebalance-every is a number of seconds, or off (it is '{every}').")
    return Balancing(copies, seconds)


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
