"""Lines of a CSV file that somebody else may have written, with a limit to each."""

from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["lines_of"]


def lines_of(file: BinaryIO, *, max_bytes: int) -> Iterator[str]:
    """The lines of a file.

    Raises:
        ValueError: one is longer, or is not UTF-8.
    """
    while line := file.readline(max_bytes):
        if len(line) == max_bytes:
            raise ValueError(f"a line of more than {max_bytes} bytes")
        yield line.decode()
