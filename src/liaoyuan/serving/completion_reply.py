"""The shape of a reply of `/v1/completions`, whole or in chunks: OpenAI's, with vLLM's additions for token ids."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from liaoyuan.inference import PromptLogprobs
from liaoyuan.serving.caller import CALLER
from liaoyuan.serving.completion_body import CompletionRequest
from liaoyuan.serving.generation import Served, finite
from liaoyuan.serving.scores import score_rows, shown
from liaoyuan.serving.status import SYSTEM_FINGERPRINT
from liaoyuan.serving.text import Piece, ScoredToken


@dataclass
class CompletionReply:
    """Choice i belongs to prompt i // n. scores: of each prompt, if they are wanted."""

    served: Served
    body: CompletionRequest
    prompts: list[tuple[int, ...]]
    scores: list[PromptLogprobs]
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = "cmpl-" + (self.body.request_id or CALLER.get().id)
        self._starts: dict[int, int] = {}  # choice -> where its continuation begins in its text
        self._last: dict[int, Piece] = {}  # answer -> its newest piece, which has its counts

    def whole(self, answers: list[list[Piece]]) -> dict[str, Any]:
        """Return the reply that is not streamed; of `best_of` answers to a prompt the best are the choices."""
        for number, pieces in enumerate(answers):
            self._last.update({number: pieces[-1]} if pieces else {})
        size = self.body.candidates
        groups = [answers[at : at + size] for at in range(0, len(answers), size)]
        chosen = [pieces for group in groups for pieces in _best(group, self.body.choices)]
        rows = [self._whole_choice(index, pieces) for index, pieces in enumerate(chosen)]
        return {**self.head(), "choices": rows, "usage": self.usage()}

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """Yield what a stream says before anything is generated: the prompts, if they are wanted."""
        if not self.body.echo and not self.body.return_token_ids:
            return
        for index in range(len(self.prompts) * self.body.choices):
            only = "length" if self.body.max_tokens == 0 else None
            text, scores = self._prompt_part(index) if self.body.echo else ("", None)
            extras = {"prompt_token_ids": self.prompts[index // self.body.choices], "token_ids": []}
            yield self._chunk(_choice(index, text, scores, only, extras if self.body.return_token_ids else {}))

    def chunks(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the chunk that says one piece, if it says anything."""
        self._last[index] = piece
        text, scores = self._part(index, [piece])
        ids = bool(self.body.return_token_ids and piece.generated)
        if text or piece.tokens or ids or piece.finish_reason or self.body.running_usage:
            yield self._chunk(_choice(index, text, scores, piece.finish_reason, self._token_ids([piece])))

    def head(self) -> dict[str, Any]:
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.served.answering}
        return {**head, "system_fingerprint": SYSTEM_FINGERPRINT}

    def usage(self) -> dict[str, Any]:
        """Return the counts of tokens; every candidate of `best_of` is counted."""
        prompt = sum(map(len, self.prompts))
        completion = sum(piece.completion_tokens for piece in self._last.values())
        # Of the first answer to each prompt: the others find what it has left in the cache.
        cached = sum(self._last[at].cached_tokens for at in self._last if at % self.body.candidates == 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _whole_choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        prompt_text, prompt_scores = self._prompt_part(index) if self.body.echo else ("", None)
        text, scores = self._part(index, pieces)
        if prompt_scores and scores:
            scores = {name: prompt_scores[name] + scores[name] for name in scores}
        number = index // self.body.choices
        extras: dict[str, Any] = {
            "prompt_token_ids": None,
            "token_ids": None,
            "prompt_logprobs": None,
        }  # vLLM's clients look for them
        extras |= self._token_ids(pieces)
        if self.body.return_token_ids:
            extras["prompt_token_ids"] = self.prompts[number]
        if (most := self.body.prompt_logprobs) is not None:
            extras["prompt_logprobs"] = score_rows(self.prompts[number], self.scores[number], most, self._text)
        reason = pieces[-1].finish_reason if pieces else "length"
        return _choice(index, prompt_text + text, scores, reason, extras)

    def _token_ids(self, pieces: list[Piece]) -> dict[str, Any]:
        """Return the ids of pieces, the one that ended the answer included, if they are wanted."""
        if not self.body.return_token_ids:
            return {}
        return {"token_ids": [token.id for piece in pieces for token in piece.generated]}

    def _prompt_part(self, index: int) -> tuple[str, dict[str, Any] | None]:
        """Return the text of the prompt of a choice, and its log-probabilities if they are wanted."""
        number = index // self.body.choices
        prompt, text = self.prompts[number], self._prompt_text(number)
        self._starts[index] = len(text)
        if self.body.logprobs is None:
            return text, None
        scores = self.scores[number]
        decoder, ends = self.served.decoder(self.served.tokenizer.special_ids), [0]
        for token in prompt:
            ends.append(ends[-1] + len(decoder.feed([token])))
        before = ends[-1] - len(text)  # a token or a space that the tokenizer puts before a text is no part of it
        top = [rivals[: self.body.logprobs] for rivals in scores.top]
        return text, {
            "tokens": [self._text(token) for token in prompt],
            "token_logprobs": [None, *map(finite, scores.logprobs)],
            "top_logprobs": [None, *map(self._rivals, top, prompt[1:], scores.logprobs)],
            "text_offset": [max(0, end - before) for end in ends[:-1]],
        }

    def _prompt_text(self, number: int) -> str:
        """Return the text of a prompt as it was given: of tokens, with the special ones among them."""
        given = self.body.prompt[number] if isinstance(self.body.prompt, list) else self.body.prompt
        if isinstance(given, str) and self.body.truncate_prompt_tokens is None:
            return given
        return self.served.tokenizer.decode(self.prompts[number], skip_special=isinstance(given, str))

    def _part(self, index: int, pieces: list[Piece]) -> tuple[str, dict[str, Any] | None]:
        """Return the text that pieces add to a choice, and their log-probabilities if they are wanted."""
        text = "".join(piece.content for piece in pieces)
        if self.body.logprobs is None:
            return text, None
        tokens = [token for piece in pieces for token in piece.tokens]
        if pieces and pieces[-1].finish_reason == "stop" and pieces[-1].stop is None:
            tokens.append(pieces[-1].generated[-1])  # the token that ended the answer; it has no text
        return text, {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._rivals(token.top, token.id, token.logprob) for token in tokens],
            "text_offset": [self._starts.get(index, 0) + token.start for token in tokens],
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self.head(), "choices": [choice]}
        if self.body.running_usage:
            chunk["usage"] = self.usage()
        elif self.body.include_usage:
            chunk["usage"] = None
        return chunk

    def _rivals(self, top: Sequence[tuple[int, float]], token: int, logprob: float) -> dict[str, float]:
        """Return the most probable tokens, and the chosen one if it is none of them (as OpenAI does)."""
        found = {self._text(token): finite(logprob)}
        for rival, score in top:
            if rival != token:  # two tokens of one text: the more probable one is shown
                text = self._text(rival)
                found[text] = max(finite(score), found.get(text, finite(score)))
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _text(self, token: int) -> str:
        return f"token_id:{token}" if self.body.return_tokens_as_token_ids else shown(self.served.tokenizer, token)


def _best(answers: list[list[Piece]], count: int) -> list[list[Piece]]:
    """Return the answers whose tokens are the most probable on average."""
    if len(answers) == count:
        return answers
    return sorted(answers, key=lambda pieces: -_mean_logprob(pieces))[:count]


def _mean_logprob(pieces: list[Piece]) -> float:
    tokens: list[ScoredToken] = [token for piece in pieces for token in piece.generated]
    return sum(token.logprob for token in tokens) / max(1, len(tokens))


def _choice(index: int, text: str, scores: Any, finish_reason: str | None, extras: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": scores, "finish_reason": finish_reason, **extras}
