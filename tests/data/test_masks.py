"""In templates of every shape, exactly that is learned which the engine would have to generate, turn by turn."""

import json
from itertools import accumulate

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from liaoyuan.data import Message, Record, Tokenizer, conversations, segments, tokenise, train_tokenizer
from liaoyuan.data.chat import Renderer
from liaoyuan.data.records import ToolCall
from liaoyuan.errors import LiaoyuanError

from .chat_templates import CHATML, FAMILIES, Family, family_tokenizer

WORDS = ["yes", "12+34=?", "可以燎原", "a b", "x\n\ny", "naïve café", "🙂"]
TRAPS = [" ", "\n", " lead", "trail \n", "<think>x</think>y", "</think>", "<|im_end|>", "</s>[INST]", "<end_of_turn>\n"]
TRAPS += ["<|end|>", "\ue0000\ue000", "<|eot_id|>", "<｜end▁of▁sentence｜>", "[/INST]", "\n\n", "<tool_call>"]
TAME = st.sampled_from(WORDS)
ANY = st.one_of(TAME, st.sampled_from(TRAPS), st.text(max_size=12))


@st.composite
def talks(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> Record:
    """A conversation in which each answer has a weight of its own, so that it is found again by it."""
    messages = [Message(role="system", content=draw(texts))] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 3))):
        messages.append(Message(role="user", content=draw(texts)))
        think = draw(st.one_of(st.just(""), texts))
        messages.append(Message(role="assistant", content=draw(texts), think=think, weight=(turn + 1) / 4))
    return Record(id="r", messages=tuple(messages))


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> tuple[str, Family, Tokenizer]:
    chosen = FAMILIES[request.param]
    return request.param, chosen, family_tokenizer(tokenizer, chosen)


def found(tokenizer: Tokenizer, record: Record) -> dict[int, str]:
    """Return the learned text of each answer, by its place among the messages."""
    places = {message.weight: place for place, message in enumerate(record.messages) if message.role == "assistant"}
    learned = [(ids, weight) for ids, weight in segments(tokenizer, record) if weight]
    return {places[weight]: tokenizer.decode(ids, skip_special=False) for ids, weight in learned}


def answer_of(name: str, message: Message, is_last: bool) -> str | None:
    """Return what a model of the family writes as this answer; None: the template never shows it so."""
    if name == "ours" and is_last and message.think:
        return f"{message.think}</think>{message.content}"
    if name == "Qwen" and message.think:
        return f"<think>\n{message.think}\n</think>\n\n{message.content}" if is_last else None
    return " " * (name == "Mistral") + message.content


JSON = st.recursive(
    st.one_of(ANY, st.integers(), st.booleans(), st.none(), st.just('quo"te')),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(ANY, inner, max_size=2)),
    max_leaves=4,
)
TOOLS = st.lists(
    st.builds(
        lambda name, told: {"type": "function", "function": {"name": name, "description": told}}, st.text("fg"), ANY
    ),
    max_size=2,
)


@st.composite
def calling_talks(draw: st.DrawFn) -> Record:
    """A conversation in which functions are called, with whatever JSON allows as names and arguments."""
    messages = [Message(role="user", content=draw(ANY))]
    for weight in (0.25, 0.5):
        names = draw(st.lists(st.sampled_from(["f", "搜索", 'g"', "<|end|>"]), min_size=1, max_size=2))
        arguments = st.dictionaries(ANY, JSON, max_size=2)
        calls = tuple(
            ToolCall(name=name, arguments=draw(arguments), id=draw(st.text("x", max_size=2))) for name in names
        )
        think, content = (draw(st.one_of(st.just(""), TAME)) for _ in range(2))
        messages.append(Message(role="assistant", content=content, think=think, tool_calls=calls, weight=weight))
        messages += [Message(role="tool", content=draw(ANY), tool_call_id=call.id, name=call.name) for call in calls]
    answer = Message(role="assistant", content=draw(st.sampled_from(WORDS)), weight=0.75)
    return Record(id="r", tools=tuple(draw(TOOLS)), messages=(*messages, answer))


@settings(max_examples=15, deadline=None)
@given(record=talks(TAME))
def test_what_is_learned_is_what_a_model_of_the_family_writes(
    family: tuple[str, Family, Tokenizer], record: Record
) -> None:
    name, chosen, tokenizer = family
    last = len(record.messages) - 1
    expected = {
        place: text + chosen.end
        for place, message in enumerate(record.messages)
        if message.role == "assistant" and (text := answer_of(name, message, place == last)) is not None
    }
    assert found(tokenizer, record) == expected


