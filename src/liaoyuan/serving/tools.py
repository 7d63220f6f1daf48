"""Tool calls: what a model writes to call a function, told apart from what it says."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


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
