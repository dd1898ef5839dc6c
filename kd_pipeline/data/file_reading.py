"""Reading of encoded images: of files nothing but regular ones of a limited size; and a signal ends the wait."""

import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.files import read_regular
from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources.base import Source

__all__ = ["CallThread", "ReadThread", "are_files", "path_of", "read_file", "read_sample", "require_encoded"]

T = TypeVar("T")

_PATIENCE_S = 2.0
"""How long a batch is waited for before its files are looked at again."""
_LAST_WAITS, _LAST_WAIT_S = 10, 0.1
"""How often, and how long each time, reading that nobody needs any more is waited for."""


class CallThread:
    """Runs calls one after the other in a thread that does not keep the process from ending."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        # A daemon, so that the process can end while a file system does not answer.
        Thread(target=_serve, args=(self._calls,), name="kd_pipeline-read", daemon=True).start()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Let the thread call `function` after all that was requested before."""
        called: Future[T] = Future()
        self._calls.put((function, called))
        return called

    def end(self) -> None:
        """End the thread after all that was requested, without waiting for it."""
        self.call(_end)


class ReadThread:
    """Runs the calls of one DALI pipeline that wait for its files.

    DALI opens the files itself, and in a pipe that took a file's place after `are_files` looked at it, this would block
    for good. A thread in C++ sees no signal, so the caller waits in Python instead.
    """

    def __init__(self, pipeline: Any, names: Callable[[], Iterable[NDArray[np.uint8]]]) -> None:
        """`names` gives the names `[L]` of the files that the pipeline may be reading now."""
        self._pipeline, self._names = [pipeline], names
        self._thread = CallThread()

    def outputs(self) -> Any:
        """The pipeline's `outputs()`.

        Raises:
            RuntimeError: as `outputs()`; also if a pipe is in a file's place.
        """
        called = self._thread.call(self._pipeline[0].outputs)
        while not wait([called], _PATIENCE_S).done:
            _open_pipes(self._names())
        return called.result()

    def close(self) -> bool:
        """End the pipeline; False if it has not ended yet, as where a file system does not answer."""
        ended = self._thread.call(self._pipeline.clear)
        self._thread.end()
        for _ in range(_LAST_WAITS):
            if wait([ended], _LAST_WAIT_S).done:
                return True
            _open_pipes(self._names())
        return False


def path_of(name: NDArray[np.uint8]) -> bytes:
    """The path in the NUL-padded `name` `[L]`."""
    return name.tobytes().rstrip(b"\0")


def read_file(path: bytes, *, max_bytes: int) -> NDArray[np.uint8]:
    """The content of a regular file.

    Raises:
        UnreadableFileError: it cannot be opened, is no regular file or has more than `max_bytes`.
    """
    try:
        return np.frombuffer(read_regular(os.fsdecode(path), max_bytes=max_bytes), np.uint8)
    except OSError as exc:
        raise UnreadableFileError(f"it cannot be opened: {exc.strerror}") from exc


def read_sample(source: Source, index: int, *, max_bytes: int) -> NDArray[np.uint8]:
    """The encoded image of a sample of a source that stores files or bytes, `[L]`.

    Raises:
        UnreadableFileError: there is none, or it has more than `max_bytes`.
    """
    (sample,) = source.read(np.array([index]))
    if source.stores == "files":
        return read_file(path_of(sample), max_bytes=max_bytes)
    require_encoded(sample, max_bytes=max_bytes)
    return sample  # type: ignore[no-any-return]


def require_encoded(sample: NDArray[np.uint8] | UnreadableFileError, *, max_bytes: int) -> None:
    """Refuse what a source of bytes gave for a sample if it is no encoded image of at most `max_bytes`.

    Raises:
        UnreadableFileError: why it is none.
    """
    if isinstance(sample, UnreadableFileError):
        raise sample
    if len(sample) == 0:
        raise UnreadableFileError("it is empty")
    if len(sample) > max_bytes:
        raise UnreadableFileError(f"it has more than {max_bytes} bytes, which no image of max_pixels has")


def are_files(names: NDArray[np.uint8], *, max_bytes: int) -> NDArray[np.bool_]:
    """`[N]`, False for pipes, sockets, devices, and files of more than `max_bytes`.

    What does not exist is left to DALI, which says so.
    """
    fit = np.ones(len(names), np.bool_)
    for row, name in enumerate(names):
        try:
            status = os.stat(path_of(name))
        except (OSError, ValueError):
            continue
        is_file = stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes
        fit[row] = is_file or stat.S_ISDIR(status.st_mode)
    return fit


def _serve(calls: "SimpleQueue[tuple[Callable[[], Any], Future[Any]]]") -> None:
    for function, called in iter(calls.get, None):
        if not called.set_running_or_notify_cancel():
            continue
        try:
            called.set_result(function())
        except SystemExit:
            return
        except BaseException as exc:
            called.set_exception(exc)
        del function, called  # or the last call would be kept until the next one


def _end() -> None:
    raise SystemExit


def _open_pipes(names: Iterable[NDArray[np.uint8]]) -> None:
    """Open each pipe among the files for writing and close it, which ends the wait of whoever opened it for reading."""
    for path in map(path_of, names):
        with suppress(OSError, ValueError):
            if stat.S_ISFIFO(os.stat(path).st_mode):
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
