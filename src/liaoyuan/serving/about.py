"""What a model can do and what it cannot, in the words of whoever made it: `liaoyuan.json` beside the weights."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from liaoyuan.config import Config, parse
from liaoyuan.rundir import read_json

FILE = "liaoyuan.json"


class Words(Config):
    """A text in the two languages of the chat page."""

    en: str = ""
    zh: str = ""


def _both(value: object) -> object:
    """Let a plain string stand for both languages."""
    return {"en": value, "zh": value} if isinstance(value, str) else value


AnyWords = Annotated[Words, BeforeValidator(_both)]


class About(Config):
    """What the chat page says of the model.

    about, cannot: what it can do, and what it cannot. examples: questions that it can answer.
    single_turn: it was taught single questions, so the page sends each one without those before it.
    temperature, max_tokens: what the page starts with.
    card: where the model comes from, which the page does not say; see `tuning.card`.
    """

    about: AnyWords = Words()
    cannot: AnyWords = Words(
        en="Nobody has written down what this model can do. Small models often err: check what matters.",
        zh="尚无关于此模型能力的说明。小模型常常出错，重要内容请自行核实。",
    )
    examples: list[AnyWords] = Field(default=[], max_length=12)
    single_turn: bool = False
    temperature: float = Field(default=0.6, ge=0, le=2)
    max_tokens: int | None = Field(default=None, ge=1)
    card: dict[str, Any] = Field(default_factory=dict, exclude=True)


def read_about(folder: Path) -> About:
    """Return what `folder/liaoyuan.json` says; what is said of every model if there is no such file.

    Raises:
        LiaoyuanError: the file is torn, or has a key that nobody knows.
    """
    path = folder / FILE
    return parse(About, read_json(path), str(path)) if path.exists() else About()
