"""Requests of other APIs as chat requests: the pieces of one turn, which they list apart, become one message."""

from collections.abc import Collection
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from liaoyuan.serving.chat_body import ChatRequest
from liaoyuan.serving.errors import from_validation

JOINT = "\n\n"  # between texts of one turn that were given apart


def chat_request(fields: dict[str, Any]) -> ChatRequest:
    """Return the chat request with these fields. Raises ApiError if chat refuses one."""
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise from_validation(RequestValidationError(error.errors())) from error


def add_turn(messages: list[dict[str, Any]], message: dict[str, Any], joined: Collection[str]) -> None:
    """Append a message, or join it with the one before if both are of the same role, one of `joined`.

    Many chat templates refuse two turns of one role in a row.
    """
    last = messages[-1] if messages else None
    if last is None or last["role"] != message["role"] or message["role"] not in joined:
        messages.append(message)
        return
    for name in ("content", "reasoning_content"):
        texts = [text for text in (last.get(name), message.get(name)) if text]
        if texts:
            last[name] = JOINT.join(texts)
    if message.get("tool_calls"):
        last["tool_calls"] = [*last.get("tool_calls", []), *message["tool_calls"]]


def tool_call(id: str, name: str, arguments: str) -> dict[str, Any]:
    """Return a call of a tool as chat messages hold it; arguments: JSON."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
