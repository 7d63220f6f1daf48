"""Chat templates in the shapes that families of models have, in our words, and tokenizers that know their tokens."""

import json
from dataclasses import dataclass

from liaoyuan.data import Tokenizer
from liaoyuan.data.template import CHAT_TEMPLATE
from liaoyuan.data.tokenizer import SPECIAL_TOKENS

CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

LLAMA = """{{- bos_token }}{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# The system's words stand before those of the user that come next; there are no marks of turns but these.
MISTRAL = """{{- bos_token }}{%- set before = namespace(text='') %}
{%- for m in messages %}
  {%- if m.role == 'system' %}{% set before.text = m.content + '\\n\\n' %}
  {%- elif m.role == 'user' %}{{- '[INST] ' + before.text + m.content + ' [/INST]' }}{% set before.text = '' %}
  {%- else %}{{- ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""

GEMMA = """{{- bos_token }}{% set first = '' %}
{%- if messages[0].role == 'system' %}
  {%- set first = messages[0].content | trim + '\\n\\n' %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- for m in turns %}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}
  {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
  {%- if loop.first %}{{- first }}{% endif %}{{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

# Thoughts of turns before the last question are left out, and one may stand in the content itself.
QWEN = """{%- set last = namespace(user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
  {%- if m.role != 'assistant' %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
  {%- else %}
    {%- set said = m.content %}{% set thought = '' %}
    {%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
    {%- elif '</think>' in said %}
      {%- set thought = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
      {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > last.user and (loop.last or thought) %}
      {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}
    {%- else %}{{- said }}{% endif %}
    {{- '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

DEEPSEEK = """{{- bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{- m.content }}{% endif %}{% endfor %}
{%- for m in messages %}
  {%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}
  {%- elif m.role == 'assistant' %}{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """A template, what its tokens are called in place of ours, and whether marks of thoughts are special tokens."""

    template: str
    names: tuple[str, ...] = ()
    end: str = "<|end|>"
    is_special: bool = True


# begin of text, system, user, assistant, end of turn, thought, end of thought
FAMILIES = {
    "ours": Family(CHAT_TEMPLATE),
    "ChatML": Family(CHATML, ("<|endoftext|>", "<|im_start|>", "<|a|>", "<|b|>", "<|im_end|>"), "<|im_end|>"),
    "Llama": Family(
        LLAMA,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|a|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "Mistral": Family(MISTRAL, ("<s>", "<unk>", "[INST]", "[/INST]", "</s>"), "</s>"),
    "Gemma": Family(GEMMA, ("<bos>", "<start_of_turn>", "<a>", "<b>", "<end_of_turn>"), "<end_of_turn>"),
    "Qwen": Family(QWEN, ("<|endoftext|>", "<|im_start|>", "<|a|>", "<|b|>", "<|im_end|>"), "<|im_end|>", False),
    "DeepSeek": Family(
        DEEPSEEK, ("<｜begin▁of▁sentence｜>", "<｜a｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        "<｜end▁of▁sentence｜>", False,
    ),
}  # fmt: skip


def family_tokenizer(base: Tokenizer, family: Family) -> Tokenizer:
    """Return `base` with the tokens and template of a family."""
    values = json.loads(base._library.to_str())
    names = dict(zip(SPECIAL_TOKENS, family.names, strict=False))
    for token in values["added_tokens"]:
        token["special"] = family.is_special or "think" not in token["content"]
        token["content"] = names.get(token["content"], token["content"])
    vocabulary = values["model"]["vocab"]
    values["model"]["vocab"] = {names.get(token, token): index for token, index in vocabulary.items()}
    settings = {
        "bos_token": names.get("<|end_of_text|>", "<|end_of_text|>"),
        "eos_token": family.end,
        "chat_template": family.template,
    }
    return Tokenizer(json.dumps(values), settings)
