"""The chat template: how messages become the text that a chat model reads.

Templates are Jinja, as in Hugging Face's `tokenizer_config.json`, and run in a sandbox: a template of a foreign model
can neither change what it is given nor reach Python. `CHAT_TEMPLATE` is the one of the models trained here.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes

from liaoyuan.data.opaque import Inspected, is_opaque, json_of
from liaoyuan.data.records import Message
from liaoyuan.errors import LiaoyuanError

# Thoughts of earlier turns are left out, as reasoning models do; only the last message shows its own, and a message
# that calls tools keeps it until the user speaks again. So an earlier answer looks like one that was given at once.
# Tools are written as Hermes and Qwen models do (JSON in <tools>, <tool_call> and <tool_response>).
CHAT_TEMPLATE = """\
{%- set turn = namespace(user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set turn.user = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools is defined and tools %}
    {{- '<|system|>' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
    {{- 'You can call these functions:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{% endfor %}
    {{- '\\n</tools>\\nA call is written as <tool_call>\\n' }}
    {{- '{"name": name, "arguments": arguments}\\n</tool_call><|end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|><think>' }}
        {%- if loop.last or (message.tool_calls and loop.index0 > turn.user) %}
            {{- message.reasoning_content or message.think or '' }}
        {%- endif %}
        {{- '</think>' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}{{- '\\n' }}{% endif %}
            {{- '<tool_call>\\n{"name": ' + call.function.name | tojson }}
            {{- ', "arguments": ' + call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|end|>' }}
    {%- elif message.role == 'tool' %}
        {%- set follows = not loop.first and messages[loop.index0 - 1].role == 'tool' %}
        {{- ('\\n' if follows else '<|user|>') + '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|end|>' }}{% endif %}
    {%- elif message.role in ['system', 'user'] %}
        {%- if not (tools is defined and tools and loop.first and message.role == 'system') %}
            {{- '<|' + message.role + '|>' + message.content + '<|end|>' }}
        {%- endif %}
    {%- else %}
        {{- raise_exception("the role must be system, user, assistant or tool, not '" + message.role + "'") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|><think>' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '</think>' }}{% endif %}
{%- endif %}
"""

# Filters that read a text, if at all, by its own methods (`tojson` is ours).
PLAIN_FILTERS = {"trim", "tojson", "length", "first", "last", "list", "default", "d", "selectattr", "rejectattr"}

Tools = Sequence[Mapping[str, Any]]
Template = Callable[[list[dict[str, Any]], bool, bool, Mapping[str, str], Tools | None], str]


def compile_template(source: str | None) -> Template | None:
    """Return the function (messages, generation prompt?, thinking?, special tokens, tools) -> text of a Jinja template.

    Raises:
        LiaoyuanError: the template is no Jinja; its function raises it when the template refuses the messages.
    """
    if source is None:
        return None
    try:
        template = _environment().from_string(source)
        has_functions = "functions" in jinja2.meta.find_undeclared_variables(_environment().parse(source))
    except jinja2.TemplateError as error:
        raise LiaoyuanError(f"The chat template cannot be read: {error}.") from error

    def fill(
        rows: list[dict[str, Any]],
        generation_prompt: bool,
        thinking: bool,
        tokens: Mapping[str, str],
        tools: Tools | None,
    ) -> str:
        now = datetime.datetime.now()
        try:
            return template.render(
                messages=rows,
                tools=tools,
                functions=_functions(tools) if has_functions else "",
                documents=None,
                # What templates of Llama and of Firefunction write of the day, each in its own form.
                date_string=now.strftime("%d %b %Y"),
                datetime=now.strftime("%b %d %Y"),
                add_generation_prompt=generation_prompt,
                enable_thinking=thinking,
                **tokens,
            )
        except Exception as error:  # a foreign template is code, so it can fail in any way
            raise LiaoyuanError(f"The chat template refused the messages: {error}.") from error

    return fill


def takes_tools(source: str | None) -> bool:
    """Return whether a template says anything of the tools that it is given."""
    if source is None:
        return False
    return bool({"tools", "functions"} & jinja2.meta.find_undeclared_variables(_environment().parse(source)))


@lru_cache(maxsize=8)
def only_places_texts(source: str | None) -> bool:
    """Return whether a template has nothing that could read a text without calling one of the text's own methods.

    What joins texts into one (`~`, macros, blocks that are set) hides from which texts the result was made.
    """
    if source is None:
        return False
    tree = _environment().parse(source)
    joins = (nodes.Concat, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Include)
    names = {node.name for node in tree.find_all(nodes.Filter)}
    called = {node.attr for node in tree.find_all(nodes.Getattr)}
    return not any(tree.find_all(joins)) and names <= PLAIN_FILTERS and not called & {"join", "format", "format_map"}


def plain_messages(messages: Sequence[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as templates take them: "role", "content", and "reasoning_content" if there was a thought.

    Of tools: the assistant's "tool_calls" with their arguments as objects (not as JSON text, as the API has them),
    "tool_call_id" and "name" of a tool's answer.

    Raises:
        LiaoyuanError: a message has no role, its content is neither text nor a list of text parts, or the arguments
            of a tool call are no JSON object.
    """
    return [_plain(message) for message in messages]


def _plain(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    values = message.model_dump() if isinstance(message, Message) else dict(message)
    if not isinstance(values.get("role"), str):
        raise LiaoyuanError("Every message must have a role: system, user, assistant or tool.")
    row: dict[str, Any] = {"role": values["role"], "content": _text(values.get("content"))}
    thought = values.get("think") or values.get("reasoning_content") or values.get("reasoning")
    if thought:
        row["reasoning_content"] = _text(thought)
    if values.get("tool_calls"):
        row["tool_calls"] = [_plain_call(call) for call in values["tool_calls"]]
    row |= {name: values[name] for name in ("tool_call_id", "name") if values.get(name)}
    return row


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise LiaoyuanError(f"The arguments of the call of '{function.get('name')}' must be the text of a JSON object.")
    plain = {"type": "function", "function": {"name": function.get("name"), "arguments": arguments}}
    return {"id": call["id"], **plain} if call.get("id") else plain


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
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with a short way to what templates ask most often: a field of a message."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]  # where the long way ends too, after a look for an attribute that a dict has not
        return super().getattr(obj, attribute)


def _functions(tools: Tools | None) -> str:
    """Return the tools as Firefunction's template knows them."""
    if is_opaque(tools):
        raise Inspected
    return json.dumps([*(tools or [])], indent=4, ensure_ascii=False)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    found = json_of(value)
    if found is None:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
    if indent is not None or ensure_ascii:
        raise Inspected
    return found


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """Reads the mark {% generation %} of some templates, which changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
