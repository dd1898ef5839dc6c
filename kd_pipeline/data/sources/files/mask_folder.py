"""The masks of a folder of images, in a folder with the same tree."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd_pipeline._core.suggestions import first_few
from kd_pipeline.data.sources.containers import user_location
from kd_pipeline.data.sources.files.folder_scan import Scan
from kd_pipeline.data.sources.files.paths import FileSource, PathTable
from kd_pipeline.data.sources.files.remote_files import RemoteFiles, Stores
from kd_pipeline.data.sources.files.remote_scan import RemoteScan
from kd_pipeline.data.sources.masks.decode import MASK_ENDINGS
from kd_pipeline.data.sources.masks.masks import Masks
from kd_pipeline.data.sources.masks.settings import FolderMasks
from kd_pipeline.errors import DataError
from kd_pipeline.storage import StoreSettings

__all__ = ["masks_in_folder"]


def masks_in_folder(
    settings: FolderMasks, images: PathTable, classes: Sequence[str] | None, storage: StoreSettings | None
) -> Masks:
    """The masks of `images`, each in the file of the same name with one of `MASK_ENDINGS`.

    Args:
        settings: where they are.
        images: paths below the folder of images.
        classes: names of the classes, if there are any.
        storage: how a folder behind a URL is read.

    Raises:
        DataError: an image has no mask, or several; names the first ones and says how many.
        StorageError: a store does not list its files.
    """
    location = user_location(settings.root)
    if isinstance(location, Path):
        top = os.path.abspath(location)
        scan, table, stores = Scan(top, MASK_ENDINGS), PathTable(top), None
    else:
        stores = Stores(storage)
        scan, table = RemoteScan(location, stores.of(location), MASK_ENDINGS), PathTable(location)
        top = scan.top
    table.extend(_matched(images, _found(top, scan), settings.replace, top))
    remote = None
    if stores is not None:
        assert isinstance(scan, RemoteScan)
        sizes = scan.sizes()
        found = (sizes[table.entry(sample)] for sample in range(len(table)))
        remote = RemoteFiles(table, stores, np.fromiter(found, np.int64, len(table)))
    return Masks(FileSource(table, remote=remote), settings, classes=classes, name=top)


def _found(top: str, scan: Scan) -> dict[str, list[str]]:
    """The endings of the masks in and below `top`, by the rest of their paths below it."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for folder, names in next(scan.images([top])):
        below = os.path.join(folder, "")[len(top) + 1 :]
        for name in os.fsdecode(names).split("\0"):
            stem, ending = os.path.splitext(name)
            found[below + stem].append(ending)
    if not found:
        raise DataError(f"{top}: no masks ({_endings()}) in or below this folder{scan}")
    return found


def _matched(images: PathTable, found: dict[str, list[str]], replace: dict[str, str], top: str) -> list[str]:
    """The path of the mask of each image, below the folder of the masks."""
    matched: list[str] = []
    missing: list[str] = []
    ambiguous: list[str] = []
    for sample in range(len(images)):
        folder, name = os.path.split(os.path.splitext(images.entry(sample))[0])
        for old, new in replace.items():
            name = name.replace(old, new)
        wanted = os.path.join(folder, name)
        endings = found.get(wanted, [])
        if len(endings) != 1:
            (ambiguous if endings else missing).append(wanted)
        else:
            matched.append(wanted + endings[0])
    if missing:
        some, ending = next((stem, endings[0]) for stem, endings in found.items())
        raise DataError(
            f"{top}: no masks for {len(missing)} of {len(images)} images: {first_few(missing)}, each with one of "
            f"{_endings()}; the masks are such as {some}{ending}. Add them, or leave out the images, or set replace to "
            "what is different in the names"
        )
    if ambiguous:
        raise DataError(
            f"{top}: more than one mask for {len(ambiguous)} of {len(images)} images: {first_few(ambiguous)}, which "
            f"are there with more than one of {_endings()}; remove the others"
        )
    return matched


def _endings() -> str:
    return " and ".join(MASK_ENDINGS)