@settings(max_examples=25, deadline=None)
@given(record=talks(ANY))
def test_an_answer_follows_the_prompt_of_the_server_and_ends_where_the_engine_stops(
    family: tuple[str, Family, Tokenizer], record: Record
) -> None:
    _, _, tokenizer = family
    try:
        pieces = segments(tokenizer, record)
    except LiaoyuanError as error:
        assert "does not show where the answer is" in str(error)  # an answer that the template itself takes apart
        return
    ids = [index for piece, _ in pieces for index in piece]
    whole = tokenizer.render_text(record.messages, generation_prompt=False)
    assert tokenizer.decode(ids, skip_special=False) == whole
    places = {message.weight: place for place, message in enumerate(record.messages) if message.role == "assistant"}
    is_same = ids == tokenizer.render(record.messages, generation_prompt=False)
    ends = accumulate(len(piece) for piece, _ in pieces)
    for (piece, weight), end in zip(pieces, ends, strict=True):
        if not weight:
            continue
        prompts = [tokenizer.render(record.messages[: places[weight]], thinking) for thinking in (True, False)]
        before = ids[: end - len(piece)]
        if is_same:  # the server has the very tokens
            assert before in prompts
        else:  # an answer begins with what would be joined to the prompt: the same text, cut where the model begins
            texts = [tokenizer.decode(prompt, skip_special=False) for prompt in prompts]
            assert tokenizer.decode(before, skip_special=False) in texts
        assert piece[-1] in tokenizer.eos_ids
        assert not set(piece[:-1]) & set(tokenizer.eos_ids)


@settings(max_examples=25, deadline=None)
@given(records=st.lists(talks(ANY), min_size=1, max_size=4))
def test_shapes_that_came_before_change_nothing(family: tuple[str, Family, Tokenizer], records: list[Record]) -> None:
    """A form is filled in only where the template could not have told the texts from the stand-ins."""
    _, _, tokenizer = family
    assert_same_as_without_forms(tokenizer, records)


def assert_same_as_without_forms(tokenizer: Tokenizer, records: list[Record]) -> None:
    quick, slow = Renderer(tokenizer), Renderer(tokenizer)
    slow._is_plain = False
    for record in records:
        try:
            expected = slow(record)
        except LiaoyuanError as error:
            with pytest.raises(LiaoyuanError, match="Record 'r'"):
                quick(record)
            assert "Record 'r'" in str(error)
            continue
        assert quick(record).shown() == expected.shown()
        assert quick(record).weights == expected.weights


def test_most_conversations_go_by_their_form(family: tuple[str, Family, Tokenizer]) -> None:
    _, _, tokenizer = family
    renderer = Renderer(tokenizer)
    talk = (Message(role="user", content="a question"), Message(role="assistant", content="an answer"))
    assert renderer._is_plain
    assert renderer._by_form(Record(id="r", messages=talk)) is not None


# How templates of several families write calls and tools, and ways to look into them.
CALLING = {
    "Hermes": "{{ '<call>' + c.function.name | tojson + c.function.arguments | tojson }}",
    "Mistral": "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}",
    "Llama": "{{ c.function.name + c.function | tojson(indent=4) }}",
    "GLM": "{% for k, v in c.function.arguments.items() %}{{ k }}{{ v if v is string else v | tojson }}{% endfor %}",
    "the whole call": "{{ c | tojson }}",
    "a name": "{{ '!' if c.function.name == 'f' else c.function.name }}",
    "how many arguments": "{{ c.function.arguments | length }}",
    "an argument": "{{ c.function.arguments['yes'] }}",
    "another argument": "{{ c.function.arguments.yes }}",
    "whether there are any": "{{ '!' if c.function.arguments else '?' }}",
    "Python's own text": "{{ c.function.arguments }}",
    "no objects": "{{ '!' if c.function.arguments is string }}",
}


@pytest.mark.parametrize("look", CALLING.values(), ids=CALLING)
@settings(max_examples=5, deadline=None)
@given(records=st.lists(calling_talks(), min_size=1, max_size=3))
def test_calls_that_came_before_change_nothing(tokenizer: Tokenizer, look: str, records: list[Record]) -> None:
    template = (
        "{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{%- for m in messages %}"
        "{{- '<|im_start|>' + m.role + '\\n' + m.content }}{{ m.name or '' }}{{ m.tool_call_id or '' }}"
        "{%- for c in m.tool_calls or [] %}" + look + "{% endfor %}{{- '<|im_end|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
    )
    other = family_tokenizer(tokenizer, Family(template, FAMILIES["ChatML"].names, "<|im_end|>"))
    assert_same_as_without_forms(other, records)


