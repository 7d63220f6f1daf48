"""Text that a model wrote, made safe to look at: what would move, hide or colour other text is shown as a sign."""

import re
from typing import Any

PICTURES = 0x2400  # Unicode's pictures of the control characters, ESC as ␛
DELETED = "\u2421"
# Control characters but for tab and line feed; marks of direction; what has no width; what no encoding can write.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)


def visible(text: str) -> str:
    """Return `text` with every character that is not seen, or that changes how others are seen, as a visible sign."""
    return HIDDEN.sub(_sign, text.replace("\r\n", "\n"))


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(PICTURES + code)
    return DELETED if code == 0x7F else f"⟨U+{code:04X}⟩"


def as_text(value: Any) -> str:
    """Return a value of a JSON line as visible text; nothing for null."""
    if value is None:
        return ""
    return visible(value if isinstance(value, str) else repr(value))
