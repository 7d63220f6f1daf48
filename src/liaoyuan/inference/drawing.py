"""From logits to tokens for the sequences of a step: what each of them asked for, by slot."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from liaoyuan.inference.masks import allowed, may_forbid
from liaoyuan.inference.request import TopLogprobs
from liaoyuan.inference.sampling import Settings, distributions, sample, top_logprobs, uniform
from liaoyuan.inference.sequence import Sequence


@dataclass(frozen=True)
class Draws:
    """R drawn tokens int64, their log-probabilities fp32 (as each request wants them), and bool [R]: which tokens end
    their completion, and which are none since the sequence cannot go on (see `Sequence.error`).
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: np.ndarray
    failed: np.ndarray


class Drawing:
    """The sampling parameters of the sequences that run, in arrays with a row for each slot."""

    def __init__(self, max_sequences: int, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._sequences: list[Sequence | None] = [None] * max_sequences
        self._stop = np.full((max_sequences, 1), -1, dtype=np.int64)
        self._seed = np.zeros(max_sequences, dtype=np.uint64)
        self._temperature, self._top_p, self._min_p = np.zeros((3, max_sequences))
        self._repetition, self._presence, self._frequency = np.zeros((3, max_sequences))
        self._top_k, self._top = np.zeros((2, max_sequences), dtype=np.int64)
        # Whether a sequence has penalties; a bias; may have forbidden tokens; wants what it draws from.
        self._penalties, self._bias, self._forbids, self._processed, self._masks = np.zeros(
            (5, max_sequences), dtype=bool
        )

    def start(self, sequence: Sequence) -> None:
        """Take over the parameters of a sequence that has got a slot."""
        slot, sampling = sequence.slot, sequence.request.sampling
        self._sequences[slot] = sequence
        if sampling.constraint is not None and sequence.state is None:
            sequence.state = sampling.constraint.begin(sequence.request.prompt)
        stops = sampling.stop_token_ids
        if len(stops) > self._stop.shape[1]:
            wider = np.full((len(self._stop), len(stops) - self._stop.shape[1]), -1, dtype=np.int64)
            self._stop = np.hstack([self._stop, wider])
        self._stop[slot] = -1
        self._stop[slot, : len(stops)] = stops
        self._seed[slot] = sequence.seed
        self._temperature[slot], self._top_p[slot] = sampling.temperature, sampling.top_p
        self._top_k[slot], self._min_p[slot], self._top[slot] = sampling.top_k, sampling.min_p, sampling.top_logprobs
        penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        self._repetition[slot], self._presence[slot], self._frequency[slot] = penalties
        self._penalties[slot] = penalties != (1.0, 0.0, 0.0)
        self._bias[slot], self._forbids[slot] = bool(sampling.logit_bias), may_forbid(sequence)
        self._processed[slot], self._masks[slot] = sampling.processed_logprobs, sampling.return_masks

    def draw(self, logits: Tensor, slots: np.ndarray, places: np.ndarray, tokens: np.ndarray) -> Draws:
        """Draw the token at `places` [R] of `slots` [R] from logits [R, V]; tokens [slots, n]: those so far.

        A constraint that fails ends its sequence alone: see `Sequence.error`.
        """
        settings = self._settings(slots, places, tokens)
        drawn, raw, processed = (found.cpu().numpy() for found in sample(logits, settings))
        logprobs = np.where(self._processed[slots], processed, raw)
        stopped = (self._stop[slots] == drawn[:, None]).any(1)
        self._keep(logits, settings, slots, drawn, logprobs)
        failed = np.zeros(len(slots), dtype=bool)
        for row in np.flatnonzero(self._forbids[slots]).tolist():
            sequence = self._sequence(slots[row])
            if not stopped[row]:
                self._advance(sequence, int(drawn[row]))
            failed[row] = bool(sequence.error)
        return Draws(drawn, logprobs, stopped, failed)

    def _settings(self, slots: np.ndarray, places: np.ndarray, tokens: np.ndarray) -> Settings:
        numbers = (self._temperature[slots], self._top_p[slots], self._top_k[slots], self._min_p[slots])
        chance = uniform(self._seed[slots], places)
        special = self._penalties[slots] | self._bias[slots] | self._forbids[slots]
        if not special.any():
            return Settings(*numbers, chance)
        history = lengths = biased = None
        if (penalised := self._penalties[slots]).any():
            history = np.where(
                (np.arange(places.max()) < places[:, None]) & penalised[:, None], tokens[slots, : places.max()], -1
            )
            lengths = np.array([len(self._sequence(slot).request.prompt) for slot in slots])
        if self._bias[slots].any():
            biased = np.flatnonzero(self._bias[slots])
        return Settings(
            *numbers,
            chance,
            self._repetition[slots],
            self._presence[slots],
            self._frequency[slots],
            history,
            lengths,
            self._mask(slots, places, tokens),
            biased,
            tuple(self._sequence(slots[row]).request.sampling.logit_bias for row in biased)
            if biased is not None
            else (),
        )

    def _mask(self, slots: np.ndarray, places: np.ndarray, tokens: np.ndarray) -> np.ndarray | None:
        """Return the allowed tokens of each row as bits, or None if nothing is forbidden to anybody."""
        mask = None
        for row in np.flatnonzero(self._forbids[slots]).tolist():
            sequence = self._sequence(slots[row])
            try:
                own = allowed(sequence, tokens[slots[row], : places[row]], self._vocabulary)
            except Exception as error:  # a constraint may be anybody's
                sequence.error = f"The constraint failed: {error}"
                continue
            if own is not None:
                if mask is None:
                    mask = np.full((len(slots), -(-self._vocabulary // 32)), -1, dtype=np.int32)
                mask[row] = own
        return mask

    def _advance(self, sequence: Sequence, token: int) -> None:
        if sequence.state is None or sequence.error:
            return
        try:
            sequence.state.accept(token)
        except Exception as error:
            sequence.error = f"The constraint failed: {error}"

    def _keep(
        self, logits: Tensor, settings: Settings, slots: np.ndarray, drawn: np.ndarray, logprobs: np.ndarray
    ) -> None:
        """Keep the most probable tokens, and the tokens that could be drawn, of those who asked for them."""
        wanted = np.minimum(self._top[slots], logits.shape[1])
        if not (wanted.any() or self._masks[slots].any()):
            return
        processed = self._masks[slots] | (self._processed[slots] & (wanted > 0))
        rows = np.flatnonzero(processed)
        if len(rows):
            spread = distributions(logits[torch.from_numpy(rows).to(logits.device)], settings.of(rows))
            for row, log_probs in zip(rows.tolist(), spread, strict=True):
                if self._masks[slots[row]]:
                    log_probs[int(drawn[row])] = float(logprobs[row])  # whatever rounding says, it could be drawn
                    self._sequence(slots[row]).masks.append(_bits(log_probs))
                if wanted[row] and self._processed[slots[row]]:
                    self._keep_top(slots[row], log_probs, int(wanted[row]), drawn[row], logprobs[row])
        rows = np.flatnonzero((wanted > 0) & ~self._processed[slots])
        if len(rows):
            most = int(wanted[rows].max())
            tokens, values = top_logprobs(logits[torch.from_numpy(rows).to(logits.device)], most)
            for row, row_tokens, row_values in zip(rows.tolist(), tokens.tolist(), values.tolist(), strict=True):
                top = list(zip(row_tokens, row_values, strict=True))[: wanted[row]]
                self._sequence(slots[row]).top_logprobs.append(_with_drawn(top, int(drawn[row]), float(logprobs[row])))

    def _keep_top(self, slot: int, log_probs: Tensor, count: int, token: int, logprob: float) -> None:
        values, tokens = log_probs.topk(min(count, int(log_probs.isfinite().sum()) or 1))
        top = list(zip(tokens.tolist(), values.tolist(), strict=True))
        self._sequence(slot).top_logprobs.append(_with_drawn(top, int(token), float(logprob)))

    def _sequence(self, slot: int) -> Sequence:
        sequence = self._sequences[slot]
        assert sequence is not None
        return sequence


def _with_drawn(top: TopLogprobs, token: int, logprob: float) -> TopLogprobs:
    """Let the drawn token have one log-probability in both places: sums in another order differ in the last bit."""
    return [(other, logprob if other == token else value) for other, value in top]


def _bits(log_probs: Tensor) -> np.ndarray:
    """Return which entries are finite as bits, int32 [ceil(V / 32)], the lowest bit first."""
    finite = log_probs.isfinite().cpu().numpy()
    padded = np.zeros(-(-len(finite) // 32) * 32, dtype=bool)
    padded[: len(finite)] = finite
    return np.packbits(padded, bitorder="little").view(np.int32)
