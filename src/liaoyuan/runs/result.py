"""`result.json` as tables: whatever figures are in it, with their intervals, named in both languages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from liaoyuan.report import Text, Words
from liaoyuan.runs.text import as_text

MOST_ROWS, MOST_COLUMNS = 200, 12
MOST_CHARACTERS = 500  # of a text in a table
DEEPEST = 12  # objects within objects
WORDS: dict[str, Text] = {
    "start": Text("the model it began from", "起始模型"),
    "before": Text("before", "之前"),
    "after": Text("after", "之后"),
    "tuned": Text("the tuned model", "调优后的模型"),
    "model": Text("the tuned model", "调优后的模型"),
    "result": Text("the tuned model", "调优后的模型"),
    "difference": Text("difference", "差值"),
    "model - start": Text("difference", "差值"),
    "accuracy": Text("accuracy", "正确率"),
    "held_out": Text("held out", "留出"),
    "general": Text("general text", "通用文本"),
    "perplexity": Text("perplexity", "困惑度"),
    "token_accuracy": Text("tokens foretold", "词元预测"),
    "margin": Text("margin", "差距"),
    "records": Text("records", "记录数"),
    "thought_tokens": Text("tokens of thought", "思考词元"),
    "greedy": Text("greedy", "贪心"),
    "sampled": Text("sampled", "采样"),
    "steps": Text("steps", "步数"),
    "updates": Text("updates", "更新次数"),
    "tokens": Text("tokens", "词元"),
    "seconds": Text("seconds", "秒"),
    "cpu_seconds": Text("CPU seconds", "CPU 秒"),
    "loss": Text("loss", "损失"),
    "validation": Text("validation", "验证"),
    "generated_tokens": Text("tokens generated", "生成词元"),
    "trained_tokens": Text("tokens trained on", "训练词元"),
    "rollout_seconds": Text("seconds of rollouts", "采样秒数"),
}
COMPARED = Text("compared", "比较")


@dataclass(frozen=True)
class Figure:
    """A number, or what stands in its place, and the ends of its interval if it has one."""

    value: str
    interval: tuple[str, str] | None = None


@dataclass(frozen=True)
class Compared:
    """Things that were measured alike: a row each, with a figure a column."""

    title: Words
    columns: list[Words]
    rows: list[tuple[Words, list[Figure]]]


@dataclass(frozen=True)
class Result:
    """What a run came to: what is compared, and plain facts."""

    tables: list[Compared]
    facts: list[tuple[Words, str]]


def tables_of(result: Mapping[str, Any]) -> Result:
    """Return the tables in a result: one of its objects of figures, one of each object of such objects."""
    tables: list[Compared] = []
    facts: list[tuple[Words, str]] = []
    together: dict[str, Mapping[str, Any]] = {}
    for key, value in list(result.items())[:MOST_ROWS]:
        if rows := _members(value):
            tables.append(_table(_named(key), rows))
        elif isinstance(value, Mapping) and any(map(_is_interval, value.values())):
            together[key] = value
        elif not isinstance(value, list):
            facts.append((_named(key), _figure(value).value))
    if together:
        tables.insert(0, _table(COMPARED, together))
    return Result(tables, facts)


def _members(value: Any) -> dict[str, Mapping[str, Any]]:
    """Return the objects in an object, but for intervals."""
    if not isinstance(value, Mapping):
        return {}
    inner = {key: each for key, each in value.items() if isinstance(each, Mapping) and each}
    return {key: each for key, each in list(inner.items())[:MOST_ROWS] if not _is_interval(each)}


def _table(title: Words, rows: Mapping[str, Mapping[str, Any]]) -> Compared:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))[:MOST_COLUMNS]
    figures = [(_named(row), [_figure(values.get(column)) for column in columns]) for row, values in rows.items()]
    return Compared(title, [*map(_named, columns)], figures)


def _named(key: str) -> Words:
    return WORDS.get(key, as_text(key).replace("_", " ")[:MOST_CHARACTERS])


def _is_interval(value: Any) -> bool:
    return isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value)


def _figure(value: Any, depth: int = 0) -> Figure:
    if isinstance(value, Mapping) and _is_interval(value):
        return Figure(_plain(value["mean"]), (_plain(value["low"]), _plain(value["high"])))
    if isinstance(value, Mapping) and depth < DEEPEST:
        parts = (f"{as_text(key).replace('_', ' ')} {_figure(inner, depth + 1).value}" for key, inner in value.items())
        return Figure(", ".join(parts)[:MOST_CHARACTERS])
    return Figure(_plain(value))


def _plain(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else as_text(value)[:MOST_CHARACTERS]
    if isinstance(value, int) and abs(value) < 10**15:
        return f"{value:,}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:,.4g}"
