"""The events of a reply of `/v1/responses`, and the response that they are about."""

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from liaoyuan.serving.chat import scored_token
from liaoyuan.serving.errors import ApiError
from liaoyuan.serving.generation import Job, Served
from liaoyuan.serving.responses_body import ResponsesRequest
from liaoyuan.serving.text import Piece
from liaoyuan.serving.timings import Timings

ServerEvent = dict[str, Any]


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"  # nobody can guess another's


@dataclass
class ResponseEvents:
    """Makes the events of one reply from its pieces."""

    served: Served
    body: ResponsesRequest
    job: Job
    id: str = field(default_factory=lambda: _new_id("resp"))
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._number = -1  # of the last event
        self._output: list[dict[str, Any]] = []
        self._open = ""  # the kind of the item that is not done yet
        self._text: list[str] = []  # of that item
        self._logprobs: list[dict[str, Any]] = []
        self._last: Piece | None = None
        self._timings = Timings(len(self.job.prompt))

    def next_events(self, piece: Piece) -> Iterator[ServerEvent]:
        """Yield the events that say one piece."""
        if self._last is None:
            yield self._event("response.created", response=self._response("in_progress"))
            yield self._event("response.in_progress", response=self._response("in_progress"))
        self._last = piece
        self._timings.saw(piece)
        if piece.read is not None:
            progress = {"prompt_progress": self._timings.progress(piece)}
            yield self._event("response.in_progress", response=self._response("in_progress"), **progress)
        if piece.reasoning:
            yield from self._reason(piece.reasoning)
        if piece.content:
            yield from self._say(piece)
        for call in piece.calls:
            if call.name:
                item = {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": ""}
                yield from self._begin(f"call {call.index}", _new_id("fc"), item)
            if call.arguments:
                self._text.append(call.arguments)
                yield self._of_item("response.function_call_arguments.delta", delta=call.arguments)
        if piece.finish_reason:
            yield from self._end(piece)

    def failed(self, error: ApiError) -> Iterator[ServerEvent]:
        """Yield the events that end a reply that an error cut off."""
        response = self._response("failed") | {"error": {"code": "server_error", "message": error.message}}
        yield self._event("response.failed", response=response)

    def _reason(self, text: str) -> Iterator[ServerEvent]:
        if self._open != "reasoning":
            yield from self._begin("reasoning", _new_id("rs"), {"type": "reasoning", "summary": [], "content": []})
            yield self._of_part("response.content_part.added", part={"type": "reasoning_text", "text": ""})
        self._text.append(text)
        yield self._of_part("response.reasoning_text.delta", delta=text)

    def _say(self, piece: Piece) -> Iterator[ServerEvent]:
        if self._open != "message":
            item = {"type": "message", "role": "assistant", "content": []}
            yield from self._begin("message", _new_id("msg"), item)
            yield self._of_part("response.content_part.added", part=self._text_part())
        self._text.append(piece.content)
        scores = [scored_token(self.served.tokenizer, token) for token in piece.tokens] if self.body.logprobs else []
        self._logprobs += scores
        yield self._of_part("response.output_text.delta", delta=piece.content, logprobs=scores, **self._timed(piece))

    def _begin(self, kind: str, id: str, item: dict[str, Any]) -> Iterator[ServerEvent]:
        """Open an item and close the one before."""
        yield from self._close("completed")
        self._open, self._text, self._logprobs = kind, [], []
        self._output.append({"id": id, "status": "in_progress", **item})
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=self._output[-1])

    def _close(self, status: str) -> Iterator[ServerEvent]:
        if not self._open:
            return
        text, item = "".join(self._text), self._output[-1]
        if self._open == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": text}
            yield self._of_part("response.reasoning_text.done", text=text)
        elif self._open == "message":
            part = self._text_part()
            yield self._of_part("response.output_text.done", text=text, logprobs=self._logprobs)
        else:
            yield self._of_item("response.function_call_arguments.done", name=item["name"], arguments=text)
            self._output[-1] = {**item, "status": status, "arguments": text}
        if "content" in item:
            yield self._of_part("response.content_part.done", part=part)
            self._output[-1] = {**item, "status": status, "content": [part]}
        self._open = ""
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=self._output[-1])

    def _end(self, piece: Piece) -> Iterator[ServerEvent]:
        cut_off = piece.finish_reason in ("length", "timeout")
        if not cut_off and not any(item["type"] != "reasoning" for item in self._output):
            yield from self._say(piece)  # an answer without a word is still a message
        yield from self._close("incomplete" if cut_off else "completed")
        response = self._response("incomplete" if cut_off else "completed")
        if cut_off:
            response |= {"incomplete_details": {"reason": "max_output_tokens"}}
        else:
            response |= {"completed_at": int(time.time())}
        yield self._event(f"response.{response['status']}", response=response, **self._timed(piece))

    def _timed(self, piece: Piece) -> dict[str, Any]:
        return {"timings": self._timings.values(piece)} if self.body.timings_per_token else {}

    def _event(self, kind: str, **values: Any) -> ServerEvent:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **values}

    def _of_item(self, kind: str, **values: Any) -> ServerEvent:
        return self._event(kind, item_id=self._output[-1]["id"], output_index=len(self._output) - 1, **values)

    def _of_part(self, kind: str, **values: Any) -> ServerEvent:
        return self._of_item(kind, content_index=0, **values)

    def _text_part(self) -> dict[str, Any]:
        text = "".join(self._text)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def _response(self, status: str) -> dict[str, Any]:
        """Return the response as far as it is done, with what was asked."""
        body = self.body.model_dump(by_alias=True, exclude_none=True, include=ECHOED)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.served.answering,
            "output": list(self._output),
            "usage": self._usage() if status != "in_progress" else None,
            "error": None,
            "incomplete_details": None,
            **UNASKED,
            **self.served.settings.sampling.model_dump(include={"temperature", "top_p"}, exclude_none=True),
            **body,
            "store": self.body.store is not False,
        }

    def _usage(self) -> dict[str, Any]:
        last = self._last
        output, reasoning, cached = (
            (last.completion_tokens, last.reasoning_tokens, last.cached_tokens) if last else (0, 0, 0)
        )
        return {
            "input_tokens": len(self.job.prompt),
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": len(self.job.prompt) + output,
        }


# What a response says of its request where the request says nothing.
UNASKED: dict[str, Any] = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
}
ECHOED = UNASKED.keys() - {"background", "truncation"}
