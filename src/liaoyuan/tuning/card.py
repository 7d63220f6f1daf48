"""The card of a model or an adapter: where it comes from, what it was taught with, how it was measured.

`README.md` is for people, with the YAML head that Hugging Face reads; the key `card` of `liaoyuan.json` holds the same
for machines (its other keys are the chat page's).
Every verb of `tune`, and `convert`, writes both with `write_card`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from liaoyuan.data import Record
from liaoyuan.rundir import read_json, write_atomic, write_json

README, MACHINE = "README.md", "liaoyuan.json"
SCHEMA = 1
UNKNOWN = "unknown"
Relation = Literal["finetune", "adapter", "merge", "quantized"]  # Hugging Face's words


@dataclass(frozen=True)
class DataSource:
    """How many records of a data set came from one source under one licence."""

    source: str
    licence: str
    records: int
    use: str = "learned"  # or "held out", "general text"


@dataclass(frozen=True)
class Card:
    """What a card says.

    base: the folder of the model that was begun with. data: what it learned from and was measured on.
    config: the resolved config of the run. scores, controls: figures by name, as the run has them; nested ones of
        `Interval.to_dict` become "mean (low to high)". notes: sentences that a reader must not miss.
    command: what makes the same again.
    """

    title: str
    relation: Relation
    base: Path
    method: str
    command: str
    data: Sequence[DataSource] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    controls: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def sources_of(records: Iterable[Record], use: str = "learned") -> list[DataSource]:
    """Return where records come from and under which licences, the most frequent first."""
    counts = Counter((record.source or UNKNOWN, record.licence or UNKNOWN) for record in records)
    return [DataSource(source, licence, count, use) for (source, licence), count in counts.most_common()]


def write_card(folder: Path, card: Card) -> None:
    """Write the card into the folder of a model or an adapter, over an older one."""
    licence = licence_of(card.base)
    base = {"folder": str(card.base), "licence": licence, "files": file_hashes(card.base)}
    machine = {
        "schema": SCHEMA,
        "title": card.title,
        "relation": card.relation,
        "base": base,
        "method": card.method,
        "data": [vars(source) for source in card.data],
        "config": card.config,
        "scores": card.scores,
        "controls": card.controls,
        "notes": list(card.notes),
        "command": card.command,
        "files": file_hashes(folder),
    }
    write_json(folder / MACHINE, {**_machine_file(folder), "card": machine})
    write_atomic(folder / README, _head(card, licence) + _body(card, machine))


def read_card(folder: Path) -> dict[str, Any]:
    """Return the card in a folder, as `write_card` wrote it for machines; empty if there is none."""
    found: dict[str, Any] = _machine_file(folder).get("card", {})
    return found


def _machine_file(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / MACHINE) if (folder / MACHINE).exists() else {}
    return found


def name_of(folder: Path) -> str:
    """Return what a model is called: by its folder, or by the run whose result it is."""
    place = folder.absolute()
    return place.parent.name if place.name == "model" else place.name


def licence_of(folder: Path) -> str:
    """Return the licence that the card of a model folder names, "unknown" if it names none."""
    known = read_card(folder).get("base", {}).get("licence")
    if isinstance(known, str) and known != UNKNOWN:
        return known
    path = folder / README
    if not path.is_file():
        return UNKNOWN
    head = re.match(r"---\n(.*?)\n---\n", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    line = head and re.search(r"^license:\s*[\"']?([\w.+-]+)", head[1], re.MULTILINE)
    return line[1] if line else UNKNOWN


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a folder's weights, config and tokenizer, by name."""
    names = [*folder.glob("*.safetensors"), *folder.glob("*config.json"), *folder.glob("tokenizer.json")]
    return {path.name: _sha256(path) for path in sorted(names)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _head(card: Card, licence: str) -> str:
    """Return the YAML head; its values are written as JSON, which is YAML too."""
    values: dict[str, Any] = {
        "license": licence,
        "base_model": name_of(card.base),
        "base_model_relation": card.relation,
        "pipeline_tag": "text-generation",
        "library_name": "peft" if card.relation == "adapter" else "transformers",
        "tags": ["liaoyuan"],
        "datasets": sorted({one.source for one in card.data if one.source != UNKNOWN}),
    }
    rows = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value]
    return "---\n" + "\n".join(rows) + "\n---\n"


def _body(card: Card, machine: Mapping[str, Any]) -> str:
    base = machine["base"]
    parts = [f"# {card.title}\n"]
    parts += [f"> {note}\n" for note in card.notes]
    parts.append(f"Made from `{base['folder']}` (licence: {base['licence']}) by {card.method}.\n")
    if card.data:
        rows = [(one.use, one.source, one.licence, f"{one.records:,}") for one in card.data]
        parts.append("## Data\n\n" + _table(("use", "source", "licence", "records"), rows))
    for title, figures in (("Scores", card.scores), ("Controls", card.controls)):
        if figures:
            parts.append(f"## {title}\n\n" + _table(("figure", "value"), list(_flat(figures))))
    parts.append(f"## Made again by\n\n```\n{card.command}\n```\n")
    if card.config:
        parts.append("## Settings\n\n" + _table(("key", "value"), list(_flat(card.config))))
    hashes = [(name, f"`{value[:16]}`") for name, value in machine["files"].items()]
    hashes += [(f"{name} of the base", f"`{value[:16]}`") for name, value in base["files"].items()]
    parts.append("## Hashes (SHA-256, the first 16 digits)\n\n" + _table(("file", "hash"), hashes))
    return "\n" + "\n".join(parts)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |\n" for row in lines)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        name = prefix + key.replace("_", " ")
        if isinstance(value, Mapping) and set(value) == {"mean", "low", "high"}:
            yield name, f"{value['mean']:.4g} ({value['low']:.4g} to {value['high']:.4g})"
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{name}, ")
        else:
            yield name, f"{value:.4g}" if isinstance(value, float) else str(value)
