"""What the file of each sample needs to be decoded, remembered, and the pixels of those that Pillow decodes."""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.file_reading import are_files
from kd_pipeline.data.headers import Decoder, Orientation, max_file_bytes, read_header
from kd_pipeline.data.pillow import decode_with_pillow

__all__ = ["FileKinds"]

_CHUNK, _NUM_THREADS = 256, 16
"""Files that a thread asks the file system about in a row, and how many threads do, as each may wait for a server."""

_MAX_KINDS = 255
"""Kinds of files that are remembered, in a byte for each sample. Real data has one or two of the dozen that exist."""


class FileKinds:
    """Reads the header of each sample's file once, and again if the file's length has changed."""

    def __init__(self, *, orientation: Orientation, max_pixels: int, num_threads: int) -> None:
        self._orientation, self._max_pixels, self._num_threads = orientation, max_pixels, num_threads
        # By index in the dataset; they grow to the largest index. A dataset may have a hundred million samples.
        self._kind = np.zeros(0, np.uint8)
        """0 for one that is not known, else the number of the kind."""
        self._length = np.zeros(0, np.uint32)
        self._is_file = np.zeros(0, np.bool_)
        # By number of the kind.
        self._numbers: dict[tuple[Decoder, int], int] = {}
        self._decoder = np.zeros(_MAX_KINDS + 1, np.uint8)
        self._pixel_bytes = np.zeros(_MAX_KINDS + 1, np.uint32)
        self._threads: ThreadPoolExecutor | None = None

    def decoders(
        self, index: NDArray[np.int64], lengths: NDArray[np.int64] | None, file_of: Callable[[int], NDArray[np.uint8]]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """The `Decoder` and the `pixel_bytes` of the samples at `index` `[N]`.

        Args:
            index: indices in the dataset.
            lengths: `[N]`, the number of bytes in each file; None for files that do not change.
            file_of: returns the content of the file in a row.

        Raises:
            UnreadableFileError: no decoder reads one of them rightly.
        """
        self._kind = _grown(self._kind, index)
        kinds = self._kind[index]
        is_new = kinds == 0
        if lengths is not None:
            self._length = _grown(self._length, index)
            is_new |= self._length[index] != lengths.astype(np.uint32)
        decoders, pixel_bytes = self._decoder[kinds], self._pixel_bytes[kinds]
        (new,) = is_new.nonzero()
        if len(new):
            headers = [read_header(file_of(row).data) for row in new.tolist()]
            decoders[new] = [header.decoder for header in headers]
            pixel_bytes[new] = [header.pixel_bytes for header in headers]
            self._kind[index[new]] = [self._number(header.decoder, header.pixel_bytes) for header in headers]
            if lengths is not None:
                self._length[index[new]] = lengths[new]
        return decoders, pixel_bytes

    def set_intact(self, index: int) -> None:
        """Take the file of sample `index` as one without damage from now on."""
        if kind := self._kind[index]:
            self._kind[index] = self._number(Decoder.DALI, int(self._pixel_bytes[kind]))

    def _number(self, decoder: Decoder, pixel_bytes: int) -> int:
        """The number of a kind; 0, so that its files are not remembered, after too many others."""
        if (decoder, pixel_bytes) not in self._numbers:
            number = len(self._numbers) + 1
            if number > _MAX_KINDS:
                return 0
            self._numbers[decoder, pixel_bytes] = number
            self._decoder[number], self._pixel_bytes[number] = decoder, pixel_bytes
        return self._numbers[decoder, pixel_bytes]

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

    def only_files(self, index: NDArray[np.int64], paths: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """`paths` `[N, L]` of the samples at `index` `[N]`, without pipes, devices and what is too large to be read.

        Their paths become empty, so DALI fails there.
        """
        self._is_file = _grown(self._is_file, index)
        (new,) = np.nonzero(~self._is_file[index])
        if not len(new):
            return paths
        chunks = [paths[new[start : start + _CHUNK]] for start in range(0, len(new), _CHUNK)]
        look = partial(are_files, max_bytes=max_file_bytes(self._max_pixels))
        if len(chunks) == 1:
            found = [look(chunks[0])]
        else:
            with ThreadPoolExecutor(_NUM_THREADS, "kd_pipeline-stat") as threads:
                found = list(threads.map(look, chunks))
        is_file = np.concatenate(found)
        self._is_file[index[new]] = is_file
        if not is_file.all():
            paths = paths.copy()
            paths[new[~is_file]] = 0
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
        head = np.frombuffer(b"P6 %d %d 255\n" % (width, height), np.uint8)
        return np.concatenate([head, pixels.reshape(-1)])


def _grown(array: NDArray, index: NDArray[np.int64]) -> NDArray:  # type: ignore[type-arg]
    """`array` with a place for each of `index`, at least twice as long if it must grow."""
    needed = int(index.max(initial=-1)) + 1
    if needed <= len(array):
        return array
    grown = np.zeros(max(needed, 2 * len(array)), array.dtype)
    grown[: len(array)] = array
    return grown
