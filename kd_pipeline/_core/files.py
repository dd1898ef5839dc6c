"""Open files that others may have prepared: without waiting, within a size, and knowing who could have written them."""

import errno
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Literal

__all__ = [
    "NotAFileError",
    "UntrustedFileError",
    "check_trusted_folder",
    "describe_special",
    "open_own",
    "open_regular",
    "open_trusted",
    "read_regular",
    "read_trusted",
]

_MAX_LINKS = 40
"""As many links on the way to a file as Linux follows."""
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
"""Without O_NONBLOCK, opening a pipe waits for somebody to write to it."""
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITERS = {stat.S_IWGRP: "group", stat.S_IWOTH: "others"}


class NotAFileError(OSError):
    """A directory, pipe, socket, device or link where a file is needed, or a file that is too large."""


class UntrustedFileError(PermissionError):
    """A file or folder that a different user could have written."""


def open_regular(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> BufferedReader:
    """Open a regular file for reading, following links; never waits for a pipe or a device.

    Raises:
        NotAFileError: it is no regular file, or has more than `max_bytes`. `strerror` goes after "cannot be read: ".
        OSError: it cannot be opened.
    """
    _refuse_special(os.stat(path), path)  # opening some devices has an effect
    descriptor = os.open(path, _READ)
    with _closed_on_error(descriptor):
        _refuse_special(os.fstat(descriptor), path, max_bytes)
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """The content of a regular file of at most `max_bytes`.

    Raises:
        OSError: as `open_regular`, or it grew while it was read.
    """
    with open_regular(path, max_bytes=max_bytes) as file:
        return _read(file, path)


def open_trusted(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> BufferedReader:
    """Open a file that only this user or root can have written; what is checked is what the caller reads.

    The path is followed from / on, one folder at a time. Each folder, each link to one and the file itself must belong
    to this user or root, and neither group nor others may write to it. In a folder with the sticky bit, such as /tmp,
    they may, as only the owner of a file replaces it there. The file itself may be no link.

    Raises:
        UntrustedFileError: somebody else could have written it. `strerror` names the file or folder, and what to do.
        NotAFileError: it is a link or no regular file, or has more than `max_bytes`.
        OSError: it cannot be opened.
    """
    path = Path(path).absolute()
    folder = _open_folder(path.parent)
    try:
        status = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            target = path.parent / os.readlink(path.name, dir_fd=folder)
            raise NotAFileError(errno.ELOOP, f"this is a link; give the file itself, {target}", str(path))
        _refuse_special(status, path)
        descriptor = os.open(path.name, _READ | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)
    with _closed_on_error(descriptor):
        _refuse_special(os.fstat(descriptor), path, max_bytes)
        _refuse_foreign(os.fstat(descriptor), path)
    return os.fdopen(descriptor, "rb")


def read_trusted(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """The content of a file of at most `max_bytes` that only this user or root can have written.

    Raises:
        OSError: as `open_trusted`, or it grew while it was read.
    """
    with open_trusted(path, max_bytes=max_bytes) as file:
        return _read(file, path)


def check_trusted_folder(folder: str | os.PathLike[str]) -> None:
    """Check that only this user or root can write to a folder or replace it, by the rule of `open_trusted`.

    Raises:
        UntrustedFileError: somebody else can.
        OSError: there is no such folder, or it cannot be searched.
    """
    os.close(_open_folder(Path(folder).absolute()))


def open_own(path: str | os.PathLike[str], mode: Literal["ab", "r+b", "w+b"], *, permissions: int = 0o644) -> BinaryIO:
    """Open a file to write it, following no link at its end; `ab` and `w+b` create it with `permissions`.

    Whoever prepared the folder can therefore not have a file outside of it written.

    Raises:
        NotAFileError: it is a link or no regular file.
        OSError: it cannot be opened.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    flags |= os.O_WRONLY | os.O_APPEND if mode == "ab" else os.O_RDWR
    try:
        descriptor = os.open(path, flags | (0 if mode == "r+b" else os.O_CREAT), permissions)
    except OSError as exc:
        reasons = {
            errno.ELOOP: "this is a link, and nothing is written through links; delete it",
            errno.ENXIO: "this is a pipe, a socket or a device and no file; delete it",
        }
        if exc.errno in reasons:
            raise NotAFileError(exc.errno, reasons[exc.errno], os.fspath(path)) from None
        raise
    with _closed_on_error(descriptor):
        _refuse_special(os.fstat(descriptor), path)
        if mode == "w+b":  # not earlier, as O_TRUNC acts before it is known what was opened
            os.ftruncate(descriptor, 0)
    return os.fdopen(descriptor, mode)


def describe_special(mode: int) -> str | None:
    """What is at a path with the `st_mode` `mode`, such as "a pipe"; None for a regular file."""
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISLNK, "a link"),
    )
    return next((kind for is_kind, kind in kinds if is_kind(mode)), None)


def _open_folder(folder: Path) -> int:
    """A descriptor of `folder` to pass as `dir_fd`, after checking each folder and link on the way from /."""
    descriptor, shown = os.open("/", _FOLDER), Path("/")
    with _closed_on_error(descriptor):
        _refuse_foreign(os.fstat(descriptor), shown)
    names, num_links = list(reversed(folder.parts[1:])), 0
    while names:
        name = names.pop()
        with _closed_on_error(descriptor):
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            _refuse_foreign(status, shown / name)
            if stat.S_ISLNK(status.st_mode):
                num_links += 1
                if num_links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
                target = Path(os.readlink(name, dir_fd=descriptor))
                names += reversed(target.parts)  # the first of an absolute path is /, which opens the root
                continue
            child = os.open(name, _FOLDER, dir_fd=descriptor)
        os.close(descriptor)
        descriptor, shown = child, shown / name
        with _closed_on_error(descriptor):
            _refuse_foreign(os.fstat(descriptor), shown)  # the one that was opened, whatever was there before
    return descriptor


def _refuse_special(status: os.stat_result, path: str | os.PathLike[str], max_bytes: int | None = None) -> None:
    if kind := describe_special(status.st_mode):
        raise NotAFileError(errno.EINVAL, f"this is {kind} and no file", os.fspath(path))
    if max_bytes is not None and status.st_size > max_bytes:
        reason = f"it has {status.st_size} bytes, and at most {max_bytes} are read"
        raise NotAFileError(errno.EFBIG, reason, os.fspath(path))


def _refuse_foreign(status: os.stat_result, path: Path) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        reason = f"{path} belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}"
        raise UntrustedFileError(errno.EPERM, reason, str(path))
    if stat.S_ISLNK(status.st_mode) or (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        return  # a link has no mode of its own
    who = [name for bit, name in _WRITERS.items() if status.st_mode & bit]
    if who:
        change = f"chmod {'go' if len(who) == 2 else who[0][0]}-w {shlex.quote(str(path))}"
        reason = f"{' and '.join(who)} may write to {path}; if nobody did, {change}"
        raise UntrustedFileError(errno.EPERM, reason, str(path))


@contextmanager
def _closed_on_error(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise


def _read(file: BinaryIO, path: str | os.PathLike[str]) -> bytes:
    content = file.read(os.fstat(file.fileno()).st_size)
    if file.read(1):
        raise OSError(errno.EAGAIN, "it grew while it was read", os.fspath(path))
    return content