@settings(max_examples=15, deadline=None)
@given(records=st.lists(calling_talks(), min_size=1, max_size=3))
def test_calls_in_our_own_template_change_nothing(tokenizer: Tokenizer, records: list[Record]) -> None:
    assert_same_as_without_forms(tokenizer, records)


@pytest.mark.parametrize("look", ["Hermes", "Mistral", "the whole call", "whether there are any", "no objects"])
def test_most_calls_go_by_their_form(tokenizer: Tokenizer, look: str) -> None:
    template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + m.content }}{%- for c in m.tool_calls or [] %}"
        + CALLING[look] + "{% endfor %}{{- '<|im_end|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{% endif %}"
    )  # fmt: skip
    other = family_tokenizer(tokenizer, Family(template, FAMILIES["ChatML"].names, "<|im_end|>"))
    call = ToolCall(name="f", arguments={"place": "合肥"}, id="1")
    talk = (Message(role="user", content="Weather?"), Message(role="assistant", tool_calls=(call,)))
    tools = ({"type": "function", "function": {"name": "f", "description": "Weather\nnow"}},)
    assert Renderer(other)._by_form(Record(id="r", messages=talk, tools=tools)) is not None


INSPECTING = {
    "length": "{{ '!' if m.content | length > 5 }}",
    "the first character": "{{ '!' if m.content[0] == 'a' }}",
    "capitals": "{{ m.content | upper }}",
    "a part": "{{ '!' if 'wer' in m.content }}",
    "the whole": "{{ '!' if m.content == 'an answer' }}",
    "joined and measured": "{% set x = m.content ~ '' %}{{ x | length }}",
    "a block": "{% set x %}{{ m.content }}{% endset %}{{ x | length }}",
    "JSON": "{{ m.content | tojson }}",
    "order": "{{ '!' if m.content < 'b' }}",
    "words": "{{ m.content.split() | length }}",
    "a macro": "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(m.content) | length }}",
    "formatted": "{{ ('%s' | format(m.content)) | length }}",
    "a key": "{{ {'an answer': '!'}.get(m.content, '?') }}",
}


@pytest.mark.parametrize("look", INSPECTING.values(), ids=INSPECTING)
def test_a_template_that_looks_into_texts_is_given_them(tokenizer: Tokenizer, look: str) -> None:
    template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}" + look + "{{- m.content + '<|im_end|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
    )
    other = family_tokenizer(tokenizer, Family(template, FAMILIES["ChatML"].names, "<|im_end|>"))
    renderer = Renderer(other)
    for text in ("bcd", "an answer", "a", "the answer", 'quo"te', "Ä"):
        talk = (Message(role="user", content=text), Message(role="assistant", content=text))
        shown = "".join(renderer(Record(id="r", messages=talk)).shown())
        assert shown == other.render_text(talk, generation_prompt=False)


def test_an_answer_that_begins_like_its_lost_thought_is_not_taken_for_it(tokenizer: Tokenizer) -> None:
    qwen = family_tokenizer(tokenizer, FAMILIES["Qwen"])
    turns = (("user", "q", ""), ("assistant", "yes, no", "yes"), ("user", "q", ""), ("assistant", "a", ""))
    talk = tuple(Message(role=role, content=text, think=think) for role, text, think in turns)
    for is_plain in (True, False):
        renderer = Renderer(qwen)
        renderer._is_plain = is_plain
        found = renderer(Record(id="r", messages=talk))
        assert [text for text, weight in zip(found.shown(), found.weights, strict=True) if weight] == ["a<|im_end|>"]


def test_an_answer_that_would_be_joined_to_its_prompt_is_cut_where_the_model_begins() -> None:
    base = train_tokenizer(["assistant\n\n\n\nyes\n\n\nno\n\n"] * 20, 300)
    tokenizer = family_tokenizer(base, FAMILIES["ChatML"])
    talk = (Message(role="user", content="q"), Message(role="assistant", content="\n\nyes"))
    (prompt, _), (answer, weight), _ = segments(tokenizer, Record(id="r", messages=talk))
    whole = tokenizer.render(talk, generation_prompt=False)
    assert prompt + answer != whole[: len(prompt + answer)]  # else nothing would be joined, and nothing shown here
    assert prompt == tokenizer.render(talk[:1])
    assert (tokenizer.decode(answer, skip_special=False), weight) == ("\n\nyes<|im_end|>", 1.0)


def spelling_spaces(scheme: str, template: str) -> Tokenizer:
    """Return a tokenizer whose pieces spell the space before a word, as SentencePiece's do."""
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    library.train_from_iterator(["the answer is yes and no, the question [INST] is what [/INST]"] * 9, trainer)
    values = json.loads(library.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer(json.dumps(values), {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})


def test_a_template_whose_prompt_runs_into_the_answer_is_named_with_the_place() -> None:
    template = "{% for m in messages %}{{ m.content + (' is ' if m.role == 'user' else eos_token) }}{% endfor %}"
    talk = (Message(role="user", content="the question"), Message(role="assistant", content="yes"))
    tokenizer = spelling_spaces("always", template)
    with pytest.raises(LiaoyuanError, match=r"one token, in 'the question is yes</s>'.*end a prompt with a line break"):
        segments(tokenizer, Record(id="r", messages=talk))


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_pieces_that_spell_the_space_before_a_word_are_cut_at_the_answer(scheme: str) -> None:
    tokenizer = spelling_spaces(scheme, FAMILIES["Mistral"].template)
    talk = (("user", "the question"), ("assistant", "the answer"), ("user", "what"), ("assistant", "yes, no"))
    record = Record(id="r", messages=tuple(Message(role=role, content=text) for role, text in talk))
    pieces = segments(tokenizer, record)
    ids = [index for piece, _ in pieces for index in piece]
    assert ids == tokenizer.render(record.messages, generation_prompt=False)
    begins = [len(tokenizer.render(record.messages[:place])) for place in (1, 3)]
    assert [len(pieces[0][0]), sum(len(piece) for piece, _ in pieces[:3])] == begins
    assert [weight for _, weight in pieces] == [0.0, 1.0, 0.0, 1.0]
    for place, begin in zip((1, 3), begins, strict=True):
        assert tokenizer.render(record.messages[:place]) == ids[:begin]


def test_records_with_tools_are_learned_by_the_models_own_template(tokenizer: Tokenizer) -> None:
    weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    row = {
        "id": "t",
        "tools": [weather],
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "think": "look", "tool_calls": [{"name": "weather", "arguments": {"place": "合肥"}}]},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "Rain."},
        ],
    }
    record = Record.model_validate(row)
    pieces = segments(tokenizer, record)
    assert [index for ids, _ in pieces for index in ids] == tokenizer.render(
        record.messages, generation_prompt=False, tools=record.tools
    )
    learned = [tokenizer.decode(ids, skip_special=False) for ids, weight in pieces if weight]
    call = '<tool_call>\n{"name": "weather", "arguments": {"place": "合肥"}}\n</tool_call><|end|>'
    assert learned == [f"look</think>{call}", "Rain.<|end|>"]


