"""The images in and below a folder, what was skipped on the way, and whether a later scan would find the same."""

import hashlib
import os
import time
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Protocol

from kd_pipeline._core.suggestions import first_few
from kd_pipeline._core.text import printable
from kd_pipeline.data.sources.files.file_systems import keep_folder_times
from kd_pipeline.errors import DataError

__all__ = ["EXTENSIONS", "Entry", "FoundImages", "Identity", "Scan", "is_folder", "is_skipped", "stamp_of"]

EXTENSIONS = (".bmp", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
"""Extensions of the formats that DALI decodes, in any case."""

_SYSTEM_FOLDERS = frozenset(
    ["__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found", "system volume information"]
)
"""Folders that operating systems and other programs make."""
_NUM_EXAMPLES = 3
"""Skipped paths that a warning shows for each reason."""
_MAX_REPEATS = 1000
"""Folders that links may lead to again. Twenty folders, each with two links to the next, have a million paths."""
_MIN_AGE_NS = 60 * 10**9
"""How long a folder must be unchanged before a scan. A change right after another one may have the same time, and the
clock of a file server may be behind ours."""
_CHUNK, _NUM_THREADS = 256, 16
"""Folders that a thread asks the file system about in a row, and how many threads do, as each may wait for a server."""
Identity = tuple[int, int] | str
"""Of a folder: its device and inode number, the same through every link; behind URLs its path."""
FoundImages = list[tuple[str, bytes]]
"""Absolute paths of folders, sorted, and the names of the images in each, sorted and with NUL between them."""


class Entry(Protocol):
    """What a scan asks about a file or folder; each question may raise OSError."""

    @property
    def name(self) -> str:
        """Without its folder."""

    @property
    def path(self) -> str:
        """Its folder and name."""

    def is_dir(self) -> bool:
        """Whether it is a folder, or a link to one."""

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a regular file."""

    def is_symlink(self) -> bool:
        """Whether it is a link."""


class Scan:
    """Finds images below `top`, counts what it skips, and notes what its result depends on.

    Images are files whose names end, in any case, in one of `endings`.

    The result is that of another scan for as long as each folder is the same one and has the same times: any entry that
    comes, goes or is renamed changes them. This does not hold if there are links to files, whose targets may become
    folders, if a folder was changed just before, and on file systems that do not keep these times.
    """

    def __init__(self, top: str, endings: tuple[str, ...] = EXTENSIONS) -> None:
        self._top, self._endings = top, endings
        self._counts: Counter[str] = Counter()
        self._examples: defaultdict[str, list[str]] = defaultdict(list)
        self._started_ns = time.time_ns()
        self._newest_ns = 0
        self._has_links = False
        self._devices: dict[int, str] = {}
        """A folder on each."""
        self.folders: list[str] = []
        """All that were listed."""
        self._stamps: list[bytes] = []

    @property
    def stamp(self) -> str:
        """`stamp_of` all folders, as they were before they were listed."""
        return _digest(self._stamps)

    def lasts(self) -> bool:
        """Whether the result is right as long as `stamp_of` all folders does not change."""
        is_old = self._newest_ns < self._started_ns - _MIN_AGE_NS
        return is_old and not self._has_links and all(map(keep_folder_times, self._devices.values()))

    def entries(self, folder: str) -> Iterator[Entry]:
        """The entries of a folder.

        Raises:
            DataError: it cannot be listed.
        """
        try:
            with os.scandir(folder) as entries:
                yield from entries
        except OSError as exc:
            raise _unlistable(folder, exc) from exc

    def enter(self, folder: str) -> Identity:
        """Note a folder that will be listed.

        Raises:
            DataError: it cannot be accessed.
        """
        try:
            status = os.stat(folder)
        except OSError as exc:
            raise _unlistable(folder, exc) from exc
        self.folders.append(folder)
        self._stamps.append(_stamp(status))
        self._newest_ns = max(self._newest_ns, status.st_mtime_ns, status.st_ctime_ns)
        self._devices.setdefault(status.st_dev, folder)
        return status.st_dev, status.st_ino

    def skip(self, entry: Entry, reason: str) -> None:
        """Count an entry that is neither a folder nor an image by its name."""
        self._has_links |= entry.is_symlink()
        self._add(reason, entry.path)

    def skip_name(self, entry: Entry) -> bool:
        """Count an entry that is skipped by its name, whatever it is; False for others."""
        if entry.name.startswith("."):
            self._add("hidden", entry.path)
        elif _is_system_folder(entry.name):
            self._add("made by the system", entry.path)
        else:
            return False
        return True

    def count(self, reason: str) -> int:
        """How many entries were skipped for `reason`."""
        return self._counts[reason]

    def images(self, folders: Sequence[str], parents: frozenset[Identity] = frozenset()) -> Iterator[FoundImages]:
        """The images in and below each of `folders`.

        Args:
            folders: absolute paths.
            parents: folders above these, to which a link must not lead back.

        Raises:
            DataError: a folder cannot be listed, or links multiply them.
        """
        for folder in folders:
            yield self._images(folder, parents)

    def warnings(self) -> list[str]:
        """One sentence, or none."""
        return [f"{self._top}: skipped {self._parts()}"] if self._counts else []

    def __str__(self) -> str:
        """The end of an error message; empty if nothing was skipped."""
        return printable(f"; skipped {self._parts()}") if self._counts else ""

    def _add(self, reason: str, path: str) -> None:
        self._counts[reason] += 1
        examples = self._examples[reason]
        if len(examples) < _NUM_EXAMPLES or path < examples[-1]:  # the same, in whichever order they come
            insort(examples, path)
            del examples[_NUM_EXAMPLES:]

    def _parts(self) -> str:
        shown = {
            reason: first_few([os.path.relpath(path, self._top) for path in examples], self._counts[reason])
            for reason, examples in self._examples.items()
        }
        return ", ".join(f"{count} {reason} ({shown[reason]})" for reason, count in sorted(self._counts.items()))

    def _images(self, top: str, parents: frozenset[Identity]) -> FoundImages:
        """Folders are sorted by their whole path and files within each, as in torchvision."""
        found: FoundImages = []
        stack = [(top, parents)]
        seen: set[Identity] = set()
        num_repeats = 0
        while stack:
            folder, parents = stack.pop()
            inode = self.enter(folder)
            num_repeats += inode in seen
            seen.add(inode)
            if num_repeats > _MAX_REPEATS:
                raise DataError(
                    f"{top}: links lead to the same folders in more than {_MAX_REPEATS} ways, such as "
                    f"{printable(folder)}; remove the links, or list the files and take kind: file_list"
                )
            if inode in parents:
                self._add("links back to a parent folder", folder)
                continue
            files, below = self._list(folder)
            stack += [(path, parents | {inode}) for path in below]
            if files:
                found.append((folder, os.fsencode("\0".join(sorted(files)))))
        return sorted(found)

    def _list(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of the images in a folder, and paths of the folders in it."""
        files, below = [], []
        for entry in self.entries(folder):
            name = entry.name
            if name.lower().endswith(self._endings) and not name.startswith(".") and _is_file(entry):
                files.append(name)  # nearly all, and none needs a call of the system
            elif self.skip_name(entry):
                pass
            elif is_folder(entry):
                below.append(entry.path)
            elif not name.lower().endswith(self._endings):
                self.skip(entry, "without an extension that is read")
            elif not os.path.isfile(entry.path) and os.path.exists(entry.path):  # a broken link is an unreadable image
                self.skip(entry, "that are not regular files")
            else:
                self._has_links = True
                files.append(name)
        return files, below


def stamp_of(folders: Sequence[str]) -> str | None:
    """A digest of what identifies folders and of when they were changed; None if one is not there."""
    chunks = [folders[start : start + _CHUNK] for start in range(0, len(folders), _CHUNK)]
    try:
        if len(chunks) == 1:
            return _digest(_stamps(chunks[0]))
        with ThreadPoolExecutor(_NUM_THREADS, "kd_pipeline-stat") as threads:
            return _digest(list(chain.from_iterable(threads.map(_stamps, chunks))))
    except (OSError, ValueError):
        return None


def is_folder(entry: Entry) -> bool:
    """Whether it is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_skipped(name: str) -> bool:
    """Whether an entry is skipped by its name."""
    return name.startswith(".") or _is_system_folder(name)


def _is_file(entry: Entry) -> bool:
    try:
        return entry.is_file(follow_symlinks=False)
    except OSError:
        return False


def _is_system_folder(name: str) -> bool:
    return name.lower() in _SYSTEM_FOLDERS


def _unlistable(folder: str, exc: OSError) -> DataError:
    reason = f"cannot be listed ({exc.strerror}); check the path and its permissions"
    return DataError(f"{printable(folder)}: {reason}")


def _stamps(folders: Sequence[str]) -> list[bytes]:
    return [_stamp(os.stat(folder)) for folder in folders]


def _stamp(status: os.stat_result) -> bytes:
    # The time of the last change of the inode too, as the other one can be set.
    return b"%d %d %d %d" % (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def _digest(stamps: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\n".join(stamps)).hexdigest()
