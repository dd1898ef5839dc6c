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


class FileKinds:
    """Reads the header of each sample's file once, and again if the file's length has changed."""

    def __init__(self, *, orientation: Orientation, max_pixels: int, num_threads: int) -> None:
        self._orientation, self._max_pixels, self._num_threads = orientation, max_pixels, num_threads
        # By index in the dataset; they grow to the largest index.
        self._decoder = np.zeros(0, np.uint8)
        self._length = np.zeros(0, np.uint32)
        self._pixel_bytes = np.zeros(0, np.uint32)
        self._is_file = np.zeros(0, np.bool_)
        self._threads: ThreadPoolExecutor | None = None

    def decoders(
        self, index: NDArray[np.int64], lengths: NDArray[np.int64], file_of: Callable[[int], NDArray[np.uint8]]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """The `Decoder` and the `pixel_bytes` of the samples at `index` `[N]`, whose files have `lengths` `[N]`.

        Args:
            index: indices in the dataset.
            lengths: the number of bytes in each file.
            file_of: returns the content of the file in a row.

        Raises:
            UnreadableFileError: no decoder reads one of them rightly.
        """
        self._decoder, self._length = _grown(self._decoder, index), _grown(self._length, index)
        self._pixel_bytes = _grown(self._pixel_bytes, index)
        lengths = lengths.astype(np.uint32)
        decoders, pixel_bytes = self._decoder[index], self._pixel_bytes[index]
        (new,) = ((decoders == 0) | (self._length[index] != lengths)).nonzero()
        if len(new):
            headers = [read_header(file_of(row).data) for row in new.tolist()]
            decoders[new] = [header.decoder for header in headers]
            pixel_bytes[new] = [header.pixel_bytes for header in headers]
            self._decoder[index], self._pixel_bytes[index], self._length[index] = decoders, pixel_bytes, lengths
        return decoders, pixel_bytes

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
