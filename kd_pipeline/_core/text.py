"""Text of strangers, such as class and file names, made safe to print."""

import unicodedata

__all__ = ["counted", "indented", "plural", "printable"]

_ESCAPED = {"Cc", "Cs", "Zl", "Zp"}
"""Control characters, bytes that are no UTF-8, and separators of lines and paragraphs."""
_DIRECTIONS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They change the order in which the characters after them are shown."""


def printable(text: object, *, keep: str = "") -> str:
    """`str(text)` with the characters escaped that move a terminal's cursor, start a line or reorder what is shown.

    Args:
        text: a name, or a line with names in it.
        keep: control characters to leave as they are, such as the newlines of a message.
    """
    return "".join(
        char.encode("unicode_escape").decode()
        if char not in keep and (char in _DIRECTIONS or unicodedata.category(char) in _ESCAPED)
        else char
        for char in str(text)
    )


def indented(text: str) -> str:
    """A message of several lines, `printable` and with all but the first indented, so that none looks like another."""
    return printable(text, keep="\n").replace("\n", "\n  ")


def plural(number: int, noun: str) -> str:
    """`noun` as it follows `number`: `epoch` or `batch` after 1, else `epochs` or `batches`."""
    if number == 1:
        return noun
    return f"{noun}es" if noun.endswith(("ss", "tch", "x")) else f"{noun}s"


def counted(number: int, noun: str) -> str:
    """`1 image`, or `2,000 images`."""
    return f"{number:,} {plural(number, noun)}"
