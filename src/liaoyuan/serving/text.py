"""From tokens to the text of an answer: thoughts apart from content, and nothing of a stop string ever shown.

Pure and incremental: what a stream says in pieces, put together, is what the whole reply says.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from liaoyuan.inference import Event, ThinkMarks
from liaoyuan.serving.call_reader import CallReader
from liaoyuan.serving.tools import CallPiece, joined


class Decoder(Protocol):
    """Turns tokens into text as they come; gives whole characters only."""

    def feed(self, ids: Iterable[int]) -> str: ...
    def finish(self) -> str: ...


@dataclass(frozen=True)
class ScoredToken:
    """A token of the content with its log-probability and rivals; `start` is where its text begins."""

    id: int
    logprob: float
    top: list[tuple[int, float]]
    start: int


@dataclass(frozen=True)
class Piece:
    """What one event adds to an answer; the counts are those of the answer so far.

    stop: the stop string that ended the answer, if one did. cached_tokens: of the prompt, found in the prefix cache.
    waited: seconds before the request was first computed. read: how many tokens of the prompt are read by now, if the
        piece tells only that. came: when, by the monotonic clock.
    generated: every token that the event brought, thoughts, marks and the one that ended the answer included.
    """

    reasoning: str
    content: str
    tokens: list[ScoredToken]
    completion_tokens: int
    reasoning_tokens: int
    finish_reason: str | None
    calls: tuple[CallPiece, ...] = ()
    stop: str | None = None
    cached_tokens: int = 0
    generated: tuple[ScoredToken, ...] = ()
    waited: float = 0.0
    read: int | None = None
    came: float = field(default_factory=time.monotonic)


class StopFilter:
    """Lets text pass up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self._held = stops, ""
        self.stop: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string (`stop`) was met."""
        return self.stop is not None

    def feed(self, text: str) -> str:
        """Return the text that may be shown now; once `stopped`, nothing more may."""
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stop = min(found, key=lambda each: each[0])
            shown, self._held = self._held[:at], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """Return what was held back, now that no more text will come."""
        shown, self._held = self._held, ""
        return shown


class AnswerReader:
    """Reads the events of one answer; see the module. Stop strings are looked for in the content, not in thoughts.

    Tool calls are told apart from the rest of the content by `calls`; an answer that ends with some says so.
    """

    def __init__(
        self,
        decoder: Callable[[], Decoder],
        stops: tuple[str, ...] = (),
        stop_tokens: tuple[int, ...] = (),
        marks: ThinkMarks | None = None,
        thinking: bool = False,
        calls: CallReader | None = None,
    ) -> None:
        """marks: None leaves thoughts in the content. thinking: the prompt has already opened a thought."""
        self._calls, self._pieces = calls, tuple[CallPiece, ...]()
        self._new_decoder, self._decoder = decoder, decoder()
        self._filter, self._stop_tokens = StopFilter(stops), set(stop_tokens)
        self._marks, self._thinking = marks, thinking
        self._trim = marks is not None  # templates put line breaks around a thought; they are no part of the text
        self._scored: list[ScoredToken] = []
        self._generated: list[ScoredToken] = []
        self._read = self._shown = 0  # characters of content: decoded, and let through the filter
        self._completion_tokens = self._reasoning_tokens = self._cached_tokens = 0
        self._waited = 0.0
        self._prompt_read: int | None = None

    def read(self, event: Event) -> Piece:
        """Return what `event` adds; a piece with a finish reason is the last one."""
        reasoning, content = "", ""
        self._waited, self._prompt_read = event.waited, event.read
        self._cached_tokens = max(self._cached_tokens, event.cached_tokens)
        self._generated = []
        for place, token in enumerate(event.tokens):
            self._completion_tokens += 1
            top = event.top_logprobs[place] if event.top_logprobs else []
            scored = ScoredToken(token, event.logprobs[place], top, self._read)
            self._generated.append(scored)
            if token in self._stop_tokens:
                break
            if self._thinking:
                reasoning += self._think(token)
            else:
                content += self._speak(scored)
            if self._stopped:
                break
        finish = "stop" if self._stopped else event.finish_reason
        if finish and not self._filter.stopped:
            rest_of_thought, rest = self._end()
            reasoning, content = reasoning + rest_of_thought, content + rest
            finish = "stop" if self._stopped else finish
        if finish and self._calls:
            content += self._told_apart(*self._calls.finish())
            finish = "tool_calls" if finish == "stop" and self._calls.count else finish
        return self._piece(reasoning, content, finish)

    @property
    def _stopped(self) -> bool:
        """Whether the answer ends here, although the model might go on."""
        return self._filter.stopped or bool(self._calls and self._calls.done)

    def _think(self, token: int) -> str:
        assert self._marks
        self._reasoning_tokens += 1
        if token == self._marks.close:
            rest = self._decoder.finish()
            self._decoder, self._thinking, self._trim = self._new_decoder(), False, True
            return self._trimmed(rest)
        return self._trimmed(self._decoder.feed([token]))

    def _speak(self, scored: ScoredToken) -> str:
        if self._marks and scored.id == self._marks.open and not self._read:
            self._thinking, self._trim = True, True
            self._reasoning_tokens += 1
            return ""
        text = self._trimmed(self._decoder.feed([scored.id]))
        self._scored.append(scored)
        return self._let_through(text)

    def _let_through(self, text: str) -> str:
        self._read += len(text)
        shown = self._filter.feed(text)
        self._shown += len(shown)
        return self._told_apart(*self._calls.feed(shown)) if self._calls else shown

    def _told_apart(self, content: str, pieces: tuple[CallPiece, ...]) -> str:
        """Keep pieces of calls for the next `Piece`; return the content."""
        self._pieces += pieces
        return content

    def _end(self) -> tuple[str, str]:
        rest = self._trimmed(self._decoder.finish())
        if self._thinking:
            return rest, ""
        content = self._let_through(rest)
        held = self._filter.flush()
        self._shown += len(held)
        return "", content + (self._told_apart(*self._calls.feed(held)) if self._calls else held)

    def _trimmed(self, text: str) -> str:
        """Drop line breaks at the beginning of a thought or of the content after it."""
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        return text

    def _piece(self, reasoning: str, content: str, finish: str | None) -> Piece:
        """Hand out the scored tokens whose text has begun to show; at the end also those without text."""
        ended = finish is not None and not self._filter.stopped
        ready = [scored for scored in self._scored if ended or scored.start < self._shown]
        self._scored = [scored for scored in self._scored if not ended and scored.start >= self._shown]
        calls, self._pieces = joined(self._pieces), ()
        counts = self._completion_tokens, self._reasoning_tokens
        generated = tuple(self._generated)
        stop, cached, read = self._filter.stop, self._cached_tokens, self._prompt_read
        return Piece(reasoning, content, ready, *counts, finish, calls, stop, cached, generated, self._waited, read)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop` (and not all of it)."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
