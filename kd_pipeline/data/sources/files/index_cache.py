"""A cache of parsed file lists and scanned folders, memory-mapped instead of read again."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.user_cache import user_cache_path
from kd_pipeline._core.version import __version__
from kd_pipeline.data.sources.files.list_file import MAX_LIST_BYTES, ListFile
from kd_pipeline.data.sources.files.list_format import ListFormat
from kd_pipeline.data.sources.files.paths import PathTable
from kd_pipeline.data.sources.fingerprint import content_digest, drop_pages
from kd_pipeline.data.sources.index_file import load_index_file, save_index_file
from kd_pipeline.data.sources.labels import class_names
from kd_pipeline.errors import shown

__all__ = ["ListIndex", "folder_key", "has_index", "index_key", "load_index", "save_index"]

_FORMAT_VERSION = 5
"""To be raised whenever the parsing of lists, the scan of folders or the format of an index changes."""
_PARTS = ("ends", "labels", "blob")
_MIN_LIST_BYTES = 2**20
"""Shorter lists are not cached, because parsing them takes no noticeable time."""


@dataclass(frozen=True, slots=True)
class ListIndex:
    """A parsed file list, or a scanned folder."""

    paths: PathTable
    """N paths."""
    labels: NDArray[np.int64] | None
    """`[N]`."""
    classes: tuple[str, ...] | None
    """Class names in label order."""
    remarks: tuple[str, ...] = ()
    """What was skipped or looks suspicious."""
    folders: tuple[str, ...] = ()
    """Those that were scanned."""
    stamp: str = ""
    """Of the folders, before they were; see `folder_scan.stamp_of`."""


def index_key(path: ListFile, root: str, classes: Sequence[str] | None, form: ListFormat) -> str | None:
    """The key under which the index of the list `path` is cached; None if the list is short, huge or cannot be read.

    It is a SHA-256 over every byte of the list and over everything else that affects parsing. An edited list has a
    different key, whatever its times and size, so an index is never stale. Hashing a gigabyte takes two seconds,
    parsing it about fifteen.
    """
    try:
        with path.open() as file:
            if not _MIN_LIST_BYTES <= file.seek(0, os.SEEK_END) <= MAX_LIST_BYTES:
                return None
            file.seek(0)
            content = content_digest(file, MAX_LIST_BYTES).hexdigest()
    except OSError:
        return None
    inputs = [__version__, _FORMAT_VERSION, sys.byteorder, asdict(form), path.name, shown(root), classes, content]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def folder_key(root: str, classes: Sequence[str] | None, labeled: bool) -> str:
    """The key under which the index of the folder `root` is cached; whether it is stale is for `stamp_of` to find."""
    inputs = [__version__, _FORMAT_VERSION, sys.byteorder, "folder", root, classes, labeled]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def has_index(key: str) -> bool:
    """Whether an index is cached under `key`; creates no folder to find out."""
    try:
        return (user_cache_path("index") / f"{key}.index").is_file()
    except (OSError, RuntimeError):
        return False


def load_index(key: str, root: str) -> ListIndex | None:
    """The index cached under `key` with paths below `root`; None if there is none, it is damaged or perhaps not ours.

    Paths and labels stay in the file, see `load_index_file`. A checksum covers all of it.
    """
    return load_index_file(
        key, _PARTS, lambda header, parts: _parse(header, parts, root), what="lists and folders are read again"
    )


def save_index(key: str, index: ListIndex, root: str) -> ListIndex:
    """Cache `index`, with paths below `root`, under `key` atomically; with credentials in its paths, nothing is cached.

    Returns:
        The cached index, which takes no memory of this process alone; `index` itself if the cache cannot be written.
    """
    if index.paths.has_credentials:
        return index
    labels = b"" if index.labels is None else index.labels.data.cast("B")
    parts = {"ends": memoryview(index.paths.ends).cast("B"), "labels": labels, "blob": index.paths.blob}
    header = {
        "is_labeled": index.labels is not None, "classes": index.classes, "remarks": index.remarks,
        "folders": index.folders, "stamp": index.stamp, "schemes": sorted(index.paths.schemes),
    }  # fmt: skip
    save_index_file(key, header, parts)
    return (load_index(key, root) if has_index(key) else None) or index


def _parse(header: dict[str, Any], parts: list[memoryview], root: str) -> ListIndex:
    """The index in a file.

    Raises:
        ValueError, KeyError, TypeError, DataError: it is damaged.
    """
    classes = header["classes"]
    ends, labels, blob = parts
    found = np.frombuffer(labels, dtype=np.int64) if header["is_labeled"] else None
    _check(np.frombuffer(ends, dtype=np.int64), found, len(blob), classes)
    drop_pages(np.frombuffer(ends, dtype=np.int64))
    return ListIndex(
        paths=PathTable(root, blob, ends.cast("q"), map(str, header["schemes"])),
        labels=found,
        classes=None if classes is None else class_names(classes),
        remarks=tuple(map(str, header["remarks"])),
        folders=tuple(map(str, header["folders"])),
        stamp=str(header["stamp"]),
    )


def _check(ends: NDArray[np.int64], labels: NDArray[np.int64] | None, num_bytes: int, classes: object) -> None:
    """Check that no path is outside of the file, or empty, and that each label is one of a class."""
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != num_bytes or not (ends[1:] > ends[:-1]).all():
        raise ValueError("the paths are not in the file")
    if not isinstance(classes, list | None):
        raise ValueError("the classes are no list")
    limit = len(classes) if classes else 2**31
    if labels is not None and (len(labels) != len(ends) - 1 or labels.min() < 0 or labels.max() >= limit):
        raise ValueError("the labels are not those of the paths")
