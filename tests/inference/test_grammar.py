"""Promises of grammars: what is drawn under one satisfies it, whatever the model; a hostile one is refused in time."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.data.tokenizer import Tokenizer, train_tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import AfterThinking, Constraint, ThinkMarks
from liaoyuan.inference.constraints.grammar import (
    Grammar,
    Grammars,
    choice,
    ebnf,
    json_object,
    json_schema,
    lark,
    regex,
)
from liaoyuan.inference.constraints.specification import Constraints, constraint_to_json

STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260k"
PADDING = 45
TEXT = 'The answer is 42. {"name": "十七加二十五", "list": [1, 2.5, true]} \n\n'


def tokenizers() -> list[Tokenizer]:
    """Byte-level BPE; and SentencePiece with byte fallback and a space before each text, where it is to be had."""
    known = [train_tokenizer([TEXT] * 20, 330)]
    return [*known, Tokenizer.load(STORIES)] if STORIES.exists() else known


TOKENIZERS = tokenizers()
MARKS = ThinkMarks(*TOKENIZERS[0].think_ids)
GRAMMARS = [Grammars(each, each.vocab_size + PADDING, each.eos_ids) for each in TOKENIZERS]


def allowed(mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def drawn(constraint: Constraint, tokenizer: Tokenizer, seed: int, most: int = 600, prompt: tuple = (5,)) -> str | None:
    """Return what a random model says under a constraint; None if it does not come to an end."""
    state, chance, ids = constraint.begin(prompt), np.random.default_rng(seed), []
    for _ in range(most):
        tokens = allowed(state.mask())
        assert tokens.size and tokens.max() < tokenizer.vocab_size, "padding was allowed"
        ends = [token for token in tokens.tolist() if token in tokenizer.eos_ids]
        token = ends[0] if ends and chance.random() < 0.5 else int(chance.choice(tokens))
        state.accept(token)
        if token in tokenizer.eos_ids:
            return b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8")
        ids.append(token)
    return None


@pytest.mark.parametrize("inner", [regex("[a-f]{3,9}x?"), json_schema({"enum": ["yes", "no", 42]}), None])
@pytest.mark.parametrize("budget", [None, 0, 3])
def test_a_constraint_demands_the_same_in_another_process(inner: Grammar | None, budget: int | None) -> None:
    """It goes there as JSON, without the state of any answer, and begins there with the prompt."""
    grammars, tokenizer = GRAMMARS[0], TOKENIZERS[0]
    compiled = grammars.compile(inner) if inner else None
    for own in (compiled, AfterThinking(compiled, MARKS, grammars.vocabulary, budget)):
        if own is not None:
            there = Constraints(lambda: tokenizer).build(json.loads(json.dumps(constraint_to_json(own))))
            for prompt in ((5,), (5, MARKS.open)):
                states, chance = (own.begin(prompt), there.begin(prompt)), np.random.default_rng(0)
                for _ in range(12):
                    masks = [state.mask() for state in states]
                    assert (masks[0] is None) == (masks[1] is None)
                    assert masks[0] is None or np.array_equal(*masks)
                    token = int(chance.choice(np.arange(20, 80) if masks[0] is None else allowed(masks[0])))
                    for state in states:
                        state.accept(token)


def test_a_constraint_that_only_its_process_knows_stays_there() -> None:
    with pytest.raises(LiaoyuanError, match="cannot go to another process"):
        constraint_to_json(GRAMMARS[0])  # type: ignore[arg-type]
    with pytest.raises(LiaoyuanError, match="This is no constraint"):
        Constraints(lambda: TOKENIZERS[0]).build({"size": 5})


LEAVES = st.one_of(
    st.just({"type": "integer"}),
    st.just({"type": "number"}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(0, 6)),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-50, 50),
        st.integers(0, 90),
    ),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.one_of(st.text(max_size=4), st.integers(-9, 99), st.booleans()), min_size=1, max_size=3),
    ),
    st.builds(lambda text: {"const": text}, st.text(max_size=5)),
    st.sampled_from([{"type": "string", "pattern": "^[a-c]{1,3}-\\d{2}$"}, {"type": "string", "format": "date"}]),
)


def _objects(children: st.SearchStrategy) -> st.SearchStrategy:
    def build(properties: dict[str, Any], keep: int) -> dict[str, Any]:
        required = [name for place, name in enumerate(properties) if keep >> place & 1]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(build, st.dictionaries(st.text(max_size=4), children, max_size=3), st.integers(0, 7))


SCHEMAS = st.recursive(
    LEAVES,
    lambda children: st.one_of(
        _objects(children),
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, children, st.integers(0, 2)),
        st.builds(lambda some: {"anyOf": some}, st.lists(children, min_size=1, max_size=2)),
    ),
    max_leaves=5,
)


@given(SCHEMAS, st.integers(0, 2**31), st.sampled_from(range(len(TOKENIZERS))))
@settings(max_examples=120)
def test_whatever_is_drawn_satisfies_the_schema(schema: dict[str, Any], seed: int, which: int) -> None:
    text = drawn(GRAMMARS[which].compile(json_schema(schema)), TOKENIZERS[which], seed)
    if text is not None:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("which", range(len(TOKENIZERS)))
@pytest.mark.parametrize(
    ("grammar", "holds"),
    [
        (
            choice(["yes", "no", 'a "quoted" \\ one', "四十二🔥", ""]),
            lambda t: t in ("yes", "no", 'a "quoted" \\ one', "四十二🔥", ""),
        ),
        (regex(r"[a-f]{3}-[0-9]{2,4}"), lambda t: len(t) in (6, 7, 8) and t[3] == "-"),
        (ebnf('root ::= item ("," item){0,3}\nitem ::= [a-c]+ | "x"'), lambda t: set(t) <= set("abcx,")),
        (ebnf('start: item ("," item){0,3}\nitem: /[a-c]+/ | "x"'), lambda t: set(t) <= set("abcx,")),
        (json_object(), lambda t: isinstance(json.loads(t), dict)),
        (json_schema('{"type": "array", "items": {"type": "boolean"}}'), lambda t: isinstance(json.loads(t), list)),
    ],
)
def test_each_kind_of_grammar_is_held(which: int, grammar: Grammar, holds: Any) -> None:
    constraint = GRAMMARS[which].compile(grammar)
    texts = {drawn(constraint, TOKENIZERS[which], seed) for seed in range(12)} - {None}
    assert texts and all(holds(text) for text in texts)


@pytest.mark.parametrize("which", range(len(TOKENIZERS)))
@pytest.mark.parametrize(
    "text", ["The answer is 42.", '{"name": "十七"}', " two  spaces", "é🔥\n\tx", "once upon a time"]
)
def test_the_usual_tokens_of_a_text_are_allowed_one_by_one(which: int, text: str) -> None:
    vocabulary = GRAMMARS[which].vocabulary
    ids = vocabulary.encode(text)
    assert b"".join(vocabulary.tokens[index] for index in ids) == text.encode()
    state = GRAMMARS[which].compile(choice([text, "another"])).begin(())
    for token in ids:
        assert token in allowed(state.mask())
        state.accept(token)
    assert set(allowed(state.mask())) == set(TOKENIZERS[which].eos_ids)


def test_every_token_has_the_bytes_that_it_is_decoded_to() -> None:
    """A grammar of a token's text allows a token of just these bytes, and none of other text."""
    for tokenizer, grammars in zip(TOKENIZERS, GRAMMARS, strict=True):
        spelt = grammars.vocabulary.tokens
        plain = [i for i in range(tokenizer.vocab_size) if i not in grammars.vocabulary.special and spelt[i].isascii()]
        for index in plain[::9]:
            text = spelt[index].decode()
            state = grammars.compile(
                regex("(?:" + "".join(f"\\x{byte:02x}" for byte in text.encode()) + "){1,2}")
            ).begin(())
            assert all((text * 2).startswith(spelt[i].decode()) for i in allowed(state.mask()))
            assert spelt[index] in {spelt[i] for i in allowed(state.mask())}


