"""How a server answers where requests leave it open, and what it shows: `liaoyuan serve --set KEY=VALUE`."""

from typing import Annotated, Literal

from pydantic import Field

from liaoyuan.config import Config

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class Defaults(Config):
    """Sampling of requests that do not say it themselves, by the names that requests have for it."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Share | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None


class Settings(Config):
    """
    sampling: see `Defaults`.
    aliases: further names that requests may call the model by. tags: words for whoever lists models.
    page, metrics, slots: whether the chat page, `/metrics` and `/slots` are there.
    verbose: every chat shows its prompt as the model reads it. timings: every chat says how long it took.
    continue_final_message: an answer goes on from a last message of the assistant, as llama.cpp has it.
    max_logprobs: the most rivals of a token that a request may ask for; -1: the whole vocabulary.
    pooling: what becomes of the hidden states of a text that is embedded; None: what the model's folder says.
    sleep_after: seconds without a request after which the memory of cache and weights is given back; None: never.
    """

    sampling: Defaults = Defaults()
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    page: bool = True
    metrics: bool = True
    slots: bool = True
    verbose: bool = False
    timings: bool = False
    continue_final_message: bool = False
    max_logprobs: Annotated[int, Field(ge=-1)] = 20
    pooling: Literal["mean", "last", "none"] | None = None
    sleep_after: Annotated[float, Field(gt=0)] | None = None
