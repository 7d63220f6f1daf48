"""Tool calls: the forms in which models write them, and what the API makes of them.

A model calls tools in the form that its chat template taught it. `FORMATS` describes the forms that are known;
`call_reader` reads them as they come, `call_grammar` holds a model to them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from liaoyuan.errors import LiaoyuanError, nearest


@dataclass(frozen=True)
class CallPiece:
    """What one event adds to a tool call: `id` and `name` with the first piece of a call, then text of its arguments.

    index: which call of the answer. arguments: put together, they are the text of a JSON object, also where the
    model has failed at it.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Call:
    """A whole tool call; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


def whole_calls(pieces: Iterable[CallPiece]) -> list[Call]:
    """Return the calls that pieces make when they are put together."""
    calls: list[Call] = []
    for piece in pieces:
        if piece.index == len(calls):
            calls.append(Call(piece.id, piece.name, ""))
        calls[piece.index] = replace(calls[piece.index], arguments=calls[piece.index].arguments + piece.arguments)
    return calls


def joined(pieces: Iterable[CallPiece]) -> tuple[CallPiece, ...]:
    """Return pieces with those of one call that follow each other put together."""
    found: list[CallPiece] = []
    for piece in pieces:
        if found and found[-1].index == piece.index:
            found[-1] = replace(found[-1], arguments=found[-1].arguments + piece.arguments)
        else:
            found.append(piece)
    return tuple(found)


@dataclass(frozen=True)
class CallFormat:
    """How a model writes tool calls: open, then calls with `between` between them, then close.

    A call is `start`, a body, `end`. The body is by style:
        "object": {"name": name, "<arguments>": arguments}
        "named": name, `separator`, arguments
        "tagged": name, `separator`, and for each argument: key_open, name, key_close, value, value_close, where a text
            is written without quotes.
    White space around and within these marks is not significant when it is read. Marks may be special tokens.

    id_length: the ids of calls are so many letters and digits; 0: as OpenAI's.
    """

    name: str
    style: Literal["object", "named", "tagged"] = "object"
    open: str = ""
    start: str = ""
    separator: str = ""
    end: str = ""
    between: str = ""
    close: str = ""
    arguments: str = "arguments"
    key_open: str = ""
    key_close: str = ""
    value_close: str = ""
    id_length: int = 0

    @property
    def trigger(self) -> str:
        """What a model writes first when it calls a tool; "" if the call itself begins the answer."""
        return next(iter((self.open or self.start).split()), "")


FORMATS = (
    CallFormat(
        "qwen-xml",
        "tagged",
        start="<tool_call>\n<function=",
        separator=">\n",
        end="</function>\n</tool_call>",
        between="\n",
        key_open="<parameter=",
        key_close=">\n",
        value_close="\n</parameter>\n",
    ),
    CallFormat(
        "glm",
        "tagged",
        start="<tool_call>",
        separator="\n",
        end="</tool_call>",
        between="\n",
        key_open="<arg_key>",
        key_close="</arg_key>\n<arg_value>",
        value_close="</arg_value>\n",
    ),
    CallFormat(
        "deepseek-v3",
        "named",
        open="<｜tool▁calls▁begin｜>",
        start="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        separator="\n```json\n",
        end="\n```<｜tool▁call▁end｜>",
        between="\n",
        close="<｜tool▁calls▁end｜>",
    ),
    CallFormat(
        "deepseek-v3.1",
        "named",
        open="<｜tool▁calls▁begin｜>",
        start="<｜tool▁call▁begin｜>",
        separator="<｜tool▁sep｜>",
        end="<｜tool▁call▁end｜>",
        close="<｜tool▁calls▁end｜>",
    ),
    CallFormat(
        "mistral-args",
        "named",
        start="[TOOL_CALLS]",
        separator="[ARGS]",
        id_length=9,
    ),
    CallFormat("mistral", open="[TOOL_CALLS] [", between=", ", close="]", id_length=9),
    CallFormat("list", open="<tool_calls> [", between=", ", close="] </tool_calls>"),
    CallFormat("hermes", start="<tool_call>\n", end="\n</tool_call>", between="\n"),
    CallFormat("llama", between="; ", arguments="parameters"),
)


def named_format(name: str) -> CallFormat:
    """Return the form of that name. Raises LiaoyuanError if there is none."""
    found = next((form for form in FORMATS if form.name == name), None)
    if found is None:
        names = [form.name for form in FORMATS]
        hint = nearest(name, names) or "."
        raise LiaoyuanError(f"There is no form of tool calls '{name}'{hint} Known: {', '.join(names)}.")
    return found
