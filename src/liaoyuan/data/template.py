"""The chat template: how messages become the text that a chat model reads.

Templates are Jinja, as in Hugging Face's `tokenizer_config.json`, and run in a sandbox: a template of a foreign model
can neither change what it is given nor reach Python. `CHAT_TEMPLATE` is the one of the models trained here.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from liaoyuan.data.records import Message
from liaoyuan.errors import LiaoyuanError

# Thoughts of earlier turns are left out, as reasoning models do; only the last message shows its own. So an earlier
# answer looks like one that was given at once.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|><think>' }}
        {%- if loop.last %}{{- message.reasoning_content or message.think or '' }}{% endif %}
        {{- '</think>' + message.content + '<|end|>' }}
    {%- elif message.role in ['system', 'user'] %}
        {{- '<|' + message.role + '|>' + message.content + '<|end|>' }}
    {%- else %}
        {{- raise_exception("the role must be system, user or assistant, not '" + message.role + "'") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|><think>' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '</think>' }}{% endif %}
{%- endif %}
"""

Template = Callable[[list[dict[str, Any]], bool, bool, Mapping[str, str]], str]


def compile_template(source: str | None) -> Template | None:
    """Return the function (messages, generation prompt?, thinking?, special tokens) -> text of a Jinja template.

    Raises:
        LiaoyuanError: the template is no Jinja; its function raises it when the template refuses the messages.
    """
    if source is None:
        return None
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise LiaoyuanError(f"The chat template cannot be read: {error}.") from error

    def fill(rows: list[dict[str, Any]], generation_prompt: bool, thinking: bool, tokens: Mapping[str, str]) -> str:
        try:
            return template.render(
                messages=rows,
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
                enable_thinking=thinking,
                **tokens,
            )
        except Exception as error:  # a foreign template is code, so it can fail in any way
            raise LiaoyuanError(f"The chat template refused the messages: {error}.") from error

    return fill


def plain_messages(messages: Sequence[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as templates take them: "role", "content", and "reasoning_content" if there was a thought.

    Raises:
        LiaoyuanError: a message has no role, or its content is neither text nor a list of text parts.
    """
    return [_plain(message) for message in messages]


def _plain(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    values = message.model_dump() if isinstance(message, Message) else dict(message)
    if not isinstance(values.get("role"), str):
        raise LiaoyuanError("Every message must have a role: system, user or assistant.")
    row = {"role": values["role"], "content": _text(values.get("content"))}
    thought = values.get("think") or values.get("reasoning_content") or values.get("reasoning")
    if thought:
        row["reasoning_content"] = _text(thought)
    return row


def _text(content: Any) -> str:
    """Return the text of a message's content, which clients also send as a list of parts."""
    if content is None:
        return ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise LiaoyuanError("A message's content must be text (only text parts are supported).")
    return "".join(part["text"] for part in parts)


def _environment() -> jinja2.Environment:
    """Return the environment that Hugging Face's templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """Reads the mark {% generation %} of some templates, which changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
