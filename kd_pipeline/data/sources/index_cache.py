"""A cache of parsed file lists, memory-mapped instead of parsed again."""

import hashlib
import json
import mmap
import os
import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.atomic_write import atomic_file
from kd_pipeline._core.user_cache import user_cache
from kd_pipeline._core.version import __version__
from kd_pipeline.data.sources.list_format import ListFormat
from kd_pipeline.data.sources.paths import PathTable

__all__ = ["ListIndex", "index_key", "load_index", "save_index"]

_FORMAT_VERSION = 2
"""To be raised whenever the parsing of lists or the format of an index changes."""
_MAGIC = b"kdindex2"
_WORD = 8
"""Bytes of the checksum and of the header's length; the parts after the header start at a multiple of it."""
_MIN_LIST_BYTES = 2**20
"""Shorter lists are not cached, because parsing them takes no noticeable time."""
_MAX_AGE_S = 30 * 24 * 3600.0
"""An index that was not used for this long is deleted."""


@dataclass(frozen=True, slots=True)
class ListIndex:
    """A parsed file list."""

    paths: PathTable
    """N paths."""
    labels: NDArray[np.int64] | None
    """`[N]`."""
    classes: tuple[str, ...] | None
    """Class names in label order."""
    remarks: tuple[str, ...] = ()
    """What parsing skipped or found suspicious."""


def index_key(path: Path, root: str, classes: Sequence[str] | None, form: ListFormat) -> str | None:
    """The key under which the index of the list `path` is cached; None if the list is short or cannot be read.

    It is a SHA-256 over every byte of the list and over everything else that affects parsing. An edited list has a
    different key, whatever its times and size, so an index is never stale. Hashing a gigabyte takes a second, parsing
    it about a minute and a half.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < _MIN_LIST_BYTES:
                return None
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
    inputs = [__version__, _FORMAT_VERSION, sys.byteorder, asdict(form), str(path), root, classes, content]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def load_index(key: str, root: str) -> ListIndex | None:
    """The index cached under `key` with paths below `root`; None if there is none or it is damaged.

    Paths stay in the memory-mapped file, which the processes of a machine share. The file contains no code and no
    serialized objects, and a checksum covers all of it.
    """
    try:
        path = _file(key)
        with path.open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        body = mapped[len(_MAGIC) + _WORD :]
        if not body or mapped[: len(_MAGIC)] != _MAGIC or _to_int(mapped[len(_MAGIC) :]) != zlib.crc32(body):
            return None
        with suppress(OSError):
            os.utime(path)  # marks it as used
    except (OSError, RuntimeError, ValueError):  # no such file, no home folder, an empty file
        return None
    length = _to_int(body)
    header = json.loads(bytes(body[_WORD : _WORD + length]))
    start, parts = _round_up(_WORD + length), []
    for num_bytes in (header["ends"], header["labels"], header["blob"]):
        parts.append(body[start : start + num_bytes])
        start += num_bytes
    ends, labels, blob = parts
    return ListIndex(
        paths=PathTable(root, blob, ends.cast("q")),
        labels=np.frombuffer(labels, dtype=np.int64).copy() if header["is_labeled"] else None,
        classes=None if header["classes"] is None else tuple(header["classes"]),
        remarks=tuple(header["remarks"]),
    )


def save_index(key: str, index: ListIndex) -> None:
    """Cache `index` under `key` atomically, after deleting indexes that were not used for 30 days.

    If the cache cannot be written, nothing is cached and no error raised.
    """
    blob, ends = index.paths.blob, memoryview(index.paths.ends).cast("B")
    labels = b"" if index.labels is None else index.labels.data.cast("B")
    sizes = {"ends": len(ends), "labels": len(labels), "blob": len(blob)}
    header = json.dumps({
        **sizes, "is_labeled": index.labels is not None, "classes": index.classes, "remarks": index.remarks
    }).encode()  # fmt: skip
    start = len(header).to_bytes(_WORD, "little") + header
    parts = (start.ljust(_round_up(len(start)), b"\0"), ends, labels, blob)
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    with suppress(OSError, RuntimeError):
        path = _file(key)
        _delete_unused(path.parent)
        with atomic_file(path) as file:
            for part in (_MAGIC, checksum.to_bytes(_WORD, "little"), *parts):
                file.write(part)


def _file(key: str) -> Path:
    return user_cache("index") / f"{key}.index"


def _delete_unused(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - path.stat().st_mtime > _MAX_AGE_S:
                path.unlink()


def _to_int(word: memoryview) -> int:
    return int.from_bytes(word[:_WORD], "little")


def _round_up(length: int) -> int:
    return -(-length // _WORD) * _WORD
