"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

__all__ = ["whole_file", "write_whole"]


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` at the end: whoever reads there finds the old or the new one.

    It lies in the same folder, where a rename is atomic (TMPDIR may be on another disk), and its bytes reach the disk
    before its name does. After an error there is only the old one. A process that is killed may leave `.NAME.*.tmp`.
    """
    # Not the number of the process, which containers that share a folder have alike.
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        with suppress(OSError):
            unfinished.unlink()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write the bytes, or the text in UTF-8, as the file `path`, whole or not at all."""
    with whole_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
