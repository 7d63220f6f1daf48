"""Published training runs, one a line of a CSV file: what it says, and None where it says nothing.

A row is refused only if there is nothing to predict or nothing to compare with; whatever else is missing makes the
interval wider (`plausible.py`). Notes are read for what sources write there in words: the unit, sharding, the network.
"""

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from liaoyuan.errors import LiaoyuanError, nearest

NEEDED = ("source", "model", "accelerator", "n_accel", "reported", "value")
REPORTED = {
    "step_time": "step_time",
    "tokens_per_s_per_gpu": "tokens",
    "tokens_per_s_per_npu": "tokens",
    "tokens_per_s_per_card": "tokens",
    "tokens_per_s_per_chip": "tokens",
    "tokens_per_s": "tokens_all",
    "samples_per_s": "samples_all",
    "tflops_per_gpu": "tflops",
    "tflops_per_npu": "tflops",
    "tflops_per_chip": "tflops",
    "tflops_per_card": "tflops",
    "mfu": "mfu",
    "hfu": "hfu",
    "gpu_hours_total": "card_hours",
}


@dataclass(frozen=True)
class Row:
    """A run as published. Sizes are counts, None where not stated.

    reported: "step_time" (s), "tokens" (tokens/s of one card), "tflops" (of one card), "mfu", "hfu" or "card_hours".
    tokens_seen: of the whole run, for card-hours. peaks: TFLOP/s by dtype, as stated. hardware: whether its FLOPs count
    recomputation. sharding: "none", "optimizer", "gradients" or "full"; sharded_over: among how many data-parallel
    cards; network_gb: GB/s of a node. compiled: whether kernels were fused by a compiler. program: how its notes begin.
    """

    line: int
    source: str
    model: str
    accelerator: str
    cards: int
    reported: str
    value: float
    params: float | None = None
    active: float | None = None
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None
    experts: int | None = None
    topk: int | None = None
    vocab: int | None = None
    seq_len: int | None = None
    batch: int | None = None
    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    dp: int | None = None
    cp: int | None = None
    ep: int | None = None
    micro_batch: int | None = None
    recompute: str | None = None
    dtype: str | None = None
    peaks: tuple[tuple[str, float], ...] = ()
    hardware: bool | None = None
    halved: bool | None = None
    sharding: str | None = None
    sharded_over: int | None = None
    compiled: bool | None = None
    program: str = ""
    network_gb: float | None = None
    tokens_seen: float | None = None

    @property
    def complete(self) -> bool:
        """Whether it states sizes, batch, layout and micro batch."""
        needed = (self.layers, self.hidden, self.ffn, self.seq_len, self.batch, self.tp, self.pp, self.micro_batch)
        return None not in needed


@dataclass(frozen=True)
class Refused:
    """A line of the file that cannot be scored, and why."""

    line: int
    source: str
    model: str
    reason: str


