"""The tokenizer: text to token ids and back, messages to the ids that a chat model reads.

`train_tokenizer` makes a byte-level BPE in which every digit is one token and saves it as Hugging Face's
`tokenizer.json` and `tokenizer_config.json`; `Tokenizer.load` reads any such folder, also one made elsewhere.
A special token that stands in a user's text is encoded as the characters it is written with, never as its id.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from liaoyuan.data.opaque import GUARD
from liaoyuan.data.records import Message
from liaoyuan.data.template import CHAT_TEMPLATE, Tools, compile_template, plain_messages, takes_tools
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import write_atomic, write_json

END_OF_TEXT, END_OF_TURN = "<|end_of_text|>", "<|end|>"
THINK, END_OF_THINK = "<think>", "</think>"
SPECIAL_TOKENS = [END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", END_OF_TURN, THINK, END_OF_THINK]

# The split before BPE: contractions, words with the sign before them, single digits, Chinese characters in runs of
# at most eight (a whole clause as one word makes training slow and its merges useless), signs, line ends, spaces.
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|\p{N}|[^\r\n\p{L}\p{N}]?[\p{L}&&[^\p{Han}]]+|\p{Han}{1,8}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MINIMUM_VOCABULARY = 256 + len(SPECIAL_TOKENS)
LARGE = ("vocab", "merges")  # of a model in tokenizer.json
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A tokenizer of a model folder; make one with `Tokenizer.load` or `train_tokenizer`."""

    def __init__(self, definition: str, settings: Mapping[str, Any], eos_ids: Sequence[int] = ()) -> None:
        """Take the text of `tokenizer.json`, the contents of `tokenizer_config.json` and more ids that end a turn."""
        self._library = tokenizers.Tokenizer.from_str(definition)
        for disable in (self._library.no_padding, self._library.no_truncation):
            disable()
        self._plain = _without_added_tokens(definition)
        added = self._library.get_added_tokens_decoder()
        self._special_ids = frozenset(index for index, token in added.items() if token.special)
        # Ids of the tokens that stand beside the model's own, by how they are written.
        self.added = {token.content: index for index, token in added.items()}
        special = [token.content for token in added.values() if token.special]
        self._added_pattern, self._hidden_pattern = _any_of([*self.added]), _any_of([*self.added, GUARD])
        self._hidden_of_assistant = _any_of([*special, GUARD])
        # Whether a token that is written in a text is found in the text's JSON too: neither quoted there nor escaped.
        self.shows_in_json = all(json.dumps(token, ensure_ascii=False) == f'"{token}"' for token in self.added)
        self._first_of_added = {token[0] for token in [*self.added, GUARD] if token}
        self._settings = dict(settings)
        self.template_text = _template_of(settings)
        self._template = compile_template(self.template_text)
        self.takes_tools = takes_tools(self.template_text)
        values = json.loads(definition)
        self.pipeline = {name: values.get(name) for name in ("normalizer", "pre_tokenizer")}
        self.pipeline["model"] = {name: value for name, value in values["model"].items() if name not in LARGE}
        decoder = json.dumps(values.get("decoder") or {})
        self._bytes = _token_bytes_function(decoder)
        self.strips_space = '"Strip"' in decoder or ('"Metaspace"' in decoder and '"never"' not in decoder)
        self.hash = hashlib.sha256(definition.encode()).hexdigest()
        self.vocab_size = max(self._library.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_text_id = self._named_token("bos_token", END_OF_TEXT)
        self.eos_ids = self._find_eos_ids(eos_ids)
        self.think_ids = self._find_think_ids()

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read `tokenizer.json` and, where they exist, `tokenizer_config.json` and `chat_template.jinja`.

        Raises:
            LiaoyuanError: there is no such folder, it has no tokenizer, or a file of it is torn.
        """
        if not folder.is_dir():
            raise LiaoyuanError(f"There is no folder {folder} to read a tokenizer from.")
        definition = _read(folder / "tokenizer.json", f"{folder} has no tokenizer.json, so it holds no tokenizer.")
        settings = _read_settings(folder / "tokenizer_config.json")
        template = folder / "chat_template.jinja"
        if template.exists():
            settings["chat_template"] = _read(template, "")
        more = [index for name in ("generation_config.json", "config.json") for index in _eos_ids(folder / name)]
        try:
            return cls(definition, settings, more)
        except LiaoyuanError:
            raise
        except Exception as error:  # the library raises plain Exception for whatever is wrong in the file
            raise LiaoyuanError(f"{folder / 'tokenizer.json'} is torn or no tokenizer: {error}.") from error

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` reads too."""
        write_atomic(folder / "tokenizer.json", self._library.to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", self._settings)

    def encode(self, text: str, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`; a special token written in it is plain characters unless `parse_special`.

        `add_special_tokens` puts those before and after it that a foreign tokenizer wants around a text.
        """
        library = self._library if parse_special else self._plain
        return library.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as `encode` does, on all cores."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are no whole UTF-8 character become U+FFFD."""
        return self._library.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, index: int, skip_special: bool = False) -> bytes:
        """Return the bytes that the token `index` stands for (none if it is unknown or a skipped special token)."""
        if index in self._special_ids and skip_special:
            return b""
        token = self._library.id_to_token(index)
        if token is None:
            return b""
        return token.encode() if token in self.added else self._bytes(token)

    def token_id(self, token: str) -> int | None:
        """Return the id of the token that is written so, or None."""
        return self._library.token_to_id(token)

    def spelling(self, index: int) -> str | None:
        """Return how `tokenizer.json` writes the token `index`, or None."""
        return self._library.id_to_token(index)

    @property
    def named_tokens(self) -> dict[str, str | None]:
        """The special tokens that `tokenizer_config.json` names, as templates know them."""
        found = {name: self._settings.get(name) for name in NAMED_TOKENS}
        return {name: _content(token) if token else None for name, token in found.items()}

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens, whose text is no part of what is said."""
        return self._special_ids

    @property
    def has_template(self) -> bool:
        return self._template is not None

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        thinking: bool = True,
        generation_prompt: bool = True,
        tools: Tools | None = None,
        begun: str = "",
    ) -> list[int]:
        """Return the ids of a conversation in this tokenizer's chat template.

        Args:
            messages: `Message`s, or mappings with "role", "content" and perhaps "think" or "reasoning_content",
                "tool_calls", "tool_call_id" and "name".
            thinking: whether the answer to come is to be thought about first (slow) or given at once (fast): a thought
                that the template opens nevertheless is closed.
            generation_prompt: end with the beginning of the assistant's turn.
            tools: what the model may call, as OpenAI's API describes it; most templates show it to the model.
            begun: how the answer begins, after `generation_prompt`; a thought that the template opens is closed first.

        Raises:
            LiaoyuanError: there is no template, or it refuses the messages.
        """
        guarded, shown, hidden = self.guard(plain_messages(messages), tools)
        text = self.fill(guarded, thinking, generation_prompt, shown)
        if begun:
            closed = END_OF_THINK if text.rstrip().endswith(THINK) else ""
            text += closed + self._guard({"role": "assistant", "content": begun}, hidden)["content"]
        return self.encode_rendered(text, hidden)

    def render_text(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        thinking: bool = True,
        generation_prompt: bool = True,
        tools: Tools | None = None,
    ) -> str:
        """Return the text that the chat template makes of the messages; see `render`."""
        return self.fill(plain_messages(messages), thinking, generation_prompt, tools)

    def guard(
        self, rows: Sequence[dict[str, Any]], tools: Tools | None = None
    ) -> tuple[list[dict[str, Any]], Tools | None, list[str]]:
        """Return messages and tools with stand-ins for the special tokens written in them, and what those stand for."""
        hidden: list[str] = []
        guarded = [self._guard(row, hidden) for row in rows]
        shown = [_guarded(dict(tool), self._hidden_pattern, hidden) for tool in tools or []]
        return guarded, shown or None, hidden

    def must_be_guarded(self, text: str) -> bool:
        """Return whether a special token, or what could be a stand-in, is written in a text."""
        return any(first in text for first in self._first_of_added) and bool(self._hidden_pattern.search(text))

    def encode_rendered(self, text: str, hidden: Sequence[str] = ()) -> list[int]:
        """Return the ids of text that the template made; special tokens are those of the template alone."""
        if not hidden:
            return self._library.encode(text, add_special_tokens=False).ids
        return [index for piece in self._pieces(text, hidden) for index in piece]

    def encode_rendered_batch(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Return the library's encodings of texts that the template made, with places, on all cores."""
        return self._library.encode_batch(list(texts), add_special_tokens=False)

    def encode_rendered_quickly(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Return what `encode_rendered_batch` does, without places."""
        return self._library.encode_batch_fast(list(texts), add_special_tokens=False)

    def has_token(self, token: str) -> bool:
        """Return whether there is a token that `tokenizer.json` writes so."""
        return self._library.token_to_id(token) is not None

    def vocabulary(self) -> dict[str, int]:
        """Return the ids of all tokens by how `tokenizer.json` writes them."""
        return self._library.get_vocab(with_added_tokens=True)

    @property
    def end_texts(self) -> tuple[str, ...]:
        """How the tokens that end a turn are written."""
        return tuple(token for token, index in self.added.items() if index in self.eos_ids)

    def fill(self, rows: Sequence[dict[str, Any]], thinking: bool, generation_prompt: bool, tools: Tools | None) -> str:
        """Return what the template makes of messages as it takes them; see `render`."""
        if self._template is None:
            raise LiaoyuanError("This tokenizer has no chat template, so it cannot render messages.")
        tokens = {name: token for name, token in self.named_tokens.items() if token}
        text = self._template([*rows], generation_prompt, thinking, tokens, tools)
        if generation_prompt and not thinking and text.rstrip().endswith(THINK):
            text += END_OF_THINK  # many a template opens a thought whatever it is told
        try:
            text.encode()
        except UnicodeEncodeError:
            message = "The messages or tools hold half of a surrogate pair, which is no valid Unicode text."
            raise LiaoyuanError(message) from None
        return text

    def _guard(self, row: dict[str, Any], hidden: list[str]) -> dict[str, Any]:
        """Replace special tokens written in a message by stand-ins of which the template knows nothing.

        An assistant's message keeps added tokens that are not special: foreign templates look for "</think>" in it.
        """
        pattern = self._hidden_of_assistant if row["role"] == "assistant" else self._hidden_pattern
        return {key: value if key == "role" else _guarded(value, pattern, hidden) for key, value in row.items()}

    def _pieces(self, text: str, hidden: Sequence[str]) -> Iterator[list[int]]:
        """Yield the ids of filled-in text: the template's special tokens as ids, the rest as plain text."""
        for piece in self._added_pattern.split(text):
            if piece in self.added:
                yield [self.added[piece]]
            elif piece:
                shown = re.sub(f"{GUARD}(\\d+){GUARD}", lambda match: hidden[int(match[1])], piece)
                yield self._plain.encode(shown, add_special_tokens=False).ids

    def _named_token(self, name: str, otherwise: str) -> int | None:
        chosen = self._settings.get(name)
        return self.token_id(_content(chosen)) if chosen else self.token_id(otherwise)

    def _find_eos_ids(self, more: Sequence[int]) -> tuple[int, ...]:
        found = [self._named_token("eos_token", END_OF_TURN), self.token_id(END_OF_TURN), *more]
        if self.token_id(END_OF_TURN) is not None:
            found.append(self.token_id(END_OF_TEXT))
        return tuple(dict.fromkeys(index for index in found if index is not None))

    def _find_think_ids(self) -> tuple[int, int] | None:
        start, end = self.token_id(THINK), self.token_id(END_OF_THINK)
        return (start, end) if start is not None and end is not None else None


class IncrementalDecoder:
    """Turns a stream of ids into text as it comes; holds back the bytes of a character that is not whole yet.

    Everything that `feed` and `finish` return, put together, is what `decode` gives for all ids. With `continuing` the
    ids go on after a text: SentencePiece's space before the first word, which `decode` takes away, is kept.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special: bool = True,
        continuing: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """shown: special tokens that are not skipped."""
        self._tokenizer, self._skip_special, self._shown = tokenizer, skip_special, shown
        self._strip = tokenizer.strips_space and not continuing
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that is whole after these ids (perhaps none)."""
        skip, shown = self._skip_special, self._shown
        data = b"".join(self._tokenizer.token_bytes(index, skip and index not in shown) for index in ids)
        if self._strip and data:
            data, self._strip = data.removeprefix(b" "), False
        return self._characters.decode(data)

    def finish(self) -> str:
        """Return what was held back: U+FFFD for a character that was never completed."""
        return self._characters.decode(b"", final=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; bytes as in GPT-2) on `texts`.

    Each digit is one token; the seven special tokens have the ids 0 to 6; any text can be encoded.

    Raises:
        LiaoyuanError: `vocab_size` leaves no room for the 256 bytes and the special tokens.
    """
    if vocab_size < MINIMUM_VOCABULARY:
        raise LiaoyuanError(f"vocab_size must be at least {MINIMUM_VOCABULARY} (it is {vocab_size}).")
    library = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return Tokenizer(library.to_str(), settings)


def _guarded(value: Any, pattern: re.Pattern[str], hidden: list[str]) -> Any:
    """Return a value as JSON has it, in which whatever `pattern` finds is moved to `hidden` and replaced."""

    def hide(match: re.Match[str]) -> str:
        hidden.append(match[0])
        return f"{GUARD}{len(hidden) - 1}{GUARD}"

    if isinstance(value, str):
        return pattern.sub(hide, value)
    if isinstance(value, list):
        return [_guarded(item, pattern, hidden) for item in value]
    if isinstance(value, dict):
        return {_guarded(key, pattern, hidden): _guarded(item, pattern, hidden) for key, item in value.items()}
    return value


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Return the pattern that captures any of `tokens`, the longest that fits; without tokens it never does."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)") + ")")


def _without_added_tokens(definition: str) -> tokenizers.Tokenizer:
    """Return the tokenizer that reads every added token, special or not, as plain text."""
    values = json.loads(definition)
    for token in values.get("added_tokens") or []:
        token["special"] = True
    library = tokenizers.Tokenizer.from_str(json.dumps(values))
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = True
    return library


def _token_bytes_function(decoder: str) -> Callable[[str], bytes]:
    """Return the function from a token's spelling to its bytes: byte-level, or SentencePiece with byte fallback."""
    if '"ByteLevel"' in decoder:
        table = _byte_of_character()
        return lambda token: bytes(table[character] for character in token if character in table)

    def sentence_piece(token: str) -> bytes:
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()

    return sentence_piece


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's map from the printable characters in byte-level tokens back to bytes.

    Printable bytes of Latin-1 stand for themselves, the others for the code points from 256 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


def _eos_ids(path: Path) -> list[int]:
    """Return the ids that end a text by a model's config, which gives none, one or a list."""
    found = _read_settings(path).get("eos_token_id")
    return [index for index in (found if isinstance(found, list) else [found]) if isinstance(index, int)]


def _template_of(settings: Mapping[str, Any]) -> str | None:
    """Return the chat template of a `tokenizer_config.json`: a text, or the "default" of a list of named ones."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _content(token: Any) -> str:
    """Return the text of a token that `tokenizer_config.json` gives as a string or as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _read(path: Path, missing: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise LiaoyuanError(missing) from None
    except (UnicodeDecodeError, OSError) as error:
        raise LiaoyuanError(f"The file {path} cannot be read: {error}.") from error


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(_read(path, f"The file {path} does not exist."))
    except json.JSONDecodeError as error:
        raise LiaoyuanError(f"The file {path} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise LiaoyuanError(f"The file {path} must hold a JSON object.")
    return values
