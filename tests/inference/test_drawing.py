"""What a request may ask of its tokens, against transformers' own processors and against definitions."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Completion, Engine, EngineConfig, Request, SamplingParams
from liaoyuan.models import Decoder, packed_context

GREEDY = SamplingParams(max_tokens=25, temperature=0.0)
PROMPT = (7, 8, 9, 7, 8)


def answer(model: Decoder, prompt: tuple[int, ...] = PROMPT, **sampling: object) -> Completion:
    """Return a completion, which must be the same in a crowd of others."""
    asked = Request("one", prompt, dataclasses.replace(GREEDY, **sampling))  # type: ignore[arg-type]
    alone = Engine(model).generate([asked])[0]
    others = [Request(index, (index, 3, 5), SamplingParams(max_tokens=30, seed=index)) for index in range(5)]
    crowd = Engine(model, EngineConfig(max_sequences=4)).generate([*others, asked])[-1]
    assert (crowd.tokens, crowd.finish_reason) == (alone.tokens, alone.finish_reason)
    return alone


def logits_after(model: Decoder, tokens: list[int]) -> torch.Tensor:
    positions, context = packed_context([len(tokens)])
    with torch.no_grad():
        return model(torch.tensor(tokens), positions, context)[-1]


def greedy_by(model: Decoder, change: object, count: int = 25) -> list[int]:
    """Decode greedily with logits that `change(tokens so far, logits)` alters."""
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(int(change(tokens, logits_after(model, tokens)).argmax()))  # type: ignore[operator]
    return tokens[len(PROMPT) :]


def test_repetition_penalty_is_that_of_transformers(tiny_model: Decoder) -> None:
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    expected = greedy_by(tiny_model, lambda tokens, logits: processor(torch.tensor([tokens]), logits[None])[0])
    assert answer(tiny_model, repetition_penalty=1.7).tokens == expected


def test_presence_and_frequency_are_taken_off_generated_tokens(tiny_model: Decoder) -> None:
    def change(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(torch.tensor(tokens[len(PROMPT) :], dtype=torch.int64), minlength=96)
        return logits - 0.5 * counts - 0.8 * (counts > 0)

    assert answer(tiny_model, presence_penalty=0.8, frequency_penalty=0.5).tokens == greedy_by(tiny_model, change)


def test_a_bias_is_added(tiny_model: Decoder) -> None:
    bias = torch.zeros(96)
    bias[[3, 90]] = torch.tensor([4.0, -50.0])
    found = answer(tiny_model, logit_bias=((3, 4.0), (90, -50.0)))
    assert found.tokens == greedy_by(tiny_model, lambda tokens, logits: logits + bias)
    assert set(answer(tiny_model, logit_bias=((3, 100.0),)).tokens) == {3}


def test_log_probabilities_stay_the_models_own_unless_asked_otherwise(tiny_model: Decoder) -> None:
    for sampling in ({"logit_bias": ((3, 100.0),)}, {"temperature": 0.5, "top_k": 3, "seed": 1}):
        raw = answer(tiny_model, **sampling)
        logits = logits_after(tiny_model, list(PROMPT))
        assert raw.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[raw.tokens[0]]), abs=1e-4)
        processed = answer(tiny_model, **sampling, processed_logprobs=True, top_logprobs=5)
        assert processed.tokens == raw.tokens
        top = dict(processed.top_logprobs[0])
        assert sum(np.exp(list(top.values()))) == pytest.approx(1.0, abs=1e-3)
        assert top[raw.tokens[0]] == processed.logprobs[0]


def test_bad_words_are_those_of_transformers(tiny_model: Decoder) -> None:
    plain = answer(tiny_model).tokens
    words = [[plain[0]], [plain[3], plain[4]], [7, 8, plain[1]]]
    processor = NoBadWordsLogitsProcessor(words, eos_token_id=-1)
    expected = greedy_by(tiny_model, lambda tokens, logits: processor(torch.tensor([tokens]), logits[None].clone())[0])
    found = answer(tiny_model, bad_words=tuple(map(tuple, words)))
    assert found.tokens == expected != plain


def test_no_end_before_min_tokens(tiny_model: Decoder) -> None:
    stop = answer(tiny_model).tokens[0]
    assert len(answer(tiny_model, stop_token_ids=(stop,)).tokens) == 1
    found = answer(tiny_model, stop_token_ids=(stop,), min_tokens=9)
    assert stop not in found.tokens[:9]


def test_masks_hold_what_could_be_drawn(tiny_model: Decoder) -> None:
    found = answer(tiny_model, temperature=1.0, top_k=4, seed=5, return_masks=True)
    for token, mask, step in zip(found.tokens, found.masks, range(25), strict=True):
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        assert len(allowed) == 4
        assert token in allowed
        best = logits_after(tiny_model, [*PROMPT, *found.tokens[:step]]).topk(4).indices
        assert sorted(best.tolist()) == allowed.tolist()


class Alternating:
    """A constraint: even and odd tokens by turns, then the end."""

    def __init__(self, length: int, fails: bool = False) -> None:
        self.length, self.fails = length, fails

    def begin(self, prompt: tuple[int, ...]) -> "_Place":
        return _Place(self, 0)


class _Place:
    def __init__(self, constraint: Alternating, count: int) -> None:
        self.constraint, self.count = constraint, count

    def mask(self) -> np.ndarray:
        if self.constraint.fails and self.count == 3:
            raise ValueError("broken")
        ends = self.count == self.constraint.length
        allowed = np.array([0]) if ends else np.arange(2 + self.count % 2, 96, 2)
        bits = np.zeros(96, dtype=np.uint8)
        bits[allowed] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token: int) -> None:
        assert token % 2 == self.count % 2
        self.count += 1

    def copy(self) -> "_Place":
        return _Place(self.constraint, self.count)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_is_kept(tiny_model: Decoder, temperature: float) -> None:
    found = answer(tiny_model, constraint=Alternating(11), temperature=temperature, seed=3, stop_token_ids=(0,))
    assert [token % 2 for token in found.tokens[:-1]] == [index % 2 for index in range(11)]
    assert (found.tokens[-1], found.finish_reason) == (0, "stop")


def test_a_constraint_survives_preemption(tiny_model: Decoder) -> None:
    sampling = dataclasses.replace(GREEDY, max_tokens=40, constraint=Alternating(60))
    asked = [Request(index, (index + 1,) * 20, sampling) for index in range(6)]
    engine = Engine(tiny_model, EngineConfig(cache_tokens=160))
    expected = [Engine(tiny_model).generate([request])[0].tokens for request in asked]
    assert [one.tokens for one in engine.generate(asked)] == expected
    assert engine.statistics()["preemptions"] > 0


def test_a_constraint_that_fails_ends_its_request_alone(tiny_model: Decoder) -> None:
    bad = Request("bad", PROMPT, dataclasses.replace(GREEDY, constraint=Alternating(9, fails=True)))
    good = Request("good", PROMPT, GREEDY)
    done = Engine(tiny_model).generate([bad, good])
    assert (done[0].finish_reason, len(done[0].tokens)) == ("error", 3)
    assert done[1].tokens == Engine(tiny_model).generate([good])[0].tokens


@pytest.mark.parametrize("budget", [5, 64])
@pytest.mark.parametrize("length", [2, 16, 17, 50])
def test_prompts_are_scored(tiny_model: Decoder, length: int, budget: int) -> None:
    prompt = tuple(range(length))
    asked = Request("a", prompt, dataclasses.replace(GREEDY, max_tokens=3, prompt_logprobs=4))
    engine = Engine(tiny_model, EngineConfig(max_batch_tokens=budget, max_sequences=2))
    engine.generate([Request("warm", prompt, GREEDY)])
    done = engine.generate([dataclasses.replace(asked, id="b", sampling=GREEDY), asked], keep_prefixes=True)[1]
    assert done.prompt is not None
    positions, context = packed_context([length])
    with torch.no_grad():
        scores = tiny_model(torch.tensor(prompt), positions, context)[:-1].log_softmax(-1)
    expected = scores.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(done.prompt.logprobs), expected, atol=1e-4, rtol=0)
    assert [[token for token, _ in row] for row in done.prompt.top] == scores.topk(4).indices.tolist()
    assert done.tokens == Engine(tiny_model).generate([asked])[0].tokens


def test_a_prompt_of_one_token_has_nothing_to_score(tiny_model: Decoder) -> None:
    done = Engine(tiny_model).generate([Request("a", (5,), dataclasses.replace(GREEDY, prompt_logprobs=2))])[0]
    assert done.prompt is not None
    assert (done.prompt.logprobs, done.prompt.top) == ([], [])


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"min_tokens": 26}, "min_tokens"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": ((96, 1.0),)}, "token 96"),
        ({"logit_bias": ((1, float("inf")),)}, "logit_bias"),
        ({"bad_words": ((),)}, "bad_words"),
    ],
)
def test_what_has_no_meaning_is_refused(tiny_model: Decoder, sampling: dict[str, object], message: str) -> None:
    with pytest.raises(LiaoyuanError, match=message):
        answer(tiny_model, **sampling)


def test_only_allowed_tokens_are_drawn(tiny_model: Decoder) -> None:
    allowed = (90, 3, 41)
    barred = torch.full((96,), -torch.inf)
    barred[list(allowed)] = 0
    found = answer(tiny_model, allowed_tokens=allowed)
    assert found.tokens == greedy_by(tiny_model, lambda tokens, logits: logits + barred)
    drawn = answer(tiny_model, allowed_tokens=allowed, temperature=1.0, seed=4, bad_words=((41,),))
    assert set(drawn.tokens) <= {90, 3}


@pytest.mark.parametrize("processed", [False, True])
def test_given_tokens_are_scored_at_every_place_beside_the_one_that_was_drawn(
    tiny_model: Decoder, processed: bool
) -> None:
    scored = (50, 7, 95)
    own = {"processed_logprobs": processed, "temperature": 0.5, "seed": 3}
    found = answer(tiny_model, scored_tokens=scored, top_logprobs=2, **own)
    tokens = list(PROMPT)
    for token, logprob, row in zip(found.tokens, found.logprobs, found.top_logprobs, strict=True):
        logits = logits_after(tiny_model, tokens)
        expected = (logits / 0.5 if processed else logits).log_softmax(-1)
        assert {one for one, _ in row} == {*scored, token} and dict(row)[token] == logprob
        assert [value for _, value in row] == sorted((value for _, value in row), reverse=True)
        for one, value in row:
            assert value == pytest.approx(float(expected[one]), abs=1e-4)
        tokens.append(token)


@pytest.mark.parametrize("name", ["allowed_tokens", "scored_tokens"])
def test_tokens_that_a_request_names_must_exist(tiny_model: Decoder, name: str) -> None:
    with pytest.raises(LiaoyuanError, match=f"'{name}' has the token 96"):
        answer(tiny_model, **{name: (1, 96)})
