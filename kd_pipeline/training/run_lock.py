"""The lock of a run's folder: one process at a time trains or records into it, and a second one is told who does."""

import errno
import fcntl
import json
import logging
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from kd_pipeline._core.files import NotAFileError, open_own, open_regular
from kd_pipeline._core.text import printable
from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.training.environment import command_line

__all__ = ["LOCK", "is_locked", "lock_folder"]

_logger = logging.getLogger("kd_pipeline")

LOCK = "run.lock"
"""Name of the file in the folder. It is never deleted: a process that waits for the deleted file and one that creates
it again would both hold a lock."""
_MAX_BYTES = 2**18
"""A command may be as long as the system's limit for one."""
_MAX_SHOWN = 1000
"""Characters of it in a message."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL}
"""How filesystems without locks refuse, such as Lustre that is mounted without `flock`."""


@contextmanager
def lock_folder(folder: Path, *, otherwise: str) -> Iterator[None]:
    """Hold the lock of `folder`, which is created if missing. The kernel releases it if the process dies.

    Call it on one rank. A filesystem without locks is a warning.

    Args:
        folder: the folder.
        otherwise: how to work in a different folder, for the message: `set a different run_dir`.

    Raises:
        StateError: another process holds the lock; says which one, since when, and its command. Or its file is a link.
        ConfigError: the folder cannot be written to.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_own(path, "ab", permissions=0o600)  # it holds a command, which may have secrets in it
    except NotAFileError as exc:
        raise StateError(f"{path} cannot be the lock of the folder: {exc.strerror}") from None
    except OSError as exc:
        raise ConfigError(f"cannot write to the folder {folder}: {exc.strerror}; {otherwise}") from None
    with file:
        descriptor = file.fileno()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(f"{folder} is in use {_holder(path)}, or {otherwise}") from None
        except OSError as exc:
            if exc.errno not in _NO_LOCKS:
                raise
            _logger.warning(
                "the filesystem of %s has no file locks (%s): make sure that no other process writes into this folder",
                *(folder, exc.strerror),
            )
        _write(descriptor, json.dumps(_this_process()) + "\n")
        try:
            yield
        finally:
            _write(descriptor, "")


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of `folder`; False where that cannot be known."""
    try:
        with open_regular(folder / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _write(descriptor: int, text: str) -> None:
    with suppress(OSError):  # the disk may be full, and the lock does not depend on what the file says
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _this_process() -> dict[str, str | int]:
    started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "command": command_line()}


def _holder(path: Path) -> str:
    """Who holds the lock, and what to do about it."""
    try:
        with open_regular(path, max_bytes=_MAX_BYTES) as file:
            status, holder = os.fstat(file.fileno()), json.loads(file.read())
        pid, host = holder["pid"], _shown(holder["host"])
        who = f"process {int(pid)} on {host} since {_shown(holder['started'])}: {_shown(holder['command'])}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "by another process, which has just started or ended\nRun the command again in a moment"
    # Whoever else could write the file could name any process of this user.
    is_own = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not is_own or type(pid) is not int or pid < 2:
        return f"by {who}\nWait until it ends, stop it"
    where = "" if holder["host"] == socket.gethostname() else f" on {host}"
    return f"by {who}\nWait until it ends, stop it (kill {pid}{where})"


def _shown(text: object) -> str:
    shown = printable(text)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"
