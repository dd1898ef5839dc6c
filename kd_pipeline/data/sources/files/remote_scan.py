"""The scan of an image folder in a store, all of whose folders are listed first."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from kd_pipeline.data.sources.files.folder_scan import EXTENSIONS, Entry, Identity, Scan, is_skipped
from kd_pipeline.errors import NoSuchFileError, shown
from kd_pipeline.storage import Store
from kd_pipeline.storage.location import join

__all__ = ["RemoteScan"]


class _RemoteEntry(NamedTuple):
    name: str
    path: str
    num_bytes: int | None
    """None for a folder."""

    def is_dir(self) -> bool:
        return self.num_bytes is None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return self.num_bytes is not None

    def is_symlink(self) -> bool:
        return False


class RemoteScan(Scan):
    """Finds images below a URL. Its paths have no credentials, as they are for messages too.

    Folders are listed many at once, and a store takes a request for each thousand files. Nothing cheaper tells whether
    they have changed.

    Args:
        root: the URL.
        store: lists the folders.
        endings: of the files that are found.

    Raises:
        StorageError: the store does not list its files.
    """

    def __init__(self, root: str, store: Store, endings: tuple[str, ...] = EXTENSIONS) -> None:
        self.top = shown(root).rstrip("/")
        super().__init__(self.top, endings)
        self._root, self._store = root, store
        self._listed: dict[str, list[_RemoteEntry]] = {}
        level = [self.top]
        with ThreadPoolExecutor(store.num_threads, "kd_pipeline-list") as threads:
            while level:
                found = dict(zip(level, threads.map(self._list_folder, level), strict=True))
                self._listed |= found
                entries = (entry for listed in found.values() for entry in listed)
                level = [entry.path for entry in entries if entry.is_dir() and not is_skipped(entry.name)]

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path below the root."""
        start = len(self.top) + 1
        entries = (entry for listed in self._listed.values() for entry in listed)
        return {entry.path[start:]: entry.num_bytes for entry in entries if entry.num_bytes is not None}

    def lasts(self) -> bool:
        """Never."""
        return False

    def entries(self, folder: str) -> Iterator[Entry]:
        """Those that were listed; none if there is no such folder."""
        return iter(self._listed[folder])

    def enter(self, folder: str) -> Identity:
        """A folder is what its path says."""
        return folder

    def _list_folder(self, folder: str) -> list[_RemoteEntry]:
        name = folder[len(self.top) + 1 :]
        try:
            listed = self._store.list_folder(join(self._root, name) if name else self._root)
        except NoSuchFileError:
            return []
        return [_RemoteEntry(each.name, f"{folder}/{each.name}", each.num_bytes) for each in listed]
