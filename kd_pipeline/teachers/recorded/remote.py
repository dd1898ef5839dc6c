"""A recording behind a URL: parts are downloaded as they are needed, verified, and kept in the user's cache."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from typing import BinaryIO

from kd_pipeline._core.paths import Url
from kd_pipeline._core.user_cache import temporary_without_cache
from kd_pipeline.errors import NoSuchFileError, StorageError, TeacherError, shown
from kd_pipeline.storage import StoreSettings, open_store
from kd_pipeline.storage.cache_folder import CacheFolder
from kd_pipeline.teachers.recorded.folder import MAX_SUMS_BYTES, SUMS, file_digest
from kd_pipeline.teachers.recorded.manifest import MANIFEST, MAX_MANIFEST_BYTES, RecordingManifest
from kd_pipeline.teachers.recorded.parts import Part, Parts, Piece

__all__ = ["RemoteFolder"]

_logger = logging.getLogger("kd_pipeline")

_PATIENCE_S = 600.0
"""How long another process may take to write the same part into the cache; then this one does without."""


class RemoteFolder:
    """A folder in an object store or on a web server."""

    def __init__(self, url: Url, settings: StoreSettings | None = None) -> None:
        """Connect to nothing yet.

        Raises:
            ConfigError: nothing reads such URLs.
            MissingPackageError: the package that does is not installed.
        """
        self._url, self._settings = url.rstrip("/"), settings or StoreSettings()
        # Parts are kept by their digests here, instead of whole files by their URLs there.
        self._store = open_store(url, self._settings.model_copy(update={"cache_size": 0}))
        self._cache: CacheFolder | None = None
        self._has_no_cache = not self._settings.cache_bytes
        self._verified: set[str] = set()
        """Digests of files in the cache that this process has read."""
        self._thread: ThreadPoolExecutor | None = None
        self._ready: dict[Part, Future[BinaryIO]] = {}

    def __str__(self) -> str:
        return shown(self._url)

    def load_manifest(self) -> RecordingManifest:
        """See `RecordingFolder`."""
        manifest = self.find_manifest()
        if manifest is None:
            raise TeacherError(
                f"{self} holds no recording: there is no {self}/{MANIFEST}; make one with kd-pipeline record"
            )
        return manifest

    def find_manifest(self) -> RecordingManifest | None:
        """See `LocalFolder`."""
        content = self.find(MANIFEST, MAX_MANIFEST_BYTES)
        return None if content is None else RecordingManifest.parse(content, f"{self}/{MANIFEST}")

    def find_parts(self, manifest: RecordingManifest, *, listed: bool = True) -> Parts:
        """See `RecordingFolder`: those in the list that joining writes, or else those that the store finds.

        Whoever records asks the store, with `listed=False`.
        """
        sums = self.find(SUMS, MAX_SUMS_BYTES) if listed else None
        if sums is not None:
            try:
                return Parts.of_sums(manifest, sums)
            except ValueError as exc:
                raise TeacherError(f"{self}/{SUMS} is damaged ({exc}); upload it again") from None
        try:
            found = self._store.find(f"{self._url}/epoch-*/*.bin")
        except StorageError as exc:
            raise TeacherError(
                f"{self} has no {SUMS}, and its parts cannot be listed ({exc.reason}); once all are there, kd-pipeline "
                "record --join writes it"
            ) from None
        return Parts(manifest, ["/".join(each.rsplit("/", 2)[-2:]) for each in found])

    def open_part(self, part: Part, num_bytes: int) -> BinaryIO:
        """See `RecordingFolder`. Its sha256 is that in its name, or this raises.

        Raises:
            StorageError: it cannot be downloaded.
        """
        future = self._ready.pop(part, None)
        return self._open(part, num_bytes) if future is None else future.result()

    def verify(self, part: Part, num_bytes: int) -> None:
        """See `LocalFolder`."""
        self._download(part, num_bytes)

    def expect(self, parts: Sequence[Part], manifest: RecordingManifest) -> None:
        """Download these parts in a thread."""
        self._thread = self._thread or ThreadPoolExecutor(1, "kd_pipeline-parts")
        for part in self._ready.keys() - set(parts):
            _drop(self._ready.pop(part))  # the reader has moved elsewhere
        for part in parts:
            if part not in self._ready:
                num_bytes = manifest.row_bytes * (manifest.part_stop(part.start) - part.start)
                self._ready[part] = self._thread.submit(self._open, part, num_bytes)

    def close(self) -> None:
        """See `RecordingFolder`."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        for future in self._ready.values():
            _drop(future)
        self._ready.clear()
        self._store.close()

    def create(self, manifest: RecordingManifest) -> RecordingManifest:
        """See `LocalFolder`. A store has no file that only the first writes; all processes of a command write the same.

        Raises:
            StorageError: it cannot be written.
        """
        self._store.write(f"{self._url}/{MANIFEST}", manifest.content)
        return self.load_manifest()

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a whole object.

        Raises:
            StorageError: it cannot be written.
        """
        self._store.write(f"{self._url}/{name}", bytes(content))

    def find_pieces(self) -> list[Piece]:
        """None: a store has whole parts only."""
        return []

    def write_piece(self, epoch: int, start: int, stop: int, content: bytes) -> None:
        """Nothing: what is recorded of a part that is not complete is lost with the process."""

    def read_piece(self, piece: Piece, num_bytes: int) -> bytes | None:
        """None."""
        return None

    def remove_pieces(self, epoch: int, start: int, stop: int) -> None:
        """Nothing."""

    def remove_working(self) -> None:
        """Nothing."""

    def find(self, name: str, max_bytes: int) -> bytes | None:
        """A small file; None if there is none."""
        path = f"{self._url}/{name}"
        try:
            num_bytes = self._store.stat(path).num_bytes
            if num_bytes > max_bytes:
                raise TeacherError(f"{self}/{name} has {num_bytes} bytes, and at most {max_bytes} are read")
            return self._store.read(path)
        except NoSuchFileError:
            return None

    def _open(self, part: Part, num_bytes: int) -> BinaryIO:
        """The file of a part, from the cache or new in it; one without a name where there is no cache."""
        cache = self._open_cache()
        path = None if cache is None else cache.find(part.digest, num_bytes)
        if path is not None:
            file: BinaryIO = path.open("rb")
            if part.digest in self._verified or file_digest(file) == part.digest:
                self._verified.add(part.digest)
                return file
            file.close()
            assert cache is not None
            cache.delete(part.digest)  # the disk has changed it
        content = self._download(part, num_bytes)
        if cache is not None:
            try:
                path = cache.add(part.digest, num_bytes, _writer(content), _PATIENCE_S)
            except OSError as exc:
                _logger.warning("parts of recordings are not kept in %s: %s", cache.folder, exc.strerror)
                self._has_no_cache, path = True, None
            if path is not None:
                self._verified.add(part.digest)
                return path.open("rb")
        unnamed = os.fdopen(os.memfd_create(part.digest), "w+b")
        unnamed.write(content)
        unnamed.flush()
        return unnamed

    def _download(self, part: Part, num_bytes: int) -> bytes:
        found = ""
        for _ in range(2):  # what went wrong on the way is right the next time
            content = self._store.read(f"{self._url}/{part.name}")
            found = sha256(content).hexdigest()
            if found == part.digest and len(content) == num_bytes:
                return content
        size = "" if len(content) == num_bytes else f" and has {len(content)} bytes instead of {num_bytes}"
        raise TeacherError(
            f"the recording in {self} is damaged: {self}/{part.name} has the sha256 {found} instead of {part.digest}"
            f"{size}; upload this file again from the folder that it was recorded in, or delete it there and here, and "
            "run the command that recorded it"
        )

    def _open_cache(self) -> CacheFolder | None:
        if self._cache is None and not self._has_no_cache:
            settings = self._settings
            try:
                folder = settings.cache_dir or temporary_without_cache("downloads")
                self._cache = CacheFolder(folder / "recordings", settings.cache_bytes)
            except OSError as exc:
                _logger.warning("parts of recordings are not kept: %s", exc.strerror)
                self._has_no_cache = True
        return self._cache


def _drop(future: Future[BinaryIO]) -> None:
    """Close the file of a part that nobody needs, as soon as it is there."""

    def close(done: Future[BinaryIO]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result().close()

    future.cancel()
    future.add_done_callback(close)


def _writer(content: bytes) -> Callable[[int], None]:
    def write(descriptor: int) -> None:
        left = memoryview(content)
        offset = 0
        while offset < len(left):
            offset += os.pwrite(descriptor, left[offset:], offset)

    return write
