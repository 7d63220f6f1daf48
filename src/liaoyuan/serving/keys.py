"""API keys: who may ask, each with a name for fair shares and records. Only digests of them are kept in memory."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from liaoyuan.errors import LiaoyuanError

LEAST_CHARACTERS = 8  # fewer can be guessed over a network


class Keys:
    """The keys of a server; without any, everybody may ask."""

    def __init__(self, secrets: Mapping[str, str] = {}) -> None:
        """secrets: name -> key."""
        self._digests = {name: _digest(secret) for name, secret in secrets.items()}

    def __bool__(self) -> bool:
        return bool(self._digests)

    def name_of(self, secret: str) -> str | None:
        """Return the name of a key, or None; takes the same time whichever key is right, and how much of it."""
        given, found = _digest(secret), None
        for name, digest in self._digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found


def read_keys(given: Iterable[str] = (), file: Path | None = None) -> Keys:
    """Return the keys of a command line and of a file: a line is a key, or a name and a key; # begins a comment.

    Raises:
        LiaoyuanError: the file cannot be read, a key is too short, or a name or a key comes twice.
    """
    entries = [(f"API key number {number}", [text]) for number, text in enumerate(given, 1)]
    if file is not None:
        lines = enumerate(_lines(file), 1)
        entries += [(f"line {number} of {file}", text.partition("#")[0].split()) for number, text in lines]
    secrets: dict[str, str] = {}
    for where, words in entries:
        if not words:
            continue
        name, secret = (words[0] if len(words) == 2 else f"key-{len(secrets) + 1}"), words[-1]
        _check(where, words, name, secret, secrets)
        secrets[name] = secret
    if file is not None and not secrets:
        raise LiaoyuanError(f"The file {file} holds no API key: write one a line, or a name and a key.")
    return Keys(secrets)


def _check(where: str, words: list[str], name: str, secret: str, known: Mapping[str, str]) -> None:
    if len(words) > 2:
        raise LiaoyuanError(f"The {where} has {len(words)} words; write a key, or a name and a key.")
    if len(secret) < LEAST_CHARACTERS or not secret.isascii() or not secret.isprintable():
        raise LiaoyuanError(f"The {where} is no good key: it needs at least {LEAST_CHARACTERS} characters of ASCII.")
    if name in known or secret in known.values():
        raise LiaoyuanError(f"The {where} has a name or a key that came before.")


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise LiaoyuanError(f"The file of API keys {file} cannot be read: {why}.") from error


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