def test_a_state_and_its_copy_go_their_own_ways() -> None:
    state = GRAMMARS[0].compile(choice(["ab", "cd"])).begin(())
    other = state.copy()
    state.accept(TOKENIZERS[0].encode("a")[0])
    other.accept(TOKENIZERS[0].encode("c")[0])
    assert [TOKENIZERS[0].token_bytes(i) for i in allowed(state.mask())] == [b"b"]
    assert [TOKENIZERS[0].token_bytes(i) for i in allowed(other.mask())] == [b"d"]


@pytest.mark.parametrize("size", [320, 351, 352, 353, 1024])
def test_a_mask_has_a_bit_for_every_row_of_the_embedding(size: int) -> None:
    state = Grammars(TOKENIZERS[0], size, TOKENIZERS[0].eos_ids).compile(choice(["ab"])).begin(())
    for token in TOKENIZERS[0].encode("ab"):
        assert len(state.mask()) == -(-size // 32)
        state.accept(token)
    assert allowed(state.mask()).tolist() == sorted(TOKENIZERS[0].eos_ids)
    state.accept(TOKENIZERS[0].eos_ids[0])
    assert len(state.mask()) == -(-size // 32)


def test_a_grammar_is_compiled_once() -> None:
    assert GRAMMARS[0].compile(regex("a+")) is GRAMMARS[0].compile(regex("a+"))


def deep(levels: int) -> str:
    return '{"type": "array", "items": ' * levels + "true" + "}" * levels


HOSTILE = {
    "deep": Grammar("json_schema", deep(5000)),
    "unsatisfiable": json_schema({"allOf": [{"type": "string"}, {"type": "integer"}]}),
    "never": json_schema(False),
    "endless reference": json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "other file": json_schema({"$ref": "https://example.org/schema.json"}),
    "unknown keyword": json_schema({"not": {"type": "string"}}),
    "no schema": json_schema("[1, 2"),
    "huge": json_schema({"enum": [f"value {number}" for number in range(60_000)]}),
    "slow": json_schema({"type": "integer", "multipleOf": 123_456_789}),
    "nested regex": regex("(" * 20_000 + "a" + ")" * 20_000),
    "bad regex": regex("[z-a]"),
    "look around": regex("(?=a)b"),
    "exponential": lark("start: A\nA: " + " & ".join(f"/(?s:.*)a{{{n}}}(?s:.*)/" for n in range(1, 25))),
    "stack": lark("start: a0\n" + "\n".join(f"a{n}: a{n + 1}" for n in range(12_000)) + '\na12000: "x"'),
    "no end": lark('start: "x" start'),
    "no rule": ebnf("root ::= nothing"),
    "nested groups": ebnf("root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_in_bounded_time(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(LiaoyuanError) as refused:
        GRAMMARS[0].compile(HOSTILE[name])
    assert time.monotonic() - began < 15
    assert len(str(refused.value)) < 700
    assert GRAMMARS[0].compile(regex("[ab]{2}")) and drawn(GRAMMARS[0].compile(regex("x[ab]" + name)), TOKENIZERS[0], 0)


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|aa)+", "(a{1,1000}){1,1000}", "(a|b)*a(a|b){30}"])
def test_a_regex_that_ruins_others_does_no_harm(pattern: str) -> None:
    began = time.monotonic()
    drawn(GRAMMARS[0].compile(regex(pattern)), TOKENIZERS[0], 0, most=200)
    assert time.monotonic() - began < 15


def test_many_threads_may_compile() -> None:
    texts: list[str | None] = []

    def compile_and_draw(number: int) -> None:
        texts.append(drawn(GRAMMARS[0].compile(regex(f"{number}[ab]")), TOKENIZERS[0], number))

    threads = [threading.Thread(target=compile_and_draw, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(text[0] for text in texts if text) == [str(number) for number in range(8)]


def thinking(budget: int | None = None, inner: Grammar | None = None, may_open: bool = True) -> AfterThinking:
    constraint = GRAMMARS[0].compile(inner) if inner else None
    return AfterThinking(constraint, MARKS, GRAMMARS[0].vocabulary, budget, may_open)


def test_a_grammar_begins_after_the_thought() -> None:
    state = thinking(inner=choice(["yes"])).begin((7, MARKS.open))
    within = set(allowed(state.mask()))
    assert MARKS.close in within and not within & set(TOKENIZERS[0].eos_ids)
    for token in (*TOKENIZERS[0].encode("hm? 42"), MARKS.close, *TOKENIZERS[0].encode("\n")):
        assert token in allowed(state.mask())
        state.accept(token)
    assert {TOKENIZERS[0].token_bytes(i)[:1] for i in allowed(state.mask())} == {b"y"}


def test_a_model_may_open_its_thought_itself_unless_the_prompt_has_closed_one() -> None:
    rules = thinking(inner=choice(["yes"]))
    assert MARKS.open in allowed(rules.begin((7, 8)).mask())
    assert MARKS.open not in allowed(rules.begin((7, MARKS.open, MARKS.close)).mask())
    assert MARKS.open not in allowed(thinking(inner=choice(["yes"]), may_open=False).begin((7, 8)).mask())
    state = rules.begin((7, 8))
    state.accept(MARKS.open)
    assert len(allowed(state.mask())) > 100


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_thought_ends_when_its_budget_is_spent(budget: int) -> None:
    for inner in (None, choice(["yes"])):
        state = thinking(budget, inner).begin((MARKS.open,))
        for _ in range(budget):
            mask = state.mask()
            assert mask is None or len(allowed(mask)) > 100
            state.accept(TOKENIZERS[0].encode("x")[0])
        assert allowed(state.mask()).tolist() == [MARKS.close]
        state.accept(MARKS.close)
        assert state.mask() is None or b"y" in {TOKENIZERS[0].token_bytes(i)[:1] for i in allowed(state.mask())}
    assert MARKS.open not in allowed(thinking(0).begin((7,)).mask())
