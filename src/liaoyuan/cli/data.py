"""`liaoyuan data`: text becomes a corpus and its tokenizer; files of examples are converted and checked."""

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer

from liaoyuan.cli.groups import DefaultCommand

app = typer.Typer(
    cls=DefaultCommand,
    rich_markup_mode=None,
    help="Prepare data: a corpus from text (the command that is meant if none is named), records from examples.",
)


@app.command("corpus")
def data(
    run_file: Annotated[
        Path | None, typer.Argument(help="TOML file with the keys of a corpus (none: defaults).")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the run file.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Folder of .txt .md .rst .py .jsonl .jsonl.zst (default: Python's library).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder that the corpus is written to.")] = Path("runs/corpus"),
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Read text, drop duplicates, hold some out, train a tokenizer, tokenise. Run again to go on after a stop."""
    from liaoyuan import config as configuration
    from liaoyuan.cli.progress import bar
    from liaoyuan.data.corpus import CorpusConfig, prepare_corpus
    from liaoyuan.rundir import write_atomic

    config = configuration.load(CorpusConfig, run_file, set_ or [])
    if text is not None:
        config = config.model_copy(update={"text": text})
    with bar("Data") as report:
        corpus = prepare_corpus(config, out, report)
    write_atomic(out / "config.toml", configuration.to_toml(config))
    print(json_format.dumps(corpus.manifest, indent=2) if json else _summary(corpus.manifest, out))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Examples in any known layout: .jsonl, .json (also .zst), .parquet.")],
    out: Annotated[Path, typer.Argument(help="Records to write: .jsonl or .jsonl.zst.")],
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Write the good records if there are bad lines.")
    ] = False,
    licence: Annotated[str | None, typer.Option(help="Licence of records that name none.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Make records of a file: Alpaca, ShareGPT, messages, prompt/completion, chosen/rejected, labels, problem sets."""
    from liaoyuan.cli.data_show import show_tally
    from liaoyuan.cli.progress import bar
    from liaoyuan.data.converting import convert_file

    with bar("Convert") as report:
        tally = convert_file(source, out, skip_bad, licence or "", report)
    if json:
        print(json_format.dumps(tally.to_dict(), ensure_ascii=False))
        return
    show_tally(tally)
    print(f"The records are in {out}.")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Examples in any known layout: .jsonl, .json (also .zst), .parquet.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder of a model, whose tokenizer and template read them.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Say what is in a file of examples, what is wrong, and with --model how long it is and what of it is learned."""
    from liaoyuan.cli.data_show import show_contents
    from liaoyuan.cli.progress import bar
    from liaoyuan.data import Tokenizer
    from liaoyuan.data.checking import check as look

    with bar("Check") as report:
        found = look(file, Tokenizer.load(model) if model else None, report)
    if json:
        print(json_format.dumps(found.to_dict(), ensure_ascii=False))
    else:
        show_contents(found)
    if found.tally.bad or found.reason:
        raise typer.Exit(1)


def _summary(manifest: dict[str, Any], out: Path) -> str:
    rows = []
    for split, name in (("train", "training"), ("held_out", "held out")):
        documents, size, tokens = (manifest[key][split] for key in ("documents", "bytes", "tokens"))
        rows.append(
            f"  {name}: {documents:,} documents, {size / 1e6:.2f} MB, {tokens:,} tokens of {size / tokens:.2f} bytes"
        )
    dropped = f"  dropped: {manifest['duplicates']:,} exact duplicates; {manifest['skipped']:,} skipped"
    listed = f" (listed in {out / 'skipped.json'})" if manifest["skipped"] else ""
    return "\n".join([f"{manifest['source']['name']} -> {out}", *rows, dropped + listed])