def test_of_a_preference_only_what_is_judged_is_learned(tokenizer: Tokenizer) -> None:
    asked = (
        Message(role="user", content="1"),
        Message(role="assistant", content="2"),
        Message(role="user", content="3"),
    )
    better, worse = ((Message(role="assistant", content=text),) for text in ("good", "bad"))
    record = Record(id="p", kind="preference", messages=asked, chosen=better, rejected=worse)
    texts = [[tokenizer.decode(ids, skip_special=False) for ids, weight in segments(tokenizer, side) if weight]
             for side in conversations(record)]  # fmt: skip
    assert texts == [["good<|end|>"], ["bad<|end|>"]]
    assert len(tokenise(tokenizer, [record])) == 2
    judged = Record(id="u", kind="unpaired", messages=(*asked, *worse), label=False)
    (only,) = conversations(judged)
    learned = [ids for ids, weight in segments(tokenizer, only) if weight]
    assert learned == [[*tokenizer.encode("bad"), tokenizer.eos_ids[0]]]
    with pytest.raises(LiaoyuanError, match="is a prompt"):
        conversations(Record(id="q", kind="prompt", messages=asked))


def test_a_text_is_learned_whole(tokenizer: Tokenizer) -> None:
    record = Record(id="x", kind="text", messages=(Message(role="user", content="one <|end|> two"),))
    (one,) = tokenise(tokenizer, [record])
    end = tokenizer.end_of_text_id
    assert list(one.tokens) == [end, *tokenizer.encode("one <|end|> two"), end]
    assert list(one.weights) == [0.0] + [1.0] * (len(one.tokens) - 1)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("<|im_end|>", ""), "no token ends it"),
        (CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>robot\\n'"), "does not begin with its own prompt"),
        ("{{ raise_exception('no turns of this kind') }}", "no turns of this kind"),
    ],
)
def test_a_template_that_does_not_show_where_answers_are_is_refused(
    tokenizer: Tokenizer, template: str, reason: str
) -> None:
    other = family_tokenizer(tokenizer, Family(template, FAMILIES["ChatML"].names, "<|im_end|>"))
    talk = (Message(role="user", content="q"), Message(role="assistant", content="a"))
    with pytest.raises(LiaoyuanError, match=f"Record 'r': .*{reason}"):
        segments(other, Record(id="r", messages=talk))
