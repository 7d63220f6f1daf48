"""The many names by which clients ask that an answer have a form, as one grammar."""

from typing import Any

from liaoyuan.inference.constraints.grammar import Grammar, choice, ebnf, json_schema, regex
from liaoyuan.serving.errors import invalid
from liaoyuan.serving.protocol import ResponseFormat, Sampling, StructuredOutputs

JSON_OBJECT: dict[str, Any] = {"type": "object"}


def asked_grammar(body: Sampling) -> tuple[str, Grammar] | None:
    """Return the field by which a request asks for a grammar, and the grammar; None: any text.

    Raises:
        ApiError: it asks for two, or for one that is incomplete.
    """
    asked: dict[str, Grammar | None] = {
        "response_format": _of_format(body.response_format),
        "structured_outputs": _of_structured(body.structured_outputs),
        "guided_json": None if body.guided_json is None else json_schema(body.guided_json),
        "guided_regex": None if body.guided_regex is None else regex(body.guided_regex),
        "guided_choice": None if body.guided_choice is None else choice(body.guided_choice),
        "guided_grammar": None if body.guided_grammar is None else ebnf(body.guided_grammar),
        "grammar": ebnf(body.grammar) if body.grammar else None,
        "json_schema": None if body.json_schema is None else json_schema(body.json_schema),
    }
    return _only(asked)


def asked_schema(body: Sampling) -> dict[str, Any] | None:
    """Return the JSON schema of `response_format`; None if it asks for none."""
    wanted = body.response_format
    return None if wanted is None or wanted.type == "text" else _schema(wanted)


def _of_format(wanted: ResponseFormat | None) -> Grammar | None:
    return None if wanted is None or wanted.type == "text" else json_schema(_schema(wanted))


def _schema(wanted: ResponseFormat) -> dict[str, Any]:
    given = wanted.json_schema.schema_ if wanted.json_schema else wanted.schema_
    if given is None and wanted.type == "json_schema":
        raise invalid("'response_format' needs a 'json_schema' with a 'schema'.", "response_format")
    return given if isinstance(given, dict) else JSON_OBJECT if given is None else {"not": {}} if not given else {}


def _of_structured(wanted: StructuredOutputs | None) -> Grammar | None:
    if wanted is None:
        return None
    found = _only(
        {
            "json": None if wanted.json_ is None else json_schema(wanted.json_),
            "regex": None if wanted.regex is None else regex(wanted.regex),
            "choice": None if wanted.choice is None else choice(wanted.choice),
            "grammar": None if wanted.grammar is None else ebnf(wanted.grammar),
            "json_object": json_schema(JSON_OBJECT) if wanted.json_object else None,
        }
    )
    return found[1] if found else None


def _only(asked: dict[str, Grammar | None]) -> tuple[str, Grammar] | None:
    found = {name: grammar for name, grammar in asked.items() if grammar is not None}
    if len(found) > 1:
        first, second = list(found)[:2]
        raise invalid(f"'{first}' and '{second}' both ask for a form; give one of them.", second)
    return next(iter(found.items()), None)
