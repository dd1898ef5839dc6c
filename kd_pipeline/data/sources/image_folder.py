"""One folder per class, in torchvision's order."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from kd_pipeline._core.suggestions import first_few, suggest
from kd_pipeline._core.text import printable
from kd_pipeline.data.sources.containers import find_container, how_to_convert, user_path
from kd_pipeline.data.sources.labels import Classes, class_names, name_warnings
from kd_pipeline.data.sources.paths import FileSource, PathTable
from kd_pipeline.errors import DataError

__all__ = ["EXTENSIONS", "ImageFolder"]

EXTENSIONS = (".bmp", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
"""Extensions of the formats that DALI decodes, in any case."""

_SYSTEM_FOLDERS = frozenset(
    ["__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found", "system volume information"]
)
"""Folders that operating systems and other programs make."""
_SPLITS = frozenset(["train", "training", "val", "valid", "validation", "test", "testing", "dev"])
_LISTS = (".csv", ".tsv", ".txt", ".jsonl")
_NUM_EXAMPLES = 3
"""Skipped paths that a warning shows for each reason."""
_MAX_REPEATS = 1000
"""Folders that links may lead to again. Twenty folders, each with two links to the next, have a million paths."""
_Inode = tuple[int, int]
"""Device and inode number of a folder, the same through every link."""


class ImageFolder(FileSource):
    """One folder per class below `root`, in torchvision's order: classes and files sorted as plain text.

    A class includes its subfolders, and links are followed unless they lead back to a parent folder. Skipped with a
    warning are hidden files and folders, folders that an operating system makes, files outside the class folders, and
    extensions not in `EXTENSIONS`.

    Args:
        root: the folder that contains the class folders.
        classes: names in label order, or a file with them; defaults to the sorted folder names. A name without a
            folder is a warning, a folder without a name is an error.
        labeled: False takes every image below `root`, without labels.

    Raises:
        DataError: no such folder, no images, an empty class, a class folder that is not in `classes`, or folders of
            splits in place of classes.
    """

    def __init__(self, root: str | os.PathLike[str], *, classes: Classes | None = None, labeled: bool = True) -> None:
        top = os.path.abspath(user_path(root))
        _check_is_folder(top)
        names = None if classes is None else class_names(classes)
        paths, skipped = PathTable(top), _Skipped(top)
        if not labeled:
            if not paths.extend(_find_images(top, skipped)):
                raise DataError(f"{top}: no images in or below this folder{_with_containers(top, skipped)}")
            super().__init__(paths, None, names, skipped.warnings())
            return

        folders = _class_folders(top, skipped)
        if names is None or not set(folders) & set(names):
            _refuse_splits(top, folders)
        if names is not None and (unknown := sorted(set(folders) - set(names))):
            raise DataError(
                f"{top}: folder(s) that are not among the {len(names)} classes: {first_few(unknown)}; rename or remove "
                f"them, or add them to `classes`{suggest(unknown[0], names)}"
            )
        parents = frozenset({_inode(top)})
        counts = [paths.extend(_find_images(os.path.join(top, folder), skipped, parents)) for folder in folders]
        if empty := [folder for folder, count in zip(folders, counts, strict=True) if not count]:
            advice = f"add images or remove the folder{_with_containers(os.path.join(top, empty[0]), skipped)}"
            raise DataError(f"{top}: empty class folder(s): {first_few(empty)}; {advice}")
        warnings = skipped.warnings()
        if names is None:
            warnings += _level_warnings(top, folders)
            names = tuple(folders)
            warnings += name_warnings(names)
        elif missing := sorted(set(names) - set(folders)):
            warnings.append(f"{top}: no folder for {len(missing)} of the {len(names)} classes: {first_few(missing)}")
        label_of = {name: label for label, name in enumerate(names)}
        labels = np.repeat(np.array([label_of[folder] for folder in folders], dtype=np.int64), counts)
        super().__init__(paths, labels, names, warnings)


class _Skipped:
    """Counts what a scan skips, with the first paths for each reason; a folder may hold millions of them."""

    def __init__(self, top: str) -> None:
        self._top = top
        self._counts: Counter[str] = Counter()
        self._examples: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, path: str) -> None:
        self._counts[reason] += 1
        if len(self._examples[reason]) < _NUM_EXAMPLES:
            self._examples[reason].append(os.path.relpath(path, self._top))

    def count(self, reason: str) -> int:
        return self._counts[reason]

    def warnings(self) -> list[str]:
        """One sentence, or none."""
        return [f"{self._top}: skipped {self._parts()}"] if self._counts else []

    def __str__(self) -> str:
        """The end of an error message; empty if nothing was skipped."""
        return printable(f"; skipped {self._parts()}") if self._counts else ""

    def _parts(self) -> str:
        return ", ".join(
            f"{count} {reason} ({first_few(self._examples[reason], count)})" for reason, count in self._counts.items()
        )


def _class_folders(top: str, skipped: _Skipped) -> list[str]:
    folders = []
    for entry in _entries(top):
        if entry.name.startswith("."):
            skipped.add("hidden", entry.path)
        elif _is_system_folder(entry.name):
            skipped.add("made by the system", entry.path)
        elif _is_folder(entry):
            folders.append(entry.name)
        else:
            skipped.add("outside the class folders", entry.path)
    if not folders:
        num_files = skipped.count("outside the class folders")
        advice = _with_containers(top) or (
            "; put the images of each class into a folder with its name, or set labeled: false to use them without "
            "labels"
        )
        raise DataError(f"{top}: no class folders, {num_files} files{advice}")
    return sorted(folders)


def _check_is_folder(top: str) -> None:
    if not os.path.isfile(top):
        return
    advice = "set root to the folder that contains the images"
    if (container := find_container(top)) is not None:
        advice = f"it is {container.kind}: {container.advice}"
    elif top.lower().endswith(EXTENSIONS):
        advice = f"set root: {os.path.dirname(top)}"
    elif top.lower().endswith(_LISTS):
        advice = f"for a list of files take kind: file_list with path: {top}"
    raise DataError(f"{top}: cannot be listed (Not a directory); {advice}")


def _with_containers(folder: str, skipped: "_Skipped | str" = "") -> str:
    """The end of an error message about a folder without images: an archive in it, or else what was skipped."""
    for entry in _entries(folder):
        if (container := find_container(entry.name)) is not None:
            advice = how_to_convert(container.kind, entry.path)
            return printable(f"; {entry.name} is {container.kind}, which is not read: {advice}")
    return str(skipped)


def _refuse_splits(top: str, folders: list[str]) -> None:
    """Raise an error about a folder of splits, whose own folders are the classes."""
    if not {folder.lower() for folder in folders} <= _SPLITS:
        return
    deeper = [folder for folder in folders if any(_is_folder(entry) for entry in _entries(os.path.join(top, folder)))]
    if deeper:
        raise DataError(
            f"{top}: the folders {first_few(folders)} are splits of a dataset, not classes; set root: "
            f"{os.path.join(top, deeper[0])} for one split, or list the folders in `classes` if they are classes"
        )


def _level_warnings(top: str, folders: list[str]) -> list[str]:
    """A warning about a root that is one folder too high."""
    if len(folders) > 1 and {folder.lower() for folder in folders} <= _SPLITS:
        return [f"{top}: the classes {first_few(folders)} are called like splits of a dataset; is root right?"]
    if len(folders) == 1:
        entries = list(_entries(os.path.join(top, folders[0])))
        inner = sorted(entry.name for entry in entries if _is_folder(entry) and not _is_skipped(entry.name))
        if len(inner) > 1 and not any(entry.name.lower().endswith(EXTENSIONS) for entry in entries):
            advice = f"set root: {os.path.join(top, folders[0])} if these are the classes"
            return [f"{top}: one class, {folders[0]!r}, of {len(inner)} folders: {first_few(inner)}; {advice}"]
    return []


def _find_images(top: str, skipped: _Skipped, parents: frozenset[_Inode] = frozenset()) -> Iterator[str]:
    """Absolute paths; folders sorted by their whole path and files within each, as in torchvision."""
    found: list[tuple[str, list[str]]] = []
    stack = [(top, parents)]
    seen: set[_Inode] = set()
    num_repeats = 0
    while stack:
        folder, parents = stack.pop()
        inode = _inode(folder)
        num_repeats += inode in seen
        seen.add(inode)
        if num_repeats > _MAX_REPEATS:
            raise DataError(
                f"{top}: links lead to the same folders in more than {_MAX_REPEATS} ways, such as {printable(folder)}; "
                "remove the links, or list the files and take kind: file_list"
            )
        if inode in parents:
            skipped.add("links back to a parent folder", folder)
            continue
        files = []
        for entry in _entries(folder):
            if entry.name.startswith("."):
                skipped.add("hidden", entry.path)
            elif _is_system_folder(entry.name):
                skipped.add("made by the system", entry.path)
            elif _is_folder(entry):
                stack.append((entry.path, parents | {inode}))
            elif not entry.name.lower().endswith(EXTENSIONS):
                skipped.add("without a known extension", entry.path)
            elif not os.path.isfile(entry.path) and os.path.exists(entry.path):  # a broken link is an unreadable image
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
        reason = f"cannot be listed ({exc.strerror}); check the path and its permissions"
        raise DataError(f"{printable(folder)}: {reason}") from exc


def _inode(folder: str) -> _Inode:
    try:
        status = os.stat(folder)
    except OSError as exc:
        reason = f"cannot be listed ({exc.strerror}); check the path and its permissions"
        raise DataError(f"{printable(folder)}: {reason}") from exc
    return status.st_dev, status.st_ino


def _is_system_folder(name: str) -> bool:
    return name.lower() in _SYSTEM_FOLDERS


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or _is_system_folder(name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
