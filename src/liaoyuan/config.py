"""Configuration: frozen pydantic models are the schema, TOML holds values, `--set a.b=value` overrides.

An unknown key is refused and the nearest right one is named. `load` reads, `to_toml` writes what was resolved.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from liaoyuan.errors import LiaoyuanError, nearest


class Config(BaseModel):
    """Base of every section of a run file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


Schema = TypeVar("Schema", bound=Config)
COMMAND_LINE = "the command line"  # where values come from if there is no run file


def load(schema: type[Schema], path: Path | None = None, overrides: Sequence[str] = ()) -> Schema:
    """Read the run file `path` (or start from nothing), apply `section.key=value` overrides, check.

    Raises:
        LiaoyuanError: the file is missing or no TOML, a key is unknown, or a value has the wrong type.
    """
    values = _read_toml(path) if path else {}
    for override in overrides:
        _apply(values, override)
    return parse(schema, values, where=str(path) if path else COMMAND_LINE)


def combine(overrides: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Return the overrides, and those that options of their own stand for: values by key, None where not given.

    Raises:
        LiaoyuanError: an override and an option give one key different values.
    """
    given = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    for key, value in given.items():
        found = overridden(overrides, key)
        if value is not None and found is not None and found != value:
            raise LiaoyuanError(
                f"'{key}' is given twice: {json.dumps(found, default=str)} with --set, and {json.dumps(value)} with "
                "an option of its own. Give it once."
            )
    return [*overrides, *(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None)]


def overridden(overrides: Sequence[str], key: str) -> Any:
    """Return what the overrides make of a key such as `train.steps`, None if they leave it alone."""
    told: dict[str, Any] = {}
    for override in overrides:
        _apply(told, override)
    return reduce(_within, key.split("."), told)


def _within(section: Any, name: str) -> Any:
    return section.get(name) if isinstance(section, dict) else None


def parse(schema: type[Schema], values: dict[str, Any], where: str) -> Schema:
    """Check `values` against `schema`; the first thing wrong becomes a `LiaoyuanError` that names `where`."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise LiaoyuanError(_sentence(schema, error, where)) from error


def to_toml(config: Config) -> str:
    """Return the TOML text of a resolved config; keys whose value is None are left out (TOML has no null)."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LiaoyuanError(f"The run file {path} does not exist.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise LiaoyuanError(f"The run file {path} cannot be read as TOML: {error}.") from error


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise LiaoyuanError(f"'--set {override}' must look like section.key=value, or key=value.")
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise LiaoyuanError(f"'--set {override}': '{section}' is a value, not a section.")
    values[last] = _value(text.strip())


def _value(text: str) -> Any:
    """Read `text` as a TOML value; what is none (a bare word, a path) is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _sentence(schema: type[BaseModel], error: ValidationError, where: str) -> str:
    errors = error.errors()
    # A mistyped key is often why another one is missing, so it comes first.
    first = next((found for found in errors if found["type"] == "extra_forbidden"), errors[0])
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        return f"Unknown key '{key}' in {where}{nearest(location[-1], _keys(schema, location[:-1])) or '.'}"
    if first["type"] == "missing":
        how = f": give it by its option (see --help), or as --set {key}=VALUE" if where == COMMAND_LINE else ""
        return f"The key '{key}' is missing in {where}{how}."
    if first["type"] in ("tuple_type", "list_type"):
        return f'The key \'{key}\' in {where} is wrong: write a list, as ["a", "b"] (it is {first["input"]!r}).'
    return f"The key '{key}' in {where} is wrong: {first['msg']} (it is {first['input']!r})."


def _keys(schema: type[BaseModel], sections: list[str]) -> list[str]:
    """Return the keys that the section reached through `sections` knows."""
    for section in sections:
        field = schema.model_fields.get(section)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        schema = inner
    return list(schema.model_fields)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
