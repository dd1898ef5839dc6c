"""Lines of a file list that need no parser, because each separator in them separates: split all at once."""

import re

import numpy as np

from kd_pipeline.data.sources.labels import MAX_NAME

__all__ = ["split_plain"]

_NEWLINE, _SPACE, _COMMENT = b"\n #"
_UNUSUAL = (b'"', b"://", b"\nsep=")
"""Quotes, URLs and, after the end of a line, what Excel writes to name the delimiter."""
_SPACES = re.compile("[\x80-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
"""What `str.strip` removes beside ASCII, among others."""


def split_plain(lines: bytes, delimiter: str, num_columns: int) -> list[list[bytes]] | None:
    """The cells of each column of some lines; None if a line is not plain, and needs the parser of `ListRows`.

    Plain lines are UTF-8 with `num_columns` cells that are neither empty nor long, and with nothing that a parser
    removes or replaces: quotes, comments, spaces around cells, control characters. For these it finds the same cells.

    Args:
        lines: whole lines. The last one may be without an end.
        delimiter: a character of ASCII.
        num_columns: cells of each line.
    """
    lines = lines.replace(b"\r\n", b"\n")
    lines = lines if lines.endswith(b"\n") else lines + b"\n"
    if any(each in lines for each in _UNUSUAL) or lines.startswith(b"sep=") or not _is_plain_text(lines):
        return None
    codes = np.frombuffer(lines, np.uint8)
    is_newline = codes == _NEWLINE
    is_end = is_newline | (codes == ord(delimiter))
    (ends,) = is_end.nonzero()
    is_last = is_newline[ends]
    if np.count_nonzero(is_last) * num_columns != len(ends) or not is_last[num_columns - 1 :: num_columns].all():
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts
    if lengths.min() < 1 or lengths.max() > MAX_NAME or ((codes < _SPACE) & ~is_end).any():
        return None
    is_padded = (codes[starts] == _SPACE) | (codes[ends - 1] == _SPACE)
    if is_padded.any() or (codes[starts[::num_columns]] == _COMMENT).any():
        return None
    separator = delimiter.encode()
    cells = lines.replace(b"\n", separator).split(separator)
    return [cells[column:-1:num_columns] for column in range(num_columns)]


def _is_plain_text(lines: bytes) -> bool:
    if lines.isascii():
        return True
    try:
        return not _SPACES.search(lines.decode())
    except UnicodeDecodeError:
        return False
