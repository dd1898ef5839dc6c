"""What may be in the place of a file: things on which a reader would wait, or that would fill its memory."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

__all__ = ["SPECIAL_FILES"]


def _make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


SPECIAL_FILES: dict[str, Callable[[Path], None]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "socket": _make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "sparse": _make_sparse,
}
"""Each makes one, by kind; `sparse` has 1 TiB and is a regular file."""
