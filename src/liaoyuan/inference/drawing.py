"""From logits to tokens for the sequences of a step: what each of them asked for, by slot."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from liaoyuan.inference.constraints.constraint import ConstraintState
from liaoyuan.inference.constraints.masks import allowed, may_forbid
from liaoyuan.inference.plan import Plan
from liaoyuan.inference.request import TopLogprobs
from liaoyuan.inference.sampling import (
    Settings,
    as_one,
    distributions,
    kept_log_probs,
    log_probs_of,
    on_host,
    sample,
    top_logprobs,
    uniform,
)
from liaoyuan.inference.sequence import Sequence
from liaoyuan.ops.sampling import COLUMNS

TEMPERATURE, UNIFORM = (list(COLUMNS).index(name) for name in ("temperature", "uniform"))


@dataclass(frozen=True)
class Draws:
    """R drawn tokens int64, their log-probabilities fp32 (as each request wants them), and what becomes of them, [R].

    kept: those that count: all up to the first one that was guessed wrongly or ends its sequence.
    stopped, full, failed: the kept ones that end their sequence: by a stop token, by the limit, or because it cannot
        go on (see `Sequence.error`; then there is no token).
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    kept: np.ndarray
    stopped: np.ndarray
    full: np.ndarray
    failed: np.ndarray

    @property
    def ended(self) -> np.ndarray:
        return self.stopped | self.full | self.failed


