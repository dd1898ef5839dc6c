"""What to say to somebody who wrote a name that is not there."""

import difflib
from collections.abc import Iterable

__all__ = ["suggest"]

_FEW = 8
"""Names that are listed where none is like the one that was written."""


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
        few = ", ".join(map(repr, names[:_FEW])) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")
        otherwise = f"there are {few}" if names else "there are none"
    return f"; {otherwise}" if otherwise else ""
