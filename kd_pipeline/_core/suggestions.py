"""Lists of names in messages, and suggestions for misspelled ones."""

import difflib
from collections.abc import Iterable, Sequence

from kd_pipeline._core.text import printable

__all__ = ["first_few", "suggest"]

_MAX_NAMES = 10


def first_few(names: Sequence[str], count: int | None = None) -> str:
    """The first ten of `names`, safe to print, and the number of the rest out of `count`, by default all names."""
    shown = names[:_MAX_NAMES]
    rest = (count or len(names)) - len(shown)
    return ", ".join(map(printable, shown)) + (f" and {rest} more" if rest else "")


def suggest(word: str, known: Iterable[str], *, otherwise: str | None = None) -> str:
    """The end of an error message about an unknown `word`, starting with a semicolon.

    Args:
        word: the unknown name.
        known: the valid names, of which similar ones are suggested.
        otherwise: text if no name is similar; defaults to the first few names.
    """
    names = list(known)
    if close := difflib.get_close_matches(word, names, n=3):
        return f"; did you mean {' or '.join(map(repr, close))}?"
    if otherwise is None:
        otherwise = f"there are {first_few(list(map(repr, names)))}" if names else "there are none"
    return f"; {otherwise}" if otherwise else ""
