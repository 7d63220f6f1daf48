"""JSON text that is checked as it comes, character by character, and can be brought to a valid end at any moment."""

import json
import re

DEEPEST = 128  # levels; clients read JSON by recursion
SPACE = " \t\n\r"
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
LITERALS = ("true", "false", "null")


class JsonText:
    """One JSON value that arrives in pieces.

    `feed` gives what may be shown: text after which `close` can still make a valid value of all that was shown. So a
    comma, a name, a number, a literal or an escape is held back until it is whole. A control character in a string,
    which JSON forbids and models write, is escaped.
    """

    def __init__(self) -> None:
        self._stack: list[str] = []  # "{" or "[" of each open level
        self._expect = (
            "value"  # or: "first" (value or the end), "name", "first name", "colon", "next", "word", "string"
        )
        self._held = ""  # not shown yet
        self._word = ""  # of a number or literal
        self._escape = ""  # of an escape that is not whole
        self._naming = False  # the string is the name of a member
        self.done = False

    def feed(self, character: str) -> str:
        """Return what may be shown now. Raises ValueError if no JSON value goes on so."""
        if self.done:
            raise ValueError("the value has ended")
        if self._expect == "string":
            return self._string(character)
        if self._expect == "word" and not self._in_word(character):
            self._end_word()
            shown = self._show()
            return shown + (self.feed(character) if not self.done else self._after(character))
        if self._expect == "word":
            self._held, self._word = self._held + character, self._word + character
            return ""
        self._held += character
        return "" if character in SPACE else self._begin(character)

    def close(self) -> str:
        """Return the text that ends what was shown as a valid value (not for use before anything was shown)."""
        inside = self._expect == "string" and not self._naming
        self.done = True
        return ('"' if inside else "") + "".join("}" if level == "{" else "]" for level in reversed(self._stack))

    def _after(self, character: str) -> str:
        raise ValueError(f"{character!r} follows the value")

    def _begin(self, character: str) -> str:
        """Take the first character of a part."""
        if self._expect in ("first name", "first", "next") and character in "}]":
            return self._leave(character)
        if self._expect == "next" and character == ",":
            self._expect = "name" if self._stack[-1] == "{" else "value"
            return ""
        if self._expect == "colon" and character == ":":
            self._expect = "value"
            return ""
        if self._expect in ("name", "first name") and character == '"':
            self._expect, self._naming = "string", True
            return ""
        if self._expect in ("value", "first"):
            return self._value(character)
        raise ValueError(f"{character!r} cannot stand here")

    def _value(self, character: str) -> str:
        if character in "{[":
            if len(self._stack) >= DEEPEST:
                raise ValueError("it is nested too deeply")
            self._stack.append(character)
            self._expect = "first name" if character == "{" else "first"
            return self._show()
        if character == '"':
            self._expect, self._naming = "string", False
            return self._show()
        if not character.isascii() or not (character.isalnum() or character == "-"):
            raise ValueError(f"{character!r} begins no value")
        self._expect, self._word = "word", character
        return ""

    def _leave(self, character: str) -> str:
        if not self._stack or character != ("}" if self._stack[-1] == "{" else "]"):
            raise ValueError(f"{character!r} closes nothing")
        self._stack.pop()
        self._end_value()
        return self._show()

    def _in_word(self, character: str) -> bool:
        return character.isascii() and (character.isalnum() or character in "+-.")

    def _end_word(self) -> None:
        if self._word not in LITERALS and not NUMBER.fullmatch(self._word):
            raise ValueError(f"{self._word!r} is no value")
        self._end_value()

    def _end_value(self) -> None:
        self._expect, self.done = "next", not self._stack

    def _string(self, character: str) -> str:
        if self._escape:
            return self._escaped(character)
        if character == "\\":
            self._escape = character
            return ""
        if character == '"':
            self._held += character
            if self._naming:
                self._expect = "colon"
                return ""
            self._end_value()
            return self._show()
        self._held += character if character >= " " else json.dumps(character)[1:-1]
        return "" if self._naming else self._show()

    def _escaped(self, character: str) -> str:
        self._escape += character
        if self._escape[1] not in '"\\/bfnrtu' or (len(self._escape) > 2 and character not in "0123456789abcdefABCDEF"):
            raise ValueError(f"{self._escape!r} is no escape")
        if self._escape[1] == "u" and len(self._escape) < 6:
            return ""
        self._held, self._escape = self._held + self._escape, ""
        return "" if self._naming else self._show()

    def _show(self) -> str:
        shown, self._held = self._held, ""
        return shown
