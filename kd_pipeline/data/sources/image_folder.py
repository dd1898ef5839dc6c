"""One folder per class, in torchvision's order."""

import os

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.suggestions import first_few, suggest
from kd_pipeline._core.text import printable
from kd_pipeline.data.sources.containers import find_container, how_to_convert, user_path
from kd_pipeline.data.sources.folder_scan import EXTENSIONS, Scan, entries_of, is_folder, is_skipped, stamp_of
from kd_pipeline.data.sources.index_cache import ListIndex, folder_key, has_index, load_index, save_index
from kd_pipeline.data.sources.labels import Classes, class_names, name_warnings
from kd_pipeline.data.sources.paths import FileSource, PathTable
from kd_pipeline.errors import DataError

__all__ = ["EXTENSIONS", "ImageFolder"]

_SPLITS = frozenset(["train", "training", "val", "valid", "validation", "test", "testing", "dev"])
_LISTS = (".csv", ".tsv", ".txt", ".jsonl")
_MIN_KEPT = 2**14
"""Fewer images are not kept, because finding them takes no noticeable time."""


class ImageFolder(FileSource):
    """One folder per class below `root`, in torchvision's order: classes and files sorted as plain text.

    A class includes its subfolders, and links are followed unless they lead back to a parent folder. Skipped with a
    warning are hidden files and folders, folders that an operating system makes, files outside the class folders, and
    extensions not in `EXTENSIONS`.

    What a folder of some ten thousand images or more holds is cached in `~/.cache/kd_pipeline/index`, and used for as
    long as no folder in it has changed. It is not cached with links to files in it, within a minute after a change, or
    on a file system that may not show changes in the times of folders, such as FUSE.

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
        _checkis_folder(top)
        names = None if classes is None else class_names(classes)
        key = folder_key(top, names, labeled)
        index = load_index(key, top) if has_index(key) else None
        if index is None or stamp_of(index.folders) != index.stamp:
            index = _index(top, names, labeled)
            if index.folders and len(index.paths) >= _MIN_KEPT:
                index = save_index(key, index, top)
        super().__init__(index.paths, index.labels, index.classes, index.remarks)


def _index(top: str, names: tuple[str, ...] | None, labeled: bool) -> ListIndex:
    """What a folder holds now; without `folders` if that may change unnoticed."""
    paths, scan = PathTable(top), Scan(top)
    if labeled:
        labels, names, warnings = _labeled(top, names, paths, scan)
    else:
        labels, warnings = None, []
        if not sum(paths.extend_folder(*found) for images in scan.images([top]) for found in images):
            raise DataError(f"{top}: no images in or below this folder{_with_containers(top, scan)}")
    folders = tuple(scan.folders) if scan.lasts() else ()
    return ListIndex(paths, labels, names, (*scan.warnings(), *warnings), folders, scan.stamp)


def _labeled(
    top: str, names: tuple[str, ...] | None, paths: PathTable, scan: Scan
) -> tuple[NDArray[np.int64], tuple[str, ...], list[str]]:
    """Add the images of each class to `paths`; return labels `[N]`, class names and warnings."""
    parents = frozenset({scan.enter(top)})
    folders = _class_folders(top, scan)
    if names is None or not set(folders) & set(names):
        _refuse_splits(top, folders)
    if names is not None and (unknown := sorted(set(folders) - set(names))):
        raise DataError(
            f"{top}: folder(s) that are not among the {len(names)} classes: {first_few(unknown)}; rename or remove "
            f"them, or add them to `classes`{suggest(unknown[0], names)}"
        )
    images = scan.images([os.path.join(top, folder) for folder in folders], parents)
    counts = [sum(paths.extend_folder(*found) for found in of_class) for of_class in images]
    if empty := [folder for folder, count in zip(folders, counts, strict=True) if not count]:
        advice = f"add images or remove the folder{_with_containers(os.path.join(top, empty[0]), scan)}"
        raise DataError(f"{top}: empty class folder(s): {first_few(empty)}; {advice}")
    warnings = []
    if names is None:
        names = tuple(folders)
        warnings = [*_level_warnings(top, folders), *name_warnings(names)]
    elif missing := sorted(set(names) - set(folders)):
        warnings = [f"{top}: no folder for {len(missing)} of the {len(names)} classes: {first_few(missing)}"]
    label_of = {name: label for label, name in enumerate(names)}
    return np.repeat(np.array([label_of[folder] for folder in folders], dtype=np.int64), counts), names, warnings


def _class_folders(top: str, scan: Scan) -> list[str]:
    folders = []
    for entry in entries_of(top):
        if scan.skip_name(entry):
            continue
        if is_folder(entry):
            folders.append(entry.name)
        else:
            scan.skip(entry, "outside the class folders")
    if not folders:
        num_files = scan.count("outside the class folders")
        advice = _with_containers(top) or (
            "; put the images of each class into a folder with its name, or set labeled: false to use them without "
            "labels"
        )
        raise DataError(f"{top}: no class folders, {num_files} files{advice}")
    return sorted(folders)


def _checkis_folder(top: str) -> None:
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


def _with_containers(folder: str, skipped: Scan | str = "") -> str:
    """The end of an error message about a folder without images: an archive in it, or else what was skipped."""
    for entry in entries_of(folder):
        if (container := find_container(entry.name)) is not None:
            path = os.path.join(folder, "*.tar") if entry.name.lower().endswith(".tar") else entry.path
            advice = how_to_convert(container.kind, path)
            return printable(f"; {entry.name} is {container.kind} and no folder of images: {advice}")
    return str(skipped)


def _refuse_splits(top: str, folders: list[str]) -> None:
    """Raise an error about a folder of splits, whose own folders are the classes."""
    if not {folder.lower() for folder in folders} <= _SPLITS:
        return
    deeper = [folder for folder in folders if any(is_folder(entry) for entry in entries_of(os.path.join(top, folder)))]
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
        entries = list(entries_of(os.path.join(top, folders[0])))
        inner = sorted(entry.name for entry in entries if is_folder(entry) and not is_skipped(entry.name))
        if len(inner) > 1 and not any(entry.name.lower().endswith(EXTENSIONS) for entry in entries):
            advice = f"set root: {os.path.join(top, folders[0])} if these are the classes"
            return [f"{top}: one class, {folders[0]!r}, of {len(inner)} folders: {first_few(inner)}; {advice}"]
    return []
