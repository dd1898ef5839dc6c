"""Names in messages: a few of many, and what to say to somebody who wrote one that is not there."""

import difflib
from collections.abc import Iterable, Sequence

__all__ = ["some", "suggest"]

_MOST = 10
"""Names that are listed."""


def some(names: Sequence[str], count: int | None = None) -> str:
    """The first ten of `names`, and how many more there are; `count` where `names` is only the start of them."""
    rest = (count or len(names)) - len(names[:_MOST])
    return ", ".join(names[:_MOST]) + (f" and {rest} more" if rest else "")


def suggest(word: str, known: Iterable[str], *, otherwise: str | None = None) -> str:
    """The end of a sentence on an unknown `word`, from its semicolon on.

    Args:
        word: what was written.
        known: the names that there are.
        otherwise: what to say where none is like it; by default the first few, and where empty nothing at all.
    """
    names = list(known)
    if close := difflib.get_close_matches(word, names, n=3):
        return f"; did you mean {' or '.join(map(repr, close))}?"
    if otherwise is None:
        otherwise = f"there are {some(list(map(repr, names)))}" if names else "there are none"
    return f"; {otherwise}" if otherwise else ""
