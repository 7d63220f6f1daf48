"""Grammars: what an answer must be, as constraints of the engine. The masks are llguidance's.

`json_schema`, `regex`, `choice`, `ebnf` and `lark` describe a grammar; `Grammars` compiles it for one tokenizer, once.
Whoever may ask for a grammar may be hostile, so each is tried in a process of its own first (`grammar_trial`).
"""

import contextlib
import json
import re
import select
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.constraints import grammar_trial
from liaoyuan.inference.constraints.constraint import Constraint

MOST_BYTES = 256 * 1024  # of one grammar's text
MOST_COMPILED = 128  # grammars that are kept
SECONDS = 4.0  # that trying a grammar may take
START_SECONDS = 60.0  # that starting the process that does it may take, on a busy machine
WAIT_SECONDS = 20.0  # for the grammars of others
ERROR_LENGTH = 400  # characters of the library's message that are shown

Kind = Literal["json_schema", "regex", "ebnf", "lark"]


@dataclass(frozen=True)
class Grammar:
    """A grammar that is not compiled yet."""

    kind: Kind
    text: str


def json_schema(schema: dict[str, Any] | bool | str) -> Grammar:
    """Return the grammar of all JSON texts that a schema (draft 2020-12; as an object or as text) allows."""
    if schema is True:
        schema = {}
    try:
        return Grammar("json_schema", schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False))
    except RecursionError:
        raise LiaoyuanError("The JSON schema is nested too deeply.") from None


