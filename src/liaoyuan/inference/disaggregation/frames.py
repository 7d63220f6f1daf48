"""What processes of one user say to each other over a local stream: frames of JSON and bytes; nothing is unpickled.

A frame is two lengths (uint32, uint64, little-endian), an object in JSON, and bytes. Requests and events travel as the
object.
"""

import asyncio
import dataclasses
import json
import struct
from typing import Any

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.request import Event, PromptLogprobs, Request, SamplingParams

LENGTHS = struct.Struct("<IQ")
MOST_HEADER, MOST_BYTES = 2**28, 2**32  # longer frames are a sign of a broken stream
Header = dict[str, Any]


class Closed(LiaoyuanError):  # noqa: N818  (a state, not a fault)
    """The other process has closed the stream, or died."""


async def read_frame(reader: asyncio.StreamReader) -> tuple[Header, bytes]:
    """Return the next frame.

    Raises:
        Closed: there is none, or only a part of one. LiaoyuanError: it is none.
    """
    try:
        header_size, size = LENGTHS.unpack(await reader.readexactly(LENGTHS.size))
        if header_size > MOST_HEADER or size > MOST_BYTES:
            raise LiaoyuanError(f"A frame of {header_size} and {size} bytes is longer than any of ours.")
        text, data = await reader.readexactly(header_size), await reader.readexactly(size)
    except (asyncio.IncompleteReadError, OSError) as error:
        raise Closed("The other process has closed the stream.") from error
    try:
        header = json.loads(text)
    except ValueError as error:
        raise LiaoyuanError("A frame does not begin with JSON.") from error
    if not isinstance(header, dict):
        raise LiaoyuanError("A frame does not begin with an object.")
    return header, data


def put_frame(writer: asyncio.StreamWriter, header: Header, data: bytes = b"") -> None:
    """Send a frame some time; several tasks may do so on one stream."""
    text = json.dumps(header).encode()
    writer.write(LENGTHS.pack(len(text), len(data)) + text)
    if data:
        writer.write(data)


async def write_frame(writer: asyncio.StreamWriter, header: Header, data: bytes = b"") -> None:
    """Send a frame, and wait while the other side has much to read; raises Closed if it is gone."""
    try:
        put_frame(writer, header, data)
        await writer.drain()
    except OSError as error:
        raise Closed("The other process has closed the stream.") from error


def request_to_json(request: Request) -> Header:
    """Return a request as JSON's types.

    Raises:
        LiaoyuanError: it asks for what does not travel: constraints, masks.
    """
    if request.sampling.constraint is not None or request.sampling.return_masks:
        raise LiaoyuanError("Requests with a constraint or return_masks cannot go to another process yet.")
    return dataclasses.asdict(request)


def request_from_json(values: Header) -> Request:
    """Undo `request_to_json`; LiaoyuanError if the values are no request."""
    try:
        sampling = SamplingParams(**{key: _tuples(value) for key, value in values["sampling"].items()})
        request = Request(**values | {"prompt": tuple(values["prompt"]), "sampling": sampling})
    except (KeyError, TypeError, AttributeError) as error:
        raise LiaoyuanError(f"This is no request: {error}.") from error
    return request


def event_to_json(event: Event) -> Header:
    """Return an event as JSON's types; its `error` is called "why", since a header with "error" is a refusal."""
    values = dataclasses.asdict(event)
    return values | {"why": values.pop("error")}


def event_from_json(values: Header) -> Event:
    """Undo `event_to_json`; LiaoyuanError if the values are no event."""
    try:
        prompt = values["prompt"] and PromptLogprobs(values["prompt"]["logprobs"], _top(values["prompt"]["top"]))
        values = values | {"top_logprobs": _top(values["top_logprobs"]), "prompt": prompt, "error": values["why"]}
        return Event(**{name: value for name, value in values.items() if name != "why"})
    except (KeyError, TypeError) as error:
        raise LiaoyuanError(f"This is no event: {error}.") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _top(lists: list[list[list[Any]]]) -> list[list[tuple[int, float]]]:
    return [[(token, logprob) for token, logprob in one] for one in lists]
