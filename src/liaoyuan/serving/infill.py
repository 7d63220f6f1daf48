"""Filling in the middle: what comes between two texts, by the special tokens that code models are taught it with.

Bavarian et al. 2022, "Efficient training of language models to fill in the middle" (arXiv 2207.14255), sec. 3; other
files of a repository before it as Hui et al. 2024, "Qwen2.5-Coder" (arXiv 2409.12186), sec. 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.serving.errors import too_long, unsupported
from liaoyuan.serving.generation import Served

# What begins the text before the gap, the text after it, and what fills it, by family: Qwen and CodeGemma, StarCoder
# and Granite, SantaCoder, DeepSeek, Code Llama.
GAPS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
REPOSITORIES = ("<|repo_name|>", "<repo_name>", "<reponame>")
FILES = ("<|file_sep|>", "<|file_separator|>", "<file_sep>")
ANSWER_PART = 4  # of the context: this part of it is the answer's, where a request does not say how long that may be


@dataclass(frozen=True)
class Extra:
    """Another file that the model should know."""

    text: str
    name: str = "file"


@dataclass(frozen=True)
class FillTokens:
    """The tokens that part a prompt; None: the model was taught none of this kind."""

    before: int
    after: int
    middle: int
    repository: int | None
    file: int | None

    @property
    def stops(self) -> list[int]:
        """The tokens that no filling has in it: one of them ends it."""
        every = (self.before, self.after, self.middle, self.repository, self.file)
        return [token for token in every if token is not None]


def fill_tokens(tokenizer: Tokenizer, param: str) -> FillTokens:
    """Return the tokens of a tokenizer. Raises ApiError if it has none, for the field `param` that wants them."""
    for names in GAPS:
        before, after, middle = (tokenizer.token_id(name) for name in names)
        if before is not None and after is not None and middle is not None:
            return FillTokens(before, after, middle, _first(tokenizer, REPOSITORIES), _first(tokenizer, FILES))
    raise unsupported(param, "its model has no tokens for filling in the middle, so it only continues text.")


def fill_prompt(
    served: Served,
    tokens: FillTokens,
    before: str,
    after: str,
    begun: str = "",
    extras: Sequence[Extra] = (),
    most: int | None = None,
) -> tuple[int, ...]:
    """Return the ids after which a model writes what belongs between two texts.

    Of what does not fit goes away, first of the other files, then of the two texts what is farthest from the gap: a
    quarter of the room is the second one's if both are longer.

    Args:
        begun: how the filling begins. extras: other files, the most important last.
        most: tokens of the answer; None: a quarter of the context.

    Raises:
        ApiError: there is no room for the answer.
    """
    tokenizer, context = served.tokenizer, served.context_length
    lead, started = tokenizer.encode("", add_special_tokens=True), tokenizer.encode(begun)
    own = [tokens.file, *tokenizer.encode("file\n")] if tokens.file is not None and extras else []
    answer = most or context // ANSWER_PART
    least = len(lead) + len(own) + len(started) + 3  # tokens of the prompt that cannot be cut off
    room = context - answer - least
    if room < 0:
        raise too_long(least, answer, context, "prompt")
    left, right = tokenizer.encode(before), tokenizer.encode(after)
    rightmost = max(room // 4, room - len(left))
    right = right[:rightmost]
    left = left[max(0, len(left) - (room - len(right))) :]
    others = _others(tokenizer, tokens, extras)
    others = others[max(0, len(others) - (room - len(left) - len(right))) :]
    return (*lead, *others, *own, tokens.before, *left, tokens.after, *right, tokens.middle, *started)


def _others(tokenizer: Tokenizer, tokens: FillTokens, extras: Sequence[Extra]) -> list[int]:
    """Return other files one after another: each under its name if the model knows a token for that."""
    ids: list[int] = []
    if extras and tokens.repository is not None:
        ids += [tokens.repository, *tokenizer.encode("repository\n")]
    for extra in extras:
        named = [] if tokens.file is None else [tokens.file, *tokenizer.encode(extra.name + "\n")]
        ids += [*named, *tokenizer.encode(extra.text if named else extra.text + "\n\n")]
    return ids


def _first(tokenizer: Tokenizer, names: Sequence[str]) -> int | None:
    return next((token for name in names if (token := tokenizer.token_id(name)) is not None), None)
