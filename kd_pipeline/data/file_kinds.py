"""Which decoder the file of each sample needs, remembered, and the pixels of those that Pillow decodes."""

import os
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.headers import Decoder, Orientation, UnreadableFileError, read_header
from kd_pipeline.data.pillow import decode_with_pillow

__all__ = ["FileKinds", "kind_of_special_file", "path_of", "read_file"]

_CHUNK, _NUM_THREADS = 256, 16
"""Files that a thread asks the file system about in a row, and how many threads do, as each may wait for a server."""


class FileKinds:
    """Reads the header of each sample's file once, and again if the file's length has changed."""

    def __init__(self, *, orientation: Orientation, max_pixels: int, num_threads: int) -> None:
        self._orientation, self._max_pixels, self._num_threads = orientation, max_pixels, num_threads
        # By index in the dataset; they grow to the largest index.
        self._decoder = np.zeros(0, np.uint8)
        self._length = np.zeros(0, np.uint32)
        self._is_regular = np.zeros(0, np.bool_)
        self._threads: ThreadPoolExecutor | None = None

    def decoders(
        self, index: NDArray[np.int64], lengths: NDArray[np.int64], file_of: Callable[[int], NDArray[np.uint8]]
    ) -> NDArray[np.uint8]:
        """The `Decoder` `[N]` of the samples at `index` `[N]`, whose files have `lengths` `[N]`.

        Args:
            index: indices in the dataset.
            lengths: the number of bytes in each file.
            file_of: returns the content of the file in a row.

        Raises:
            UnreadableFileError: no decoder reads one of them rightly.
        """
        self._decoder, self._length = _grown(self._decoder, index), _grown(self._length, index)
        lengths = lengths.astype(np.uint32)
        is_new = (self._decoder[index] == 0) | (self._length[index] != lengths)
        for row in np.flatnonzero(is_new).tolist():
            self._decoder[index[row]] = read_header(file_of(row).data).decoder
            self._length[index[row]] = lengths[row]
        return self._decoder[index]

    def set_intact(self, index: int) -> None:
        """Take the file of sample `index` as one without damage from now on."""
        self._decoder[index] = Decoder.DALI

    def as_pnm(self, files: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """What `files` show, decoded by Pillow, as files without compression that DALI decodes.

        Raises:
            UnreadableFileError: Pillow cannot decode one of them.
        """
        with warnings.catch_warnings():  # of what Pillow repairs
            warnings.simplefilter("ignore")
            if len(files) == 1:
                return [self._as_pnm(files[0])]
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._num_threads, "kd_pipeline-pillow")
            return list(self._threads.map(self._as_pnm, files))

    def without_special(self, index: NDArray[np.int64], paths: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """`paths` `[N, L]` of the samples at `index` `[N]`, without pipes and devices, at which DALI hangs.

        Their paths become empty, so DALI fails there.
        """
        self._is_regular = _grown(self._is_regular, index)
        (new,) = np.nonzero(~self._is_regular[index])
        if not len(new):
            return paths
        chunks = [paths[new[start : start + _CHUNK]] for start in range(0, len(new), _CHUNK)]
        if len(chunks) == 1:
            are_regular = [_are_regular(chunks[0])]
        else:
            with ThreadPoolExecutor(_NUM_THREADS, "kd_pipeline-stat") as threads:
                are_regular = list(threads.map(_are_regular, chunks))
        is_regular = np.concatenate(are_regular)
        self._is_regular[index[new]] = is_regular
        if not is_regular.all():
            paths = paths.copy()
            paths[new[~is_regular]] = 0
        return paths

    def close(self) -> None:
        """Stop the threads."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None

    def _as_pnm(self, file: NDArray[np.uint8]) -> NDArray[np.uint8]:
        data = file.tobytes()
        header = read_header(memoryview(data))
        pixels = decode_with_pillow(data, header, orientation=self._orientation, max_pixels=self._max_pixels)
        height, width, _ = pixels.shape
        return np.frombuffer(b"P6 %d %d 255\n" % (width, height) + pixels.tobytes(), np.uint8)


def path_of(name: NDArray[np.uint8]) -> bytes:
    """The path in the NUL-padded `name` `[L]`."""
    return name.tobytes().rstrip(b"\0")


def read_file(path: bytes) -> NDArray[np.uint8]:
    """The content of a regular file; never waits for a pipe or a device.

    Raises:
        UnreadableFileError: it cannot be opened, or is no regular file.
    """
    try:
        if special := kind_of_special_file(os.stat(path).st_mode):
            raise UnreadableFileError(f"this is {special} and no file")
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if special := kind_of_special_file(os.fstat(file.fileno()).st_mode):
                raise UnreadableFileError(f"this is {special} and no file")
            return np.frombuffer(file.read(), np.uint8)
    except OSError as exc:
        raise UnreadableFileError(f"it cannot be opened: {exc.strerror}") from exc


def kind_of_special_file(mode: int) -> str | None:
    """What is at a path with the `st_mode` `mode`; None for a regular file."""
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((kind for is_kind, kind in kinds if is_kind(mode)), None)


def _are_regular(names: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """`[N]`, False for pipes, sockets and devices. What does not exist is left to DALI, which says so."""
    regular = np.ones(len(names), np.bool_)
    for row, name in enumerate(names):
        try:
            mode = os.stat(path_of(name)).st_mode
        except (OSError, ValueError):
            continue
        regular[row] = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    return regular


def _grown(array: NDArray, index: NDArray[np.int64]) -> NDArray:  # type: ignore[type-arg]
    """`array` with a place for each of `index`, at least twice as long if it must grow."""
    needed = int(index.max(initial=-1)) + 1
    if needed <= len(array):
        return array
    grown = np.zeros(max(needed, 2 * len(array)), array.dtype)
    grown[: len(array)] = array
    return grown
