"""Holds a model to the form of its tool calls: a grammar of calls alone, or of text in which every call is right."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from liaoyuan.inference.constraints.grammar import Grammar, Vocabulary, lark, literal
from liaoyuan.inference.constraints.grammar_trial import WHITESPACE
from liaoyuan.serving.chat_body import Function
from liaoyuan.serving.tools import CallFormat

MOST_CALLS = 32  # of one answer

Spell = Callable[[str], str]


def calls_grammar(
    form: CallFormat,
    functions: Sequence[Function],
    vocabulary: Vocabulary,
    most: int | None = None,
    text: bool = False,
    answer: dict[str, Any] | None = None,
) -> Grammar:
    """Return the grammar of at least one call of these functions.

    Args:
        most: how many calls there may be.
        text: any text may stand before, between and after calls, and there need be no call; but one that is begun
            is right.
        answer: the answer may also be JSON of this schema instead.
    """
    spell = vocabulary.spelling
    rules = [f"call: {' | '.join(f'call{place}' for place in range(len(functions)))}"]
    for place, function in enumerate(functions):
        rules += _call(form, place, function, spell)
    return lark("\n".join([*_start(form, spell, most or MOST_CALLS, text, answer), *rules]))


def _start(form: CallFormat, spell: Spell, most: int, text: bool, answer: dict[str, Any] | None) -> list[str]:
    start, end = spell(form.start), spell(form.end)
    more = f"({spell(form.between)} {start} call {end}){{0,{most - 1}}}" if most > 1 else ""
    calls = f"calls: {spell(form.open)} {start} call {end} {more} {spell(form.close)}"
    if answer is not None:
        return ["start: calls | answer", calls, f"answer: %json {json.dumps(_held(answer, True), ensure_ascii=False)}"]
    if not text:
        return ["start: calls", calls]
    if not form.trigger:
        return ["start: calls | TEXT?", calls, r"TEXT: /[^{\s](?s:.*)/"]
    rest = spell((form.open or form.start)[len(form.trigger) :])
    inside = f"{rest} {start} call {end} {more} {spell(form.close)}" if form.open else f"{rest} call {end}"
    repeat = f"{{0,{most}}}"
    trigger = spell(form.trigger)
    head = f"head[lazy]: TEXT {trigger}" if trigger.startswith('"') else f"head: TEXT {trigger}"
    return [f"start: (head {inside}){repeat} tail", head, "tail: TEXT", "TEXT: /(?s:.*)/"]


def _call(form: CallFormat, place: int, function: Function, spell: Spell) -> list[str]:
    """Return the rules of a call of one function."""
    schema = _schema(function)
    if form.style == "tagged":
        return _tagged(form, place, function, schema, spell)
    arguments = f"arguments{place}: %json {json.dumps(_held(schema, bool(function.strict)), ensure_ascii=False)}"
    if form.style == "named":
        return [f"call{place}: {literal(function.name)} {spell(form.separator)} arguments{place}", arguments]
    begin = f'{{"name": {json.dumps(function.name)}, "{form.arguments}": '
    return [f'call{place}: {literal(begin)} arguments{place} "}}"', arguments]


def _tagged(form: CallFormat, place: int, function: Function, schema: dict[str, Any], spell: Spell) -> list[str]:
    """Return the rules of a call whose arguments are marked one by one, in the order of the schema."""
    properties = schema.get("properties")
    names = list(properties) if isinstance(properties, dict) else []
    required = schema.get("required") or []
    rules, parts = [], []
    for number, name in enumerate(names):
        rule = f"value{place}x{number}"
        parts.append(f"argument{place}x{number}" + ("" if name in required else "?"))
        rules.append(f"argument{place}x{number}: {spell(form.key_open)} {literal(name)} {spell(form.key_close)} {rule}")
        rules += _value(form, rule, properties[name], bool(function.strict), spell)  # type: ignore[index]
    return [f"call{place}: {literal(function.name)} {spell(form.separator)} {' '.join(parts)}", *rules]


def _value(form: CallFormat, rule: str, schema: Any, strict: bool, spell: Spell) -> list[str]:
    close = spell(form.value_close)
    if isinstance(schema, dict) and schema.get("type") == "string":
        if isinstance(schema.get("enum"), list):
            return [f"{rule}: ({' | '.join(literal(str(value)) for value in schema['enum'])}) {close}"]
        return [f"{rule}[suffix={literal(form.value_close)}]: /(?s:.*)/"]
    held = _held(schema if isinstance(schema, dict) else {}, strict)
    return [f"{rule}: {rule}j {close}", f"{rule}j: %json {json.dumps(held, ensure_ascii=False)}"]


def _schema(function: Function) -> dict[str, Any]:
    """Return the schema of the arguments, which are an object in any case; without one there are none."""
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **function.parameters}


def _held(schema: dict[str, Any], strict: bool) -> dict[str, Any]:
    """Return a schema with what the library is to make of it; what it cannot hold is left out unless it is strict."""
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": not strict}}
