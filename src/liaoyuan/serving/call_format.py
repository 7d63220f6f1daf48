"""Which form of tool calls a model was taught: its chat template is asked to write a call, and who can read it wins."""

from typing import Any

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.serving.call_reader import CallReader
from liaoyuan.serving.tools import FORMATS, CallFormat, whole_calls

MARK = "which?"  # a question, after whose last appearance the call stands
PROPERTY = {"type": "string", "description": "x"}
PARAMETERS = {"type": "object", "properties": {"x": PROPERTY}, "required": ["x"]}
TOOL = {"type": "function", "function": {"name": "probe", "description": "x", "parameters": PARAMETERS}}
ID = "abcdefghi"  # of the only kind that Mistral's templates take
CALL = {"id": ID, "type": "function", "function": {"name": "probe", "arguments": {"x": "y"}}}
TOLD: list[dict[str, Any]] = [
    {"role": "user", "content": MARK},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
]


def taught_format(tokenizer: Tokenizer) -> CallFormat | None:
    """Return the form in which a chat template writes calls; None if it knows no tools, or the form is not known."""
    if not tokenizer.takes_tools:
        return None
    try:
        prompt = tokenizer.render_text(TOLD[:1], tools=[TOOL])
        whole = tokenizer.render_text(TOLD, generation_prompt=False, tools=[TOOL])
    except LiaoyuanError:
        return None
    # What an answer begins with is what the prompt lacks; but a prompt may end with a thought that the call lacks.
    answers = (whole.removeprefix(_common(prompt, whole)), whole.rpartition(MARK)[2])
    return next((form for form in FORMATS for answer in answers if _reads(form, answer)), None)


def _common(first: str, second: str) -> str:
    """Return the longest beginning of both."""
    size = next((place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    return first[: min(len(first), len(second)) if size is None else size]


def _reads(form: CallFormat, answer: str) -> bool:
    reader = CallReader(form, {"probe": PARAMETERS})
    _, pieces = reader.feed(answer)
    _, rest = reader.finish()
    return [call.arguments.replace(" ", "") for call in whole_calls(pieces + rest)] == ['{"x":"y"}']
