"""The program that tries a grammar before the server uses it, in a process of its own.

A hostile grammar can make the grammar library run for minutes, fill the memory or overflow the stack; then this
process is what ends. It is run as a file and imports nothing of this package, so that it starts within 0.2 seconds.
Lines of JSON: first the tokens in and "ready" out, then for each grammar its kind and text in, what came of it out.
"""

import contextlib
import json
import random
import resource
import sys
import threading
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

# Beyond llguidance's own limits: a state of the lexer takes up to 2 kB, and errors must not show its inner state.
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
# Between the parts of a JSON text: one space, or a line break and an indent, lest a model write spaces for ever.
WHITESPACE = r" |\n[ \t]{0,32}"
STACK_BYTES = 512 * 1024  # less than any thread of the server has
MEMORY_BYTES = 2 * 2**30
STEPS = 24  # tokens of a random walk through each grammar


class Words:
    """What `TokenizerWrapper` asks of a tokenizer."""

    def __init__(self, tokens: list[bytes], special: list[int], ends: list[int], encode: Any) -> None:
        self.tokens, self.special_token_ids, self._encode = tokens, special, encode
        self.eos_token_id, self.bos_token_id = ends[0], None

    def __call__(self, text: str) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("text is wanted, not bytes")
        found: list[int] = self._encode(text)
        return found


def greedy(spelt: dict[bytes, int], text: bytes) -> list[int]:
    """Return the longest token that fits, again and again; bytes that no token begins with are left out."""
    longest, ids, place = max(map(len, spelt), default=1), [], 0
    while place < len(text):
        sizes = range(min(longest, len(text) - place), 0, -1)
        size = next((size for size in sizes if text[place : place + size] in spelt), 0)
        ids += [spelt[text[place : place + size]]] if size else []
        place += size or 1
    return ids


def library_tokenizer(tokens: list[bytes], special: list[int], ends: list[int], encode: Any) -> LLTokenizer:
    """Return the tokenizer that llguidance wants; `encode` says how it is usual to write a text."""
    return LLTokenizer(TokenizerWrapper(Words(tokens, special, ends, encode)), eos_token=ends)


def matcher(tokenizer: LLTokenizer, compiled: str) -> LLMatcher:
    return LLMatcher(tokenizer, compiled, log_level=0, limits=LIMITS)


def compiled(kind: str, text: str) -> str:
    """Return a grammar in llguidance's own form. Raises ValueError or RecursionError for what is none."""
    if kind == "json_schema":
        return str(LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE}))
    if kind == "regex":
        return str(LLMatcher.grammar_from_regex(text))
    if kind == "ebnf":
        text = any_to_lark(text)
    return str(LLMatcher.grammar_from_lark(text))


def try_grammar(tokenizer: LLTokenizer, kind: str, text: str) -> dict[str, str]:
    """Return the grammar in the library's form, or the error that it gives, at once or on a random walk."""
    try:
        grammar = compiled(kind, text)
    except (Exception, RecursionError) as error:
        return {"error": str(error) or type(error).__name__}
    walker, chance = matcher(tokenizer, grammar), random.Random(0)
    for _ in range(STEPS):
        if walker.is_error() or walker.is_stopped():
            break
        allowed = int.from_bytes(walker.compute_bitmask(), "little")
        if walker.is_error() or not allowed:
            return {"error": walker.get_error() or "nothing that this model can write satisfies it"}
        walker.consume_token(_any_bit(allowed, chance))
    return {"error": walker.get_error()} if walker.is_error() else {"grammar": grammar}


def _any_bit(bits: int, chance: random.Random) -> int:
    """Return the place of a random bit that is set."""
    after = bits >> chance.randrange(bits.bit_length())
    place = bits.bit_length() - after.bit_length()
    return place + (after & -after).bit_length() - 1


def _serve() -> None:
    first = json.loads(sys.stdin.readline())
    tokens = [bytes.fromhex(token) for token in first["tokens"]]
    special = set(first["special"])
    spelt = {token: index for index, token in enumerate(tokens) if token and index not in special}
    tokenizer = library_tokenizer(tokens, first["special"], first["ends"], lambda text: greedy(spelt, text.encode()))
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(try_grammar(tokenizer, task["kind"], task["text"])), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(ValueError, OSError):  # some systems know no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()
