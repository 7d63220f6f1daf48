"""What processes of one user say to each other over a local stream: frames of JSON and bytes; nothing is unpickled.

A frame is two lengths (uint32, uint64, little-endian), an object in JSON, and bytes. Requests and events travel as the
object.
"""

import asyncio
import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.constraints.specification import Constraints, constraint_to_json
from liaoyuan.inference.request import Event, PromptLogprobs, Request, SamplingParams, TopLogprobs
from liaoyuan.inference.runner import Busy, Refused, Unavailable

LENGTHS = struct.Struct("<IQ")
MOST_HEADER, MOST_BYTES = 2**28, 2**32  # longer frames are a sign of a broken stream
KINDS = (Busy, Refused, Unavailable)  # of errors, which the other side tells apart
Header = dict[str, Any]


class Closed(LiaoyuanError):  # noqa: N818  (a state, not a fault)
    """The other process has closed the stream, or died."""


async def connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return a stream to the process that listens at a Unix socket.

    Raises:
        OSError: nobody listens, or too many are waiting to be heard.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    if writer.get_extra_info("peername") is None:  # the system said "try again", which asyncio takes for "soon"
        writer.close()
        raise ConnectionRefusedError(f"Too many wait at {path}.")
    return reader, writer


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
        LiaoyuanError: its constraint is of a kind that does not travel.
    """
    sampling, constraint = request.sampling, request.sampling.constraint
    plain = dataclasses.asdict(dataclasses.replace(request, sampling=dataclasses.replace(sampling, constraint=None)))
    plain["sampling"]["constraint"] = constraint and constraint_to_json(constraint)
    return plain


def request_from_json(values: Header, constraints: Constraints | None = None) -> Request:
    """Undo `request_to_json`; constraints: builds the request's. LiaoyuanError if the values are no request."""
    try:
        given = {key: _tuples(value) for key, value in values["sampling"].items() if key != "constraint"}
        demanded = values["sampling"]["constraint"]
        if demanded and constraints is None:
            raise LiaoyuanError("A worker without a tokenizer can hold no constraint.")
        constraint = constraints.build(demanded) if demanded and constraints else None
        sampling = SamplingParams(**given, constraint=constraint)
        request = Request(**values | {"prompt": tuple(values["prompt"]), "sampling": sampling})
    except (KeyError, TypeError, AttributeError) as error:
        raise LiaoyuanError(f"This is no request: {error}.") from error
    return request


def event_to_frame(event: Event) -> tuple[Header, bytes]:
    """Return an event as a frame: its masks are the bytes; its `error` is called "why", since a header with "error" is
    a refusal.
    """
    values = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    prompt, masks = event.prompt and dataclasses.asdict(event.prompt), np.array(values.pop("masks"), dtype=np.int32)
    return values | {"why": values.pop("error"), "prompt": prompt, "masks": len(masks)}, masks.tobytes()


def event_from_frame(header: Header, data: bytes) -> Event:
    """Undo `event_to_frame`; LiaoyuanError if the frame is no event."""
    try:
        prompt = header["prompt"] and PromptLogprobs(
            header["prompt"]["logprobs"], top_from_json(header["prompt"]["top"])
        )
        masks = list(np.frombuffer(data, dtype=np.int32).reshape(header["masks"], -1)) if header["masks"] else []
        values = header | {"top_logprobs": top_from_json(header["top_logprobs"]), "prompt": prompt, "masks": masks}
        values["error"] = values.pop("why")
        return Event(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise LiaoyuanError(f"This is no event: {error}.") from error


def error_to_json(error: Exception) -> Header:
    """Return an error as a header, with its kind if that tells the other side what to do."""
    kind = type(error).__name__ if type(error) in KINDS else "LiaoyuanError"
    return {"error": str(error), "kind": kind}


def error_from_json(header: Header) -> LiaoyuanError:
    """Undo `error_to_json`."""
    kinds = {kind.__name__: kind for kind in KINDS}
    return kinds.get(str(header.get("kind")), LiaoyuanError)(str(header["error"]))


def top_from_json(lists: list[list[list[Any]]]) -> list[TopLogprobs]:
    """Return lists of (token, log-probability), which JSON has as lists."""
    return [[(token, logprob) for token, logprob in one] for one in lists]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
