"""A folder per class, in torchvision's order."""

import os
from collections.abc import Iterator

import numpy as np

from kd_pipeline._core.suggestions import some, suggest
from kd_pipeline.data.sources.labels import Classes, class_names, odd_names
from kd_pipeline.data.sources.paths import FileSource, Paths
from kd_pipeline.errors import DataError

__all__ = ["EXTENSIONS", "ImageFolder"]

EXTENSIONS = (".bmp", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
"""What DALI decodes; upper and lower case are the same."""

_Identity = tuple[int, int]
"""Device and inode of a folder, the same by whatever link it was reached."""


class ImageFolder(FileSource):
    """One folder per class below `root`, in torchvision's order: classes and files sorted as plain text.

    Folders inside a class belong to it, and links are followed, except back to a folder above. Left out and
    reported are names that start with a dot, files outside the class folders, and extensions not in `EXTENSIONS`.

    Args:
        root: the folder.
        classes: names in label order, or a JSON file that lists them; sorted folder names where None. A name without
            a folder is reported, a folder without a name is an error.
        labeled: False takes every image below `root`, without labels.

    Raises:
        DataError: no such folder, no images, an empty class, or a class folder that `classes` does not name.
    """

    def __init__(self, root: str | os.PathLike[str], *, classes: Classes | None = None, labeled: bool = True) -> None:
        top = os.path.abspath(os.path.expanduser(root))
        names = None if classes is None else class_names(classes)
        paths, skipped = Paths(top), _Skipped(top)
        if not labeled:
            if not paths.extend(_images_below(top, skipped)):
                raise DataError(f"{top}: no images at or below this folder{skipped.sentence('; ')}")
            super().__init__(paths, None, names, skipped.reports())
            return

        folders = _class_folders(top, skipped)
        if names is not None and (strangers := sorted(set(folders) - set(names))):
            raise DataError(
                f"{top}: folder(s) that are not among the {len(names)} classes: {some(strangers)}; rename or remove "
                f"them, or add them to `classes`{suggest(strangers[0], names)}"
            )
        above = frozenset({_identity(top)})
        counts = [paths.extend(_images_below(os.path.join(top, folder), skipped, above)) for folder in folders]
        if empty := [folder for folder, count in zip(folders, counts, strict=True) if not count]:
            raise DataError(
                f"{top}: empty class folder(s): {some(empty)}; add images or remove the folder{skipped.sentence('; ')}"
            )
        reports = skipped.reports()
        if names is None:
            names = tuple(folders)
            reports += odd_names(names)
        elif absent := sorted(set(names) - set(folders)):
            reports.append(f"{top}: no folder for {len(absent)} of the {len(names)} classes: {some(absent)}")
        position = {name: label for label, name in enumerate(names)}
        labels = np.repeat(np.array([position[folder] for folder in folders], dtype=np.int64), counts)
        super().__init__(paths, labels, names, reports)


class _Skipped:
    """Counts what a scan leaves out, with the first few examples of each kind."""

    def __init__(self, top: str) -> None:
        self._top = top
        self._kinds: dict[str, tuple[int, list[str]]] = {}

    def add(self, kind: str, path: str) -> None:
        """Count `path`, which is left out for being `kind`."""
        count, examples = self._kinds.get(kind, (0, []))
        self._kinds[kind] = count + 1, examples if count >= 3 else [*examples, os.path.relpath(path, self._top)]

    def sentence(self, start: str = "") -> str:
        """What was left out, after `start`; nothing at all where nothing was."""
        parts = (f"{count} {kind} ({some(found, count)})" for kind, (count, found) in self._kinds.items())
        return f"{start}skipped " + ", ".join(parts) if self._kinds else ""

    def reports(self) -> list[str]:
        """The sentence as the list that `Source.reports` starts with."""
        return [self.sentence(f"{self._top}: ")] if self._kinds else []


def _class_folders(top: str, skipped: _Skipped) -> list[str]:
    folders, loose = [], 0
    for entry in _entries(top):
        if entry.name.startswith("."):
            skipped.add("hidden", entry.path)
        elif _is_folder(entry):
            folders.append(entry.name)
        else:
            skipped.add("outside the class folders", entry.path)
            loose += 1
    if not folders:
        raise DataError(
            f"{top}: no class folders, {loose} files; put the images of each class into a folder with its name, "
            "or set labeled: false to use them without labels"
        )
    return sorted(folders)


def _images_below(top: str, skipped: _Skipped, above: frozenset[_Identity] = frozenset()) -> Iterator[str]:
    """Absolute paths; folders sorted by their whole path and files within each, as torchvision does."""
    found: list[tuple[str, list[str]]] = []
    stack = [(top, above)]
    while stack:
        folder, above = stack.pop()
        identity = _identity(folder)
        if identity in above:
            skipped.add("links back to a folder above", folder)
            continue
        files = []
        for entry in _entries(folder):
            if entry.name.startswith("."):
                skipped.add("hidden", entry.path)
            elif _is_folder(entry):
                stack.append((entry.path, above | {identity}))
            elif not entry.name.lower().endswith(EXTENSIONS):
                skipped.add("without a known extension", entry.path)
            elif not entry.is_file() and os.path.exists(entry.path):  # a link to nothing counts as unreadable
                skipped.add("that are not regular files", entry.path)
            else:
                files.append(entry.name)
        found.append((folder, sorted(files)))
    return (os.path.join(folder, name) for folder, files in sorted(found) for name in files)


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as exc:
        raise DataError(f"{folder}: cannot be listed ({exc.strerror}); check the path and its permissions") from exc


def _identity(folder: str) -> _Identity:
    try:
        status = os.stat(folder)
    except OSError as exc:
        raise DataError(f"{folder}: cannot be listed ({exc.strerror}); check the path and its permissions") from exc
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
