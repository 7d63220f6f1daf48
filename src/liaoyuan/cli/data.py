"""`liaoyuan data`: text becomes a corpus and its tokenizer."""

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer


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
