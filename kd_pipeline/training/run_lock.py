"""The lock of a run's folder: one process at a time trains or records into it, and a second one is told who does."""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.training.environment import command_line

__all__ = ["LOCK", "lock_folder"]

_logger = logging.getLogger("kd_pipeline")

LOCK = "run.lock"
"""Name of the file in the folder. It is never deleted: a process that waits for the deleted file and one that creates
it again would both hold a lock."""
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
        StateError: another process holds the lock; says which one, since when, and its command.
        ConfigError: the folder cannot be written to.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # O_NOFOLLOW: another user could point a symlink at one of our files.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as exc:
        raise ConfigError(f"cannot write to the folder {folder}: {exc.strerror}; {otherwise}") from None
    try:
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
    finally:
        os.close(descriptor)


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
        holder = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {holder['pid']} on {holder['host']} since {holder['started']}: {holder['command']}"
        stop = f"kill {holder['pid']}" + ("" if holder["host"] == socket.gethostname() else f" on {holder['host']}")
    except (OSError, ValueError, KeyError, TypeError):
        return "by another process, which has just started or ended\nRun the command again in a moment"
    return f"by {who}\nWait until it ends, stop it ({stop})"
