"""Errors of the API, in the shape that OpenAI's clients know: `{"error": {message, type, param, code}}`.

Under `ANTHROPIC_PATH` they have Anthropic's: `{"type": "error", "error": {type, message}}`.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from liaoyuan.errors import LiaoyuanError, nearest

SEVERAL_FORMS = {  # of these fields pydantic would name the first form only
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "a text or a list of texts",
    "tool_choice": 'none, auto, required, a {"type": "function", "function": {"name": ...}}, or allowed_tools',
    "function_call": 'none, auto, or {"name": ...}',
    "guided_json": "a JSON schema, as an object or as text",
    "json_schema": "a JSON schema",
}
ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {  # by status; any other below 500 is an invalid_request_error, from 500 on an api_error
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
MOST_SHOWN = 80  # characters of a wrong value that an error repeats
TOO_LONG = "context_length_exceeded"  # OpenAI's code of a prompt that does not fit
RETRY_AFTER_SECONDS = 1  # a full queue of short answers drains in about this time


class ErrorDetail(BaseModel):
    """What is wrong, in a sentence and in OpenAI's names."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every refusal."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {  # for the description of the API
    "4XX": {"model": ErrorReply, "description": "The request is refused; the body says why."},
    "5XX": {"model": ErrorReply, "description": "The server cannot answer; the body says why."},
}


class AnthropicDetail(BaseModel):
    """What is wrong, in a sentence and in Anthropic's names."""

    type: str
    message: str


class AnthropicErrorReply(BaseModel):
    """The body of every refusal under `ANTHROPIC_PATH`."""

    type: str
    error: AnthropicDetail


ANTHROPIC_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**reply, "model": AnthropicErrorReply} for status, reply in ERRORS.items()
}


class ApiError(Exception):
    """A request that is refused, with its HTTP status and OpenAI's names for what is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        more: Mapping[str, int] = {},
    ) -> None:
        """more: further fields of the error for clients of llama.cpp."""
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.more = status, message, param, code, more

    def body(self) -> dict[str, Any]:
        """Return the JSON body of the reply."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def llama_body(self) -> dict[str, Any]:
        """Return the JSON body of the reply to a client of llama.cpp, which has a type of its own for a long prompt."""
        kind = {"type": "exceed_context_size_error"} if self.code == TOO_LONG else {}
        return {"error": {**self.body()["error"], **kind, **self.more}}

    def anthropic_body(self) -> dict[str, Any]:
        """Return the JSON body of the reply to a client of Anthropic's API."""
        kind = ANTHROPIC_TYPES.get(self.status)
        kind = kind or ("api_error" if self.status >= 500 else "invalid_request_error")
        details = {"details": {"error_code": self.code}} if self.code else {}
        return {"type": "error", "error": {"type": kind, "message": self.message, **details}}

    def response(self, path: str) -> JSONResponse:
        """Return the reply to a request for `path`, whose API says what errors look like."""
        headers = {
            401: {"WWW-Authenticate": "Bearer"},
            429: {"Retry-After": str(RETRY_AFTER_SECONDS)},
            503: {"Retry-After": str(RETRY_AFTER_SECONDS)},
        }.get(self.status)
        if path.startswith(ANTHROPIC_PATH):
            body = self.anthropic_body()
        else:  # paths without a version are llama.cpp's
            body = self.body() if path.startswith("/v1/") else self.llama_body()
        return JSONResponse(body, self.status, headers)


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that makes no sense (status 400)."""
    return ApiError(400, message, param, code)


def too_long(prompt: int, asked: int, context: int, param: str) -> ApiError:
    """Return the error of a prompt of so many tokens, and so many asked for (0: any), that the context cannot hold."""
    wanted = f" and {asked} more are asked for, which together" if asked else ", which"
    message = f"The prompt has {prompt} tokens{wanted} exceeds the available context size ({context} tokens)."
    remedy = "Shorten the prompt or max_tokens."
    return ApiError(400, f"{message} {remedy}", param, TOO_LONG, {"n_prompt_tokens": prompt, "n_ctx": context})


def unsupported(param: str, what: str) -> ApiError:
    """Return the error of a request for something that this server cannot do."""
    return invalid(f"'{param}' is not supported by this server: {what}", param, "unsupported_parameter")


def add_handlers(app: FastAPI) -> None:
    """Make every refusal of `app` an error body of this shape."""
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(LiaoyuanError, _cannot)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientGoneError, _gone)
    app.add_exception_handler(Exception, _defect)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def _cannot(request: Request, error: Exception) -> JSONResponse:
    return invalid(str(error)).response(request.url.path)


async def _malformed(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return from_validation(error).response(request.url.path)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    messages = {
        400: "The body of the request is not valid JSON.",
        404: f"There is nothing at {request.url.path}.",
        405: f"{request.url.path} does not answer {request.method}.",
    }
    refusal = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
    reply = refusal.response(request.url.path)
    reply.headers.update(error.headers or {})  # 405 says what is allowed
    return reply


async def _gone(request: Request, error: Exception) -> JSONResponse:
    return ApiError(499, "The client closed the request.").response(request.url.path)  # nobody reads it


async def _defect(request: Request, error: Exception) -> JSONResponse:
    return ApiError(500, "The server failed to answer; its log says why.").response(request.url.path)


def from_validation(error: RequestValidationError) -> ApiError:
    """Return the first thing that is wrong with a body as an ApiError; an unknown field names the nearest right one."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    if path and path[0] in SEVERAL_FORMS:
        return invalid(f"The field '{path[0]}' must be {SEVERAL_FORMS[path[0]]}.", path[0], "invalid_value")
    param = ".".join(path)
    if first["type"] == "json_invalid":
        return invalid("The body of the request is not valid JSON.")
    if first["type"] == "missing" and not path:
        return invalid("The request has no body; send a JSON object.")
    if first["type"] == "missing":
        return invalid(f"{_missing(error)} missing.", param, "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        hint = nearest(path[-1], first.get("ctx", {}).get("known", ())) or "."
        return invalid(f"Unknown field '{param}'{hint}", param, "unknown_parameter")
    if not path:
        return invalid("The body of the request must be a JSON object, sent with Content-Type: application/json.")
    given = first["input"] if isinstance(first["input"], str | int | float) else ""
    found = f" ({first['type']}; it is {str(given)[:MOST_SHOWN]!r})" if given != "" else ""
    return invalid(f"The field '{param}' is wrong: {first['msg']}{found}.", param, "invalid_value")


def _missing(error: RequestValidationError) -> str:
    """Return which fields a body lacks, as the beginning of a sentence: all of the object in which the first lacks."""
    places = [each["loc"] for each in error.errors() if each["type"] == "missing"]
    together = [place for place in places if place[:-1] == places[0][:-1]]
    named = " and ".join(f"'{'.'.join(str(part) for part in place if part != 'body')}'" for place in together)
    return f"The field {named} is" if len(together) == 1 else f"The fields {named} are"
