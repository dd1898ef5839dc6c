"""One folder per class, in torchvision's order."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.suggestions import first_few, suggest
from kd_pipeline._core.text import printable
from kd_pipeline.data.sources.containers import find_container, how_to_convert, user_location
from kd_pipeline.data.sources.files.folder_scan import EXTENSIONS, Scan, is_folder, is_skipped, stamp_of
from kd_pipeline.data.sources.files.index_cache import ListIndex, folder_key, has_index, load_index, save_index
from kd_pipeline.data.sources.files.mask_folder import masks_in_folder
from kd_pipeline.data.sources.files.paths import FileSource, PathTable
from kd_pipeline.data.sources.files.remote_files import RemoteFiles, Stores
from kd_pipeline.data.sources.files.remote_scan import RemoteScan
from kd_pipeline.data.sources.labels import Classes, class_names, name_warnings
from kd_pipeline.data.sources.masks.settings import FolderMasks
from kd_pipeline.errors import DataError
from kd_pipeline.storage import StoreSettings

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
    on a file system that may not show changes in the times of folders, such as FUSE, nor if it is behind a URL: a store
    lists all of it each time.

    Args:
        root: the folder that contains the class folders, or its URL.
        classes: names in label order, or a file with them; defaults to the sorted folder names. A name without a
            folder is a warning, a folder without a name is an error.
        labeled: False takes every image below `root`, without labels.
        masks: where the masks of the images are: every image below `root` is taken, and `classes` are those of their
            pixels.
        storage: how a folder behind a URL is read.

    Raises:
        DataError: no such folder, no images, an empty class, a class folder that is not in `classes`, folders of splits
            in place of classes, or an image without its mask.
        StorageError: a store does not list its files.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        classes: Classes | None = None,
        labeled: bool = True,
        masks: FolderMasks | None = None,
        storage: StoreSettings | None = None,
    ) -> None:
        labeled = labeled and masks is None
        location = user_location(root)
        names = None if classes is None else class_names(classes)
        remote = None
        if isinstance(location, Path):
            index = _local_index(os.path.abspath(location), names, labeled)
        else:
            stores = Stores(storage)
            scan = RemoteScan(location, stores.of(location))
            index = _index(scan.top, PathTable(location), scan, names, labeled)
            sizes = scan.sizes()
            found = (sizes[index.paths.entry(sample)] for sample in range(len(index.paths)))
            remote = RemoteFiles(index.paths, stores, np.fromiter(found, np.int64, len(index.paths)))
        found_masks = None if masks is None else masks_in_folder(masks, index.paths, names, storage)
        super().__init__(index.paths, index.labels, index.classes, index.remarks, remote, found_masks)


def _local_index(top: str, names: tuple[str, ...] | None, labeled: bool) -> ListIndex:
    """What a folder on a disk holds, from the cache if it has not changed."""
    key = folder_key(top, names, labeled)
    index = load_index(key, top) if has_index(key) else None
    if index is None or stamp_of(index.folders) != index.stamp:
        index = _index(top, PathTable(top), Scan(top), names, labeled)
        if index.folders and len(index.paths) >= _MIN_KEPT:
            index = save_index(key, index, top)
    return index


def _index(top: str, paths: PathTable, scan: Scan, names: tuple[str, ...] | None, labeled: bool) -> ListIndex:
    """What a folder holds now; without `folders` if that may change unnoticed."""
    _check_is_folder(top, scan)
    if labeled:
        labels, names, warnings = _labeled(top, names, paths, scan)
    else:
        labels, warnings = None, []
        if not sum(paths.extend_folder(*found) for images in scan.images([top]) for found in images):
            raise DataError(f"{top}: no images in or below this folder{_with_containers(top, scan, scan)}")
    folders = tuple(scan.folders) if scan.lasts() else ()
    return ListIndex(paths, labels, names, (*scan.warnings(), *warnings), folders, scan.stamp)


def _labeled(
    top: str, names: tuple[str, ...] | None, paths: PathTable, scan: Scan
) -> tuple[NDArray[np.int64], tuple[str, ...], list[str]]:
    """Add the images of each class to `paths`; return labels `[N]`, class names and warnings."""
    parents = frozenset({scan.enter(top)})
    folders = _class_folders(top, scan)
    if names is None or not set(folders) & set(names):
        _refuse_splits(top, scan, folders)
    if names is not None and (unknown := sorted(set(folders) - set(names))):
        raise DataError(
            f"{top}: folder(s) that are not among the {len(names)} classes: {first_few(unknown)}; rename or remove "
            f"them, or add them to `classes`{suggest(unknown[0], names)}"
        )
    images = scan.images([os.path.join(top, folder) for folder in folders], parents)
    counts = [sum(paths.extend_folder(*found) for found in of_class) for of_class in images]
    if empty := [folder for folder, count in zip(folders, counts, strict=True) if not count]:
        advice = f"add images or remove the folder{_with_containers(os.path.join(top, empty[0]), scan, scan)}"
        raise DataError(f"{top}: empty class folder(s): {first_few(empty)}; {advice}")
    warnings = []
    if names is None:
        names = tuple(folders)
        warnings = [*_level_warnings(top, scan, folders), *name_warnings(names)]
    elif missing := sorted(set(names) - set(folders)):
        warnings = [f"{top}: no folder for {len(missing)} of the {len(names)} classes: {first_few(missing)}"]
    label_of = {name: label for label, name in enumerate(names)}
    return np.repeat(np.array([label_of[folder] for folder in folders], dtype=np.int64), counts), names, warnings


def _class_folders(top: str, scan: Scan) -> list[str]:
    folders = []
    for entry in scan.entries(top):
        if scan.skip_name(entry):
            continue
        if is_folder(entry):
            folders.append(entry.name)
        else:
            scan.skip(entry, "outside the class folders")
    if not folders:
        num_files = scan.count("outside the class folders")
        advice = _with_containers(top, scan) or (
            "; put the images of each class into a folder with its name, or set labeled: false to use them without "
            "labels"
        )
        raise DataError(f"{top}: no class folders, {num_files} files{advice}")
    return sorted(folders)


def _check_is_folder(top: str, scan: Scan) -> None:
    if os.path.isfile(top):
        problem, advice = "cannot be listed (Not a directory)", "set root to the folder that contains the images"
    elif isinstance(scan, RemoteScan) and not any(scan.entries(top)):
        problem, advice = "there is no such folder, or nothing in it", "check the URL"
    else:
        return
    if (container := find_container(top)) is not None:
        advice = f"it is {container.kind}: {container.advice}"
    elif top.lower().endswith(EXTENSIONS):
        advice = f"set root: {os.path.dirname(top)}"
    elif top.lower().endswith(_LISTS):
        advice = f"for a list of files take kind: file_list with path: {top}"
    raise DataError(f"{top}: {problem}; {advice}")


def _with_containers(folder: str, scan: Scan, skipped: Scan | str = "") -> str:
    """The end of an error message about a folder without images: an archive in it, or else what was skipped."""
    for entry in scan.entries(folder):
        if (container := find_container(entry.name)) is not None:
            path = os.path.join(folder, "*.tar") if entry.name.lower().endswith(".tar") else entry.path
            advice = how_to_convert(container.kind, path)
            return printable(f"; {entry.name} is {container.kind} and no folder of images: {advice}")
    return str(skipped)


def _refuse_splits(top: str, scan: Scan, folders: list[str]) -> None:
    """Raise an error about a folder of splits, whose own folders are the classes."""
    if not {folder.lower() for folder in folders} <= _SPLITS:
        return
    deeper = [
        folder for folder in folders if any(is_folder(entry) for entry in scan.entries(os.path.join(top, folder)))
    ]
    if deeper:
        raise DataError(
            f"{top}: the folders {first_few(folders)} are splits of a dataset, not classes; set root: "
            f"{os.path.join(top, deeper[0])} for one split, or list the folders in `classes` if they are classes"
        )


def _level_warnings(top: str, scan: Scan, folders: list[str]) -> list[str]:
    """A warning about a root that is one folder too high."""
    if len(folders) > 1 and {folder.lower() for folder in folders} <= _SPLITS:
        return [f"{top}: the classes {first_few(folders)} are called like splits of a dataset; is root right?"]
    if len(folders) == 1:
        entries = list(scan.entries(os.path.join(top, folders[0])))
        inner = sorted(entry.name for entry in entries if is_folder(entry) and not is_skipped(entry.name))
        if len(inner) > 1 and not any(entry.name.lower().endswith(EXTENSIONS) for entry in entries):
            advice = f"set root: {os.path.join(top, folders[0])} if these are the classes"
            return [f"{top}: one class, {folders[0]!r}, of {len(inner)} folders: {first_few(inner)}; {advice}"]
    return []
