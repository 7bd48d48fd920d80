"""Text in which characters are shown that would control a terminal or the order of reading."""

from __future__ import annotations

import re

_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters of both kinds but tab and newline
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # of the direction of text
    "\u2028\u2029\ud800-\udfff]"  # line breaks; bytes of file names that are no characters
)


def visible(text: str) -> str:
    """The text with characters that a terminal would obey shown as Python escapes them."""
    return _OBEYED.sub(_escaped, text)


def one_line(text: str) -> str:
    """`visible`, with newlines and tabs shown too: for messages, and names that may hold any."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