def read_rows(path: Path) -> tuple[tuple[Row, ...], tuple[Refused, ...]]:
    """Return the rows of a file, and the lines that are refused.

    Raises:
        LiaoyuanError: there is no such file, it is no CSV, or it lacks a column without which nothing can be said.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            lines = [(reader.line_num, cells) for cells in reader]
    except OSError as error:
        raise LiaoyuanError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise LiaoyuanError(f"{path} is no CSV file in UTF-8: {error}.") from error
    for name in NEEDED:
        if name not in header:
            raise LiaoyuanError(f"{path} has no column '{name}'{nearest(name, header) or '.'}")
    rows, refused = list[Row](), list[Refused]()
    for line, cells in lines:
        if not any(isinstance(cell, str) and cell.strip() for cell in cells.values()):
            continue
        texts = {key: (cell or "").strip() for key, cell in cells.items() if isinstance(key, str)}
        try:
            rows.append(_row(line, texts))
        except ValueError as error:
            refused.append(Refused(line, texts["source"], texts["model"], str(error)))
    return tuple(rows), tuple(refused)


def _row(line: int, cells: dict[str, str]) -> Row:
    notes = cells.get("notes", "")
    reported = REPORTED.get(cells["reported"].lower().replace("-", "_"))
    if not reported:
        raise ValueError(f"what it reports, '{cells['reported']}', is not known: {', '.join(REPORTED)}")
    value = _number(cells["value"])
    if value is None:
        raise ValueError(f"its value '{cells['value']}' is no positive number")
    cards = _count(cells["n_accel"])
    if cards is None:
        raise ValueError(f"its number of cards '{cells['n_accel']}' is no positive count")
    if not cells["accelerator"]:
        raise ValueError("it names no accelerator")
    params, hidden, layers = _number(cells.get("params_total", "")), _get(cells, "hidden"), _get(cells, "layers")
    if params is None and (hidden is None or layers is None):
        raise ValueError("neither weights nor layers and hidden size of its model are stated")
    batch, seq_len = _get(cells, "global_batch"), _get(cells, "seq_len")
    reported, value = _per_card(reported, value, cards, seq_len, notes)
    sharding, sharded_over = _sharding(notes)
    return Row(
        line=line,
        source=cells["source"],
        model=cells["model"],
        accelerator=cells["accelerator"],
        cards=cards,
        reported=reported,
        value=value,
        params=params,
        active=_number(cells.get("params_active", "")),
        layers=layers,
        hidden=hidden,
        heads=_get(cells, "heads"),
        kv_heads=_get(cells, "kv_heads"),
        ffn=_get(cells, "ffn"),
        experts=_get(cells, "experts"),
        topk=_get(cells, "topk"),
        vocab=_get(cells, "vocab"),
        seq_len=seq_len,
        batch=batch,
        tp=_get(cells, "tp"),
        pp=_get(cells, "pp"),
        vpp=_get(cells, "vpp"),
        dp=_get(cells, "dp"),
        cp=_get(cells, "cp"),
        ep=_get(cells, "ep"),
        micro_batch=_get(cells, "micro_batch"),
        recompute=_recompute(cells.get("recompute", "")),
        dtype=_dtype(cells.get("dtype", "")),
        peaks=_peaks(cells.get("peak_tflops_dtype", "")),
        hardware=_hardware(notes),
        halved=False if re.search(r"attention 3\*L\*2\*2|full attention", notes) else None,
        sharding=sharding,
        sharded_over=sharded_over,
        compiled=True if re.search(r"\bcompile", notes, re.I) else None,
        program=_program(notes),
        network_gb=_network(notes),
        tokens_seen=_tokens_seen(notes),
    )


def _per_card(reported: str, value: float, cards: int, seq_len: int | None, notes: str) -> tuple[str, float]:
    """Return what is compared: tokens/s of a card where the notes state them (how FLOPs are counted differs)."""
    if reported in ("tflops", "mfu", "hfu"):
        told = re.search(r"([\d.]+)\s*tokens/s(?:ec)?/(?:GPU|NPU|card|chip|device)", notes, re.I)
        if told and (rate := _number(told[1])) is not None:
            return "tokens", rate
        return reported, value / 100 if reported != "tflops" and value > 1.5 else value
    if reported == "tokens_all":
        return "tokens", value / cards
    if reported == "samples_all":
        if seq_len is None:
            raise ValueError("samples/s say nothing without a sequence length")
        return "tokens", value * seq_len / cards
    if reported == "card_hours" and _tokens_seen(notes) is None:
        raise ValueError("card-hours say nothing without the number of tokens ('for 1.4T tokens' in its notes)")
    return reported, value


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", "").rstrip("%"))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _count(text: str) -> int | None:
    value = _number(text)
    return int(value) if value is not None and value == int(value) else None


def _get(cells: dict[str, str], name: str) -> int | None:
    return _count(cells.get(name, ""))


def _recompute(text: str) -> str | None:
    text = text.lower()
    if text in ("none", "no", "off"):
        return "none"
    if text.startswith("selective"):
        return "selective"
    return "full" if text in ("full", "yes", "on") else None


def _dtype(text: str) -> str | None:
    text = text.lower()
    for sign, name in (("fp8", "float8"), ("float8", "float8"), ("mx", "float8"), ("bf16", "bfloat16")):
        if sign in text:
            return name
    if "fp16" in text or "float16" in text:
        return "float16"
    return "float32" if "fp32" in text or "float32" in text else None


def _peaks(text: str) -> tuple[tuple[str, float], ...]:
    """Return TFLOP/s by dtype of a text like '1979 fp8 / 989 bf16' or '~313-376 bf16' (whose middle is taken)."""
    found = list[tuple[str, float]]()
    for low, high, name in re.findall(r"([\d.]+)(?:\s*-\s*([\d.]+))?\s*(fp8|bf16|fp16|fp32|float8)", text.lower()):
        first = _number(low)
        if first is not None and (dtype := _dtype(name)):
            found.append((dtype, math.sqrt(first * (_number(high) or first))))
    return tuple(found)


def _hardware(notes: str) -> bool | None:
    if re.search(r"hardware|with recompute|incl\. recompute", notes, re.I):
        return True
    return False if re.search(r"model (tflops|flops)|\bhfu\b", notes, re.I) else None


def _sharding(notes: str) -> tuple[str | None, int | None]:
    if over := re.search(r"zero1=(\d+)", notes, re.I):
        return "optimizer", int(over[1])
    if re.search(r"hsdp", notes, re.I):
        return "full", 8
    signs = {"gradients": r"SHARD_GRAD_OP|ZeRO-?2", "full": r"FSDP|FULL_SHARD|ZeRO-?3|\b2D\b|\b4D\b"}
    signs["optimizer"] = r"zero-?1|distributed ?optimizer"
    return next((name for name, sign in signs.items() if re.search(sign, notes, re.I)), None), None


def _program(notes: str) -> str:
    """Return the words with which notes begin, if no figure is among them: where a source compares programs, which."""
    first = notes.partition(";")[0].strip()
    return first if ";" in notes and re.fullmatch(r"[A-Za-z+\- ]{3,40}", first) else ""


def _network(notes: str) -> float | None:
    """Return GB/s of a node."""
    if many := re.search(r"(\d+)\s*x\s*(\d+)\s*Gb(?:/s|ps)?\b", notes):
        return int(many[1]) * int(many[2]) / 8
    one = re.search(r"(\d+)\s*Gbps\s*(?:per node|inter-?node|node-node|internode)", notes)
    return int(one[1]) / 8 if one else None


def _tokens_seen(notes: str) -> float | None:
    told = re.search(r"for ([\d.]+)\s*(T|B) tokens", notes)
    number = _number(told[1]) if told else None
    return number * {"T": 1e12, "B": 1e9}[told[2]] if told and number else None
