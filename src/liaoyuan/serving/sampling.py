"""From the fields of a request to the engine's parameters."""

import secrets
from typing import TypeVar

from liaoyuan.inference import Constraint, SamplingParams
from liaoyuan.serving.errors import invalid, too_long
from liaoyuan.serving.generation import Served
from liaoyuan.serving.protocol import Asked, Sampling
from liaoyuan.serving.settings import Defaults
from liaoyuan.serving.structure import asked_grammar

MOST_NAMED = 10  # wrong keys that an error names
SEEDS = 2**63  # seeds are taken modulo this, so that a negative one is as good as any

AnyBody = TypeVar("AnyBody", bound=Asked)


def sampling_params(
    served: Served,
    body: Sampling,
    prompt: tuple[int, ...],
    max_tokens: int | None,
    top_logprobs: int,
    choice: int,
    constraint: Constraint | None = None,
) -> SamplingParams:
    """Return the engine's parameters for choice number `choice` of a request; call it in a thread.

    constraint: None takes the form that the request asks for, if any (compiling it may take a while).

    Raises:
        ApiError: prompt and answer do not fit together, or a field cannot be held.
    """
    body = _with_defaults(body, served.settings.sampling)
    if constraint is None and (asked := asked_grammar(body)) is not None:
        constraint = served.hold(*asked)
    room = served.context_length - len(prompt)
    if room < (max_tokens or 1):
        param = "messages" if hasattr(body, "messages") else "prompt"
        raise too_long(len(prompt), max_tokens or 0, served.context_length, param)
    for name in ("allowed_token_ids", "logprob_token_ids"):
        served.check_tokens(getattr(body, name) or (), name)
    ends = () if body.ignore_eos else served.stop_token_ids
    seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed
    top_p = 1.0 if body.top_p is None else body.top_p
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingParams(
        max_tokens=max_tokens or room,
        temperature=temperature if top_p > 0 else 0.0,  # a nucleus of nothing is the most probable token
        top_p=top_p or 1.0,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        seed=(seed + choice) % SEEDS,
        stop_token_ids=(*ends, *(body.stop_token_ids or ())),
        top_logprobs=top_logprobs,
        min_tokens=_min_tokens(body.min_tokens or 0, max_tokens or room),
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_biases(served, body.logit_bias or {}),
        bad_words=_bad_words(served, body.bad_words or []),
        constraint=constraint,
        allowed_tokens=tuple(body.allowed_token_ids or ()),
        scored_tokens=tuple(dict.fromkeys(body.logprob_token_ids or ())),
    )


def _with_defaults(body: Sampling, defaults: Defaults) -> Sampling:
    """Return a body that says the server's own sampling where it says none."""
    return body.model_copy(update={name: value for name, value in defaults if getattr(body, name) is None})


def counted_logprobs(served: Served, body: AnyBody) -> AnyBody:
    """Return a body in which every number of rivals is one: -1 stands for the whole vocabulary.

    Raises:
        ApiError: it asks for more than this server gives.
    """
    counts = {}
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        asked, most = getattr(body, name, None), served.settings.max_logprobs
        if type(asked) is int:
            counts[name] = served.tokenizer.vocab_size if asked == -1 else asked
            if 0 <= most < counts[name]:
                message = f"'{name}' must be from 0 to {most} here (it is {asked}): see --set max_logprobs=N."
                raise invalid(message, name, "invalid_value")
    return body.model_copy(update=counts)


def _min_tokens(least: int, most: int) -> int:
    if least > most:
        raise invalid(f"'min_tokens' ({least}) is more than the {most} tokens that the answer may have.", "min_tokens")
    return least


def _biases(served: Served, biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """Return what is added to the logit of each token; JSON writes their ids as texts."""
    size = served.tokenizer.vocab_size
    wrong = [key for key in biases if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < size)]
    if wrong:
        named = ", ".join(f"'{key[:40]}'" for key in wrong[:MOST_NAMED])
        message = (
            f"'logit_bias' has the key {named}, but keys are ids of this model's {size} tokens, from 0 to {size - 1}."
        )
        raise invalid(message, "logit_bias")
    return tuple((int(token), bias) for token, bias in biases.items())


def _bad_words(served: Served, words: list[str]) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of words, each as it is written at the beginning of a text and after a space."""
    spelt = [tuple(served.tokenizer.encode(form)) for word in words for form in (word, " " + word)]
    return tuple(dict.fromkeys(ids for ids in spelt if ids))