class Drawing:
    """The sampling parameters of the sequences that run, in arrays with a row for each slot."""

    def __init__(self, max_sequences: int, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._sequences: list[Sequence | None] = [None] * max_sequences
        self._stop = np.full((max_sequences, 1), -1, dtype=np.int64)
        self._seed = np.zeros(max_sequences, dtype=np.uint64)
        self._table = np.zeros((max_sequences, len(COLUMNS)))
        self._top = np.zeros(max_sequences, dtype=np.int64)
        # Whether a sequence has penalties; a bias; may have forbidden tokens; wants what it draws from; and wants that
        # as training computes it.
        self._penalties, self._bias, self._forbids, self._processed, self._masks, self._trained = np.zeros(
            (6, max_sequences), dtype=bool
        )
        # Whether anybody has any of the first three, and whether anybody is told more than tokens: seldom somebody does
        # or is, and then steps need not look.
        self._are_special = self._are_told = False

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
        penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        numbers = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        self._table[slot] = (*numbers, *penalties, 0.0)
        self._penalties[slot] = penalties != (1.0, 0.0, 0.0)
        self._bias[slot], self._forbids[slot] = bool(sampling.logit_bias), may_forbid(sequence)
        self._top[slot] = max(sampling.top_logprobs, bool(sampling.scored_tokens))
        self._processed[slot], self._masks[slot] = sampling.processed_logprobs, sampling.return_masks
        is_plain = numbers[1:] == (0, 1.0, 0.0) and not self._forbids[slot]
        is_known = (is_plain or sampling.return_masks) and not (self._penalties[slot] or self._bias[slot])
        self._trained[slot] = sampling.processed_logprobs and sampling.temperature > 0 and is_known
        self._are_special = bool((self._penalties | self._bias | self._forbids).any())
        self._are_told = bool(((self._top > 0) | self._processed | self._masks).any())

    def table(self, slots: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the settings of rows, fp64 [R, 8], as `ops.sample_tokens` takes them."""
        table = self._table[slots]
        if np.count_nonzero(table[:, TEMPERATURE]):  # else nothing is left to chance
            table[:, UNIFORM] = uniform(self._seed[slots], places)
        return table

    def are_free(self, slots: np.ndarray) -> bool:
        """Return whether what all who run, in these slots, draw is decided by their settings alone, not by the tokens
        that were drawn before; who has gone is forgotten.
        """
        if self._are_special:
            self._are_special = bool((self._penalties | self._bias | self._forbids)[slots].any())
        if self._are_told:
            self._are_told = bool(((self._top > 0) | self._processed | self._masks)[slots].any())
        return not self._are_special

    @property
    def are_told(self) -> bool:
        """Whether anybody is told more than tokens, which takes the logits."""
        return self._are_told

    def draw(
        self, logits: Tensor, plan: Plan, tokens: np.ndarray, limit: np.ndarray, table: np.ndarray, found: Tensor | None
    ) -> Draws:
        """Draw the plan's R tokens from logits [R, V] (of any rows where `found` is all that anybody wants to know).

        tokens [slots, n]: the sequences' tokens so far, the guessed ones behind the known; limit [slots]: of these.
        table: of these rows. found: what was drawn where that decides all (`sampling.as_one`); None: nothing yet.
        A constraint that fails ends its sequence alone: see `Sequence.error`.
        """
        slots, places = plan.samplers, plan.places
        settings, errors = self._settings(table, slots, places, tokens)
        drawn, logprobs, processed = self._sampled(logits, settings, found)
        if self._are_told:
            logprobs = np.where(self._processed[slots], processed, logprobs)
        stopped = (self._stop[slots] == drawn[:, None]).any(1)
        full = places + 1 >= limit[slots]
        failed = np.zeros(len(slots), dtype=bool)
        if errors:
            failed[list(errors)] = True
        kept = np.ones(len(slots), dtype=bool)
        if plan.steps > 1:
            goes_on = ~(stopped | full).reshape(-1, plan.steps)
            kept.reshape(-1, plan.steps)[:, 1:] = np.logical_and.accumulate(goes_on[:, :-1], axis=1)
        elif len(slots) > 1 and (slots[1:] == slots[:-1]).any():
            right = drawn == tokens[slots, places]  # a guess stands where the draw would go
            kept = _kept(slots, right & ~(stopped | full | failed))
        for row, error in errors.items():
            if kept[row]:
                self._sequence(slots[row]).error = error
        if self._are_special:
            self._advance(slots, drawn, kept & ~stopped)
        if self._are_told:
            self._keep(logits, settings, slots, drawn, logprobs, np.flatnonzero(kept))
        return Draws(drawn, logprobs, kept, kept & stopped, kept & full & ~stopped, kept & failed)

    def guess(self, logits: Tensor, slots: np.ndarray, places: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return what would be drawn from another model's logits [R, V], constraints left aside, int64 [R]."""
        settings, _ = self._settings(self.table(slots, places), slots, places, tokens, constrained=False)
        return sample(logits, settings)[0].cpu().numpy()

    def _sampled(
        self, logits: Tensor, settings: Settings, found: Tensor | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if found is not None and not self._are_special:
            return on_host(found)
        sampled = sample(logits, settings)
        if not logits.is_cpu:  # whose copies each wait for the device
            return on_host(as_one(sampled))
        drawn, logprobs, processed = (one.numpy() for one in sampled)
        return drawn, logprobs, processed

    def _settings(
        self,
        table: np.ndarray,
        slots: np.ndarray,
        places: np.ndarray,
        tokens: np.ndarray,
        constrained: bool = True,
    ) -> tuple[Settings, dict[int, str]]:
        """Return the settings of rows, and why some rows cannot be drawn."""
        if not self._are_special:
            return Settings(table), {}
        history = lengths = biased = None
        if (penalised := self._penalties[slots]).any():
            history = np.where(
                (np.arange(places.max()) < places[:, None]) & penalised[:, None], tokens[slots, : places.max()], -1
            )
            lengths = np.array([len(self._sequence(slot).request.prompt) for slot in slots])
        if self._bias[slots].any():
            biased = np.flatnonzero(self._bias[slots])
        mask, errors = self._mask(slots, places, tokens) if constrained else (None, {})
        settings = Settings(
            table,
            history,
            lengths,
            mask,
            biased,
            tuple(self._sequence(slots[row]).request.sampling.logit_bias for row in biased)
            if biased is not None
            else (),
        )
        return settings, errors

    def _mask(
        self, slots: np.ndarray, places: np.ndarray, tokens: np.ndarray
    ) -> tuple[np.ndarray | None, dict[int, str]]:
        """Return the allowed tokens of each row as bits (None: all, for everybody), and whose constraint failed."""
        mask, states, errors = None, _States(), {}
        for row in np.flatnonzero(self._forbids[slots]).tolist():
            sequence = self._sequence(slots[row])
            known = tokens[slots[row], : places[row]]
            if sequence.error:
                errors[row] = sequence.error
                continue
            try:
                own = allowed(sequence, states.after(sequence, known), known, self._vocabulary)
            except Exception as error:  # a constraint may be anybody's
                errors[row] = f"The constraint failed: {error}"
                continue
            if own is not None:
                if mask is None:
                    mask = np.full((len(slots), -(-self._vocabulary // 32)), -1, dtype=np.int32)
                mask[row] = own
        return mask, errors

    def _advance(self, slots: np.ndarray, drawn: np.ndarray, kept: np.ndarray) -> None:
        """Tell constraints of the tokens that count."""
        for row in np.flatnonzero(self._forbids[slots] & kept).tolist():
            sequence = self._sequence(slots[row])
            if sequence.state is not None and not sequence.error:
                try:
                    sequence.state.accept(int(drawn[row]))
                except Exception as error:
                    sequence.error = f"The constraint failed: {error}"

    def _keep(
        self,
        logits: Tensor,
        settings: Settings,
        slots: np.ndarray,
        drawn: np.ndarray,
        logprobs: np.ndarray,
        kept: np.ndarray,
    ) -> None:
        """Keep, of the rows that count, the most probable tokens and those that could be drawn, where asked for.

        `logprobs` of those who want what they drew from get the bits that training gives them.
        """
        wanted = np.minimum(self._top[slots], logits.shape[1])
        rows = kept[(wanted[kept] > 0) | self._masks[slots[kept]] | self._trained[slots[kept]]]
        if not len(rows):
            return
        chosen, count = logits[torch.from_numpy(rows).to(logits.device)], int(wanted[rows].max())
        plain_tokens, plain_values = top_logprobs(chosen, count) if count else (None, None)
        special = self._masks[slots[rows]] | self._processed[slots[rows]] & (wanted[rows] > 0)
        spread = distributions(chosen, settings.of(rows)) if special.any() else None
        if spread is not None:  # whatever rounding says, what was drawn could be drawn
            spread[torch.arange(len(rows)), torch.from_numpy(drawn[rows])] = 0.0
        masks = {
            index: _bits(spread[index])
            for index in np.flatnonzero(self._masks[slots[rows]]).tolist()
            if spread is not None
        }
        self._train(chosen, settings.table[rows, TEMPERATURE], slots, drawn, logprobs, rows, masks)
        for index, row in enumerate(rows.tolist()):
            sequence, token, logprob = self._sequence(slots[row]), int(drawn[row]), float(logprobs[row])
            if spread is not None:
                spread[index, token] = logprob
            if index in masks:
                sequence.masks.append(masks[index])
            if not wanted[row]:
                continue
            own = spread[index] if spread is not None and self._processed[slots[row]] else None
            if scored := sequence.request.sampling.scored_tokens:
                values = log_probs_of(chosen[index], scored) if own is None else own[list(scored)]
                named = dict(zip(scored, values.tolist(), strict=True)) | {token: logprob}
                sequence.top_logprobs.append(sorted(named.items(), key=lambda each: -each[1]))
                continue
            if own is not None:
                values, tokens = own.topk(min(int(wanted[row]), int(own.isfinite().sum())))
            else:
                assert plain_tokens is not None and plain_values is not None
                values, tokens = plain_values[index, : wanted[row]], plain_tokens[index, : wanted[row]]
            top = list(zip(tokens.tolist(), values.tolist(), strict=True))
            sequence.top_logprobs.append(_with_drawn(top, token, logprob))

    def _train(
        self,
        logits: Tensor,
        temperature: np.ndarray,
        slots: np.ndarray,
        drawn: np.ndarray,
        logprobs: np.ndarray,
        rows: np.ndarray,
        masks: dict[int, np.ndarray],
    ) -> None:
        """Write the log-probabilities under what was drawn from, as training computes them; logits [rows, V]."""
        for is_masked in (False, True):
            places = [
                index for index, row in enumerate(rows) if self._trained[slots[row]] and (index in masks) == is_masked
            ]
            if not places:
                continue
            own, device = rows[places], logits.device
            allowed = torch.from_numpy(np.stack([masks[index] for index in places])).to(device) if is_masked else None
            tokens = torch.from_numpy(drawn[own]).to(device)
            heat = torch.from_numpy(temperature[places]).float().to(device)
            logprobs[own] = kept_log_probs(logits[places], tokens, heat, allowed).cpu().numpy()

    def _sequence(self, slot: int) -> Sequence:
        sequence = self._sequences[slot]
        assert sequence is not None
        return sequence


class _States:
    """Where constraints are after guessed tokens: the rows of a sequence come in order, each one token further."""

    def __init__(self) -> None:
        self._guessed: dict[int, ConstraintState | None] = {}

    def after(self, sequence: Sequence, known: np.ndarray) -> ConstraintState | None:
        """Return the state after `known` tokens; None if there is no constraint, or the guess is against it."""
        if sequence.slot not in self._guessed:
            self._guessed[sequence.slot] = sequence.state
            return sequence.state
        state = self._guessed[sequence.slot]
        if state is not None:
            state = _accepted(state, int(known[-1]))
            self._guessed[sequence.slot] = state
        return state


def _accepted(state: ConstraintState, token: int) -> ConstraintState | None:
    mask = state.mask()
    if mask is not None and not mask[token // 32] >> (token % 32) & 1:
        return None
    state = state.copy()
    state.accept(token)
    return state


def _kept(slots: np.ndarray, goes_on: np.ndarray) -> np.ndarray:
    """Return which rows count, bool [R]: the first of each slot, and those before which every row goes on."""
    kept = np.ones(len(slots), dtype=bool)
    for row in np.flatnonzero(slots[1:] == slots[:-1]).tolist():
        kept[row + 1] = kept[row] and goes_on[row]
    return kept


def _with_drawn(top: TopLogprobs, token: int, logprob: float) -> TopLogprobs:
    """Let the drawn token have one log-probability in both places: sums in another order differ in the last bit."""
    return [(other, logprob if other == token else value) for other, value in top]


def _bits(log_probs: Tensor) -> np.ndarray:
    """Return which entries are finite as bits, int32 [ceil(V / 32)], the lowest bit first."""
    finite = log_probs.isfinite().cpu().numpy()
    padded = np.zeros(-(-len(finite) // 32) * 32, dtype=bool)
    padded[: len(finite)] = finite
    return np.packbits(padded, bitorder="little").view(np.int32)
