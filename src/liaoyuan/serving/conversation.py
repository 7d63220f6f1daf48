"""From a conversation and its options to jobs of the engine: the one way of every endpoint that answers messages.

An endpoint of another shape (Anthropic's messages, OpenAI's responses) says what it is asked as a `ChatRequest`,
runs `chat_jobs` with `generation.start`, and gives the pieces its own shape; `tools.whole_calls` puts calls together.
"""

from typing import Any

from liaoyuan.errors import LiaoyuanError
from liaoyuan.serving.errors import invalid
from liaoyuan.serving.generation import Job, Served, sampling_params
from liaoyuan.serving.protocol import ChatRequest, Message


def chat_jobs(served: Served, body: ChatRequest) -> list[Job]:
    """Return a job for each choice (`n`) of a request; call it in a thread, as prompts and grammars take a while.

    Raises:
        ApiError: the template refuses the messages, the prompt is too long, or a schema cannot be held.
    """
    prompt = _prompt(served, body)
    top_logprobs = body.top_logprobs or 0
    if top_logprobs and not body.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
    most = body.max_completion_tokens or body.max_tokens
    return [
        Job(prompt, sampling_params(served, body, prompt, most, top_logprobs, choice), body.stops(), served.marks)
        for choice in range(body.n or 1)
    ]


def _prompt(served: Served, body: ChatRequest) -> tuple[int, ...]:
    try:
        messages = [_message(message) for message in body.messages]
        return tuple(served.tokenizer.render(messages, thinking=body.thinking, generation_prompt=True))
    except LiaoyuanError as error:
        raise invalid(str(error), "messages") from error


def _message(message: Message) -> dict[str, Any]:
    """Return a message as chat templates know it ("developer" is OpenAI's newer name of "system")."""
    role = "system" if message.role == "developer" else message.role
    rendered: dict[str, Any] = {"role": role, "content": message.text()}
    thought = message.reasoning_content or message.reasoning
    if thought:
        rendered["reasoning_content"] = thought
    return rendered
