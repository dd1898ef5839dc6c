"""A remote store with whole files in a folder of this machine: read ahead, and read again from there."""

import os
from collections.abc import Iterable, Sequence

from kd_pipeline.errors import StorageError
from kd_pipeline.storage.base import FileStat, FolderEntry, StoreSettings
from kd_pipeline.storage.downloads import Downloads
from kd_pipeline.storage.local import LocalStore
from kd_pipeline.storage.parallel import ByteRange, RangeReader, read_ranges
from kd_pipeline.storage.remote import RemoteStore

__all__ = ["CachedStore"]

_MAX_OPEN = 16
"""Few, as a file that is deleted while it is open still takes its space."""
_MUCH = 0.05
"""The part of a file that is read before the rest of it is downloaded too, if there is room for all files."""
_MAX_DOWNLOADS = 2
"""Of one file because it was read: if it does not stay in the cache, it is read in ranges from then on."""


class CachedStore(RangeReader):
    """Reads what is in the cache from there, and the rest in ranges, without waiting for a download."""

    def __init__(self, remote: RemoteStore, settings: StoreSettings, *, whole: bool = False) -> None:
        """With `whole`, a file is downloaded from its first read on."""
        self._remote, self._settings, self._whole = remote, settings, whole
        self.num_threads = remote.num_threads
        self._local = LocalStore(_MAX_OPEN)
        self._now = self._begin()

    def stat(self, path: str) -> FileStat:
        """See `Store`."""
        stat = self._state.stats[path] = self._remote.stat(path)
        return stat

    def stat_many(self, paths: Sequence[str]) -> list[FileStat | StorageError]:
        """See `stat_files`."""
        found = self._remote.stat_many(paths)
        known = {path: stat for path, stat in zip(paths, found, strict=True) if isinstance(stat, FileStat)}
        self._state.stats.update(known)
        return found

    def read_many(self, ranges: Sequence[ByteRange], num_threads: int | None = None) -> list[bytes | StorageError]:
        """See `read_ranges`. The cache is read without asking whether the remote file has changed."""
        results = self._read_copies(ranges, range(len(ranges)))
        missing = [index for index in range(len(ranges)) if index not in results]
        if self._whole and (unknown := [index for index in missing if self._stat_of(ranges[index]) is None]):
            results |= self._look_up(ranges, unknown)
            missing = [index for index in missing if index not in results]
        found = self._remote.read_many([ranges[index] for index in missing], num_threads)
        for index, content in zip(missing, found, strict=True):
            results[index] = content
            if isinstance(content, bytes):
                self._keep(ranges[index], content)
        return [results[index] for index in range(len(ranges))]

    def find(self, pattern: str) -> list[str]:
        """See `Store`."""
        return self._remote.find(pattern)

    def list_folder(self, path: str) -> list[FolderEntry]:
        """See `Store`."""
        return self._remote.list_folder(path)

    def write(self, path: str, content: bytes) -> None:
        """See `Store`."""
        state = self._state
        state.stats.pop(path, None)
        state.downloads.forget(path)
        self._remote.write(path, content)

    def prefetch(self, paths: Sequence[str]) -> None:
        """Download the files to the cache in the background, in this order, a few at once."""
        state = self._state
        missing = [path for path in paths if state.downloads.copy_of(path, state.stats.get(path)) is None]
        state.downloads.want(missing, lambda path: state.stats.get(path) or self.stat(path))

    def close(self) -> None:
        """Begin no more downloads, and close the files."""
        self._state.downloads.stop()
        self._local.close()

    @property
    def _state(self) -> "_State":
        """That of this process: a fork has the files of its parent, and none of its downloads."""
        if self._now.process != os.getpid():
            self._now = self._begin()
        return self._now

    def _begin(self) -> "_State":
        return _State(Downloads(self._remote, self._settings, self._local.close))

    def _stat_of(self, wanted: ByteRange) -> FileStat | None:
        return wanted.expected or self._state.stats.get(wanted.path)

    def _look_up(self, ranges: Sequence[ByteRange], unknown: Sequence[int]) -> dict[int, bytes | StorageError]:
        """Ask for the versions of files, and read those whose version is in the cache."""
        paths = list(dict.fromkeys(ranges[index].path for index in unknown))
        found = dict(zip(paths, self.stat_many(paths), strict=True))
        failed = {index: stat for index in unknown if isinstance(stat := found[ranges[index].path], StorageError)}
        return {**failed, **self._read_copies(ranges, [index for index in unknown if index not in failed])}

    def _read_copies(self, ranges: Sequence[ByteRange], which: Iterable[int]) -> dict[int, bytes | StorageError]:
        """The contents, by index, of those ranges that are on this machine."""
        downloads = self._state.downloads
        results: dict[int, bytes | StorageError] = {}
        places: list[tuple[int, str]] = []
        for index in which:
            wanted = ranges[index]
            stat = self._stat_of(wanted)
            if (part := downloads.read_part(wanted, stat)) is not None:
                results[index] = part
            elif (copy := downloads.copy_of(wanted.path, stat)) is not None:
                places.append((index, copy))
        local = [ByteRange(copy, ranges[index].start, ranges[index].length) for index, copy in places]
        for (index, _), content in zip(places, read_ranges(self._local, local), strict=True):
            if isinstance(content, StorageError):
                downloads.forget(ranges[index].path, is_wrong=True)  # somebody cut it
            else:
                results[index] = content
        return results

    def _keep(self, wanted: ByteRange, content: bytes) -> None:
        """After a read: put a whole file into the cache, or download the rest of one that will be read more."""
        state, path, stat = self._state, wanted.path, self._stat_of(wanted)
        if stat is None:
            return
        state.num_read[path] = state.num_read.get(path, 0) + len(content)
        is_much = state.num_read[path] >= _MUCH * stat.num_bytes
        if not (self._whole or (is_much and state.total() <= self._settings.cache_bytes)):
            return
        if len(content) == stat.num_bytes:
            state.downloads.keep(path, stat, content)
        elif state.downloads.num_downloads.get(path, 0) < _MAX_DOWNLOADS:
            self.prefetch([path])


class _State:
    """What belongs to one process.

    Attributes:
        stats: of files that were asked about.
        num_read: bytes of each file that were read from its URL.
        downloads: the files that are in the cache or on their way.
    """

    def __init__(self, downloads: Downloads) -> None:
        self.process = os.getpid()
        self.stats: dict[str, FileStat] = {}
        self.num_read: dict[str, int] = {}
        self.downloads = downloads
        self._total = (0, 0)

    def total(self) -> int:
        """Bytes of all files that were asked about."""
        if self._total[0] != len(self.stats):
            self._total = (len(self.stats), sum(stat.num_bytes for stat in list(self.stats.values())))
        return self._total[1]