def json_object() -> Grammar:
    """Return the grammar of any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> Grammar:
    """Return the grammar of all texts that a regular expression (Rust's syntax) matches as a whole."""
    return Grammar("regex", pattern)


def choice(texts: Sequence[str]) -> Grammar:
    """Return the grammar of exactly these texts."""
    return Grammar("lark", "start: " + " | ".join(map(literal, texts)))


def ebnf(text: str) -> Grammar:
    """Return the grammar that is written in llguidance's dialect of Lark, or in llama.cpp's GBNF."""
    return Grammar("ebnf", text)


def lark(text: str) -> Grammar:
    """Return the grammar that is written in llguidance's dialect of Lark."""
    return Grammar("lark", text)


def literal(text: str) -> str:
    """Return a text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


class Vocabulary:
    """The tokens of a model as grammars see them.

    size: rows of the model's embedding; those beyond the tokenizer's ids are padding, which nothing may ever draw.
    ends: the tokens that end a completion.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, ends: Sequence[int]) -> None:
        if not ends:
            raise LiaoyuanError("This model has no token that ends an answer, so no grammar can be held.")
        self.size, self.ends = size, tuple(ends)
        known = range(min(size, tokenizer.vocab_size))
        padding = [b""] * (size - len(known))
        self.tokens = [tokenizer.token_bytes(index) for index in known] + padding
        self.special = sorted({*tokenizer.special_ids, *(tokenizer.think_ids or ()), *ends})
        self.end_mask = self.mask(self.ends)
        self.real_mask = self.mask([i for i, token in enumerate(self.tokens) if token] + list(ends))
        self._tokenizer = tokenizer

    def mask(self, tokens: Sequence[int]) -> np.ndarray:
        """Return tokens as bits, int32 [ceil(size / 32)], the lowest bit first."""
        bits = np.zeros(-(-self.size // 32) * 32, dtype=np.uint8)
        bits[list(tokens)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def spelling(self, text: str) -> str:
        """Return a text as Lark writes it; special tokens in it are tokens, and a single space may be left out."""
        parts = self._special_pattern.split(text)
        return " ".join(self._part(part) for part in parts if part)

    def _part(self, part: str) -> str:
        if part in self._special_texts:
            return f"<[{self._special_texts[part]}]>"
        return '" "?' if part == " " else literal(part)

    @cached_property
    def _special_texts(self) -> dict[str, int]:
        return {self.tokens[index].decode(): index for index in self.special if self.tokens[index]}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._special_texts, key=len, reverse=True)
        return re.compile("(" + "|".join(["(?<! ) (?! )", *map(re.escape, longest_first)]) + ")")

    @cached_property
    def breaks(self) -> frozenset[int]:
        """The tokens that are nothing but line breaks."""
        return frozenset(index for index, token in enumerate(self.tokens) if token and not token.strip(b"\n"))

    def encode(self, text: str) -> list[int]:
        """Return the usual ids of a text that goes on after another (SentencePiece's space before it left out)."""
        ids, wanted = self._tokenizer.encode(text), text.encode()
        if self._bytes(ids) == wanted:
            return ids
        if ids and self._bytes(ids) == b" " + wanted and self.tokens[ids[0]] == b" ":
            return ids[1:]
        return grammar_trial.greedy(self._spelt, wanted)

    @cached_property
    def _spelt(self) -> dict[bytes, int]:
        """The plain token of each spelling."""
        plain = set(range(self.size)) - set(self.special)
        return {self.tokens[index]: index for index in plain if self.tokens[index]}

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.tokens[index] for index in ids)


class Grammars:
    """Compiles grammars for one model, and keeps those that were used last. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, size: int, ends: Sequence[int]) -> None:
        """size, ends: see `Vocabulary`; it is made when it is first needed, as that takes a while."""
        self._made_of = (tokenizer, size, ends)
        self._kept: OrderedDict[Grammar | str, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Raises LiaoyuanError for a model without a token that ends an answer."""
        return Vocabulary(*self._made_of)

    @cached_property
    def _trial(self) -> "Trial":
        return Trial(self.vocabulary)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        words = self.vocabulary
        return grammar_trial.library_tokenizer(words.tokens, words.special, list(words.ends), words.encode)

    def compile(self, grammar: Grammar) -> Constraint:
        """Return the constraint of a grammar.

        Raises:
            LiaoyuanError: it is no grammar, nothing satisfies it, or it takes too much time or memory.
        """
        if len(grammar.text.encode("utf-8", "replace")) > MOST_BYTES:
            raise LiaoyuanError(f"A grammar may have at most {MOST_BYTES // 1024} KiB; make it smaller.")
        return self._keep(grammar, lambda: self._match(grammar, self._trial(grammar)))

    def tried(self, text: str) -> Constraint:
        """Return the constraint of a grammar that another process has tried: the `text` of its `CompiledGrammar`.

        Raises:
            LiaoyuanError: it is none.
        """
        return self._keep(text, lambda: self._match(Grammar("lark", ""), text))

    def _keep(self, grammar: Grammar | str, make: Callable[[], "CompiledGrammar"]) -> Constraint:
        if not self._lock.acquire(timeout=WAIT_SECONDS):
            raise LiaoyuanError("Too many grammars are being compiled; try again in a moment.")
        try:
            if grammar not in self._kept:
                self._kept[grammar] = make()
            self._kept.move_to_end(grammar)
            while len(self._kept) > MOST_COMPILED:
                self._kept.popitem(last=False)
            return self._kept[grammar]
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the process that tries grammars."""
        self._trial.close()

    def _match(self, grammar: Grammar, text: str) -> "CompiledGrammar":
        matcher = grammar_trial.matcher(self._tokenizer, text)
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        return CompiledGrammar(matcher, self.vocabulary, text)


@dataclass(frozen=True)
class CompiledGrammar:
    """A `Constraint`: the answer as a whole is a text of the grammar. text: the grammar in the library's own form."""

    matcher: LLMatcher
    vocabulary: Vocabulary
    text: str

    def begin(self, prompt: tuple[int, ...]) -> "GrammarState":
        return GrammarState(self.matcher.deep_copy(), self.vocabulary)


class GrammarState:
    """A `ConstraintState`; raises LiaoyuanError if the library gives up in mid-answer."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, ended: bool = False) -> None:
        self._matcher, self._vocabulary, self._ended = matcher, vocabulary, ended

    def mask(self) -> np.ndarray:
        if self._ended:
            return self._vocabulary.end_mask
        real = self._vocabulary.real_mask
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)  # may be a word longer than needed
        found: np.ndarray = bits[: len(real)] & real
        if self._matcher.is_error() or not found.any():
            raise LiaoyuanError(_readable(self._matcher.get_error()) or "No token of this model goes on.")
        return found

    def accept(self, token: int) -> None:
        self._ended = self._ended or token in self._vocabulary.ends
        if not self._ended and not self._matcher.consume_token(token):
            raise LiaoyuanError(_readable(self._matcher.get_error()))

    def copy(self) -> "GrammarState":
        return GrammarState(self._matcher.deep_copy(), self._vocabulary, self._ended)


class Trial:
    """Tries grammars in a process of its own, which is started when the first one comes and again when it has died."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, grammar: Grammar) -> str:
        """Return a grammar in the library's own form. Raises LiaoyuanError; see `Grammars.compile`."""
        process = self._process or self._start()
        try:
            self._send({"kind": grammar.kind, "text": grammar.text})
            answer = _line_in_time(process, SECONDS)
        except OSError:  # it has died
            answer = ""
        if not answer:
            self.close()
            what = "memory" if answer == "" else f"time (over {SECONDS:.0f} s)"
            raise LiaoyuanError(f"The {_name(grammar)} takes too much {what} to compile; make it simpler.")
        found: dict[str, str] = json.loads(answer)
        if "error" in found:
            raise _refused(grammar, found["error"])
        return found["grammar"]

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _start(self) -> "subprocess.Popen[str]":
        program = str(Path(grammar_trial.__file__))
        self._process = subprocess.Popen(
            [sys.executable, "-P", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        weakref.finalize(self, _end, self._process)
        words = self._vocabulary
        tokens = [token.hex() for token in words.tokens]
        with contextlib.suppress(OSError):  # it has died: what follows says so
            self._send({"tokens": tokens, "special": words.special, "ends": list(words.ends)})
        if not _line_in_time(self._process, START_SECONDS):
            self.close()
            raise LiaoyuanError("The process that tries grammars does not start, so none can be held.")
        return self._process

    def _send(self, value: dict[str, Any]) -> None:
        assert self._process and self._process.stdin
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]


def _line_in_time(process: "subprocess.Popen[str]", seconds: float) -> str | None:
    """Return the next line that a process writes, "" if it has died; None if it takes too long."""
    assert process.stdout
    waiting = select.poll()  # not `select`, which knows only the first 1,024 files of a process
    waiting.register(process.stdout, select.POLLIN)
    return process.stdout.readline() if waiting.poll(seconds * 1000) else None


def _name(grammar: Grammar) -> str:
    return {"json_schema": "JSON schema", "regex": "regular expression"}.get(grammar.kind, "grammar")


def _refused(grammar: Grammar, why: str) -> LiaoyuanError:
    return LiaoyuanError(f"The {_name(grammar)} cannot be held: {_readable(why).rstrip('.')}.")


def _readable(why: str) -> str:
    """Return what the library says is wrong as one line."""
    why = why.partition("<backtrace>")[0].replace("<non-verbose/>", "")
    return " ".join(why.split())[:ERROR_LENGTH]
