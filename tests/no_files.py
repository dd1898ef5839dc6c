"""What may be at a path and is no file that can be read: pipes, sockets, devices and others."""

import os
import socket
from collections.abc import Callable
from pathlib import Path


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may have a hundred bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def sparse(path: Path) -> None:
    """A file of 1 TiB that needs no space."""
    path.touch()
    os.truncate(path, 2**40)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "this is a pipe and no file"),
    "socket": (_socket, "this is a socket and no file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "this is a device and no file"),
    "directory": (Path.mkdir, "this is a directory and no file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
}
"""How each is made, and why it is refused."""
