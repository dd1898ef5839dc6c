"""Long lists of files, kept as they were read: mapped into memory instead of parsed again."""

import hashlib
import json
import mmap
import os
import sys
import time
import zlib
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.atomic_write import whole_file
from kd_pipeline._core.user_cache import user_cache
from kd_pipeline._core.version import __version__

__all__ = ["Index", "index_key", "load_index", "save_index"]

_LAYOUT = 1
"""To be raised whenever lists are read in another way, or kept in another."""
_MAGIC = b"kdindex1"
_WORD = 8
"""Bytes of the check sum and of the length in front of the header; parts begin at multiples of it."""
_SMALLEST_LIST = 2**20
"""Bytes of a list from which on reading it takes longer than a person notices."""
_KEPT_S = 30 * 24 * 3600.0
"""How long an index is kept that nobody asks for."""


@dataclass(frozen=True, slots=True)
class Index:
    """What a list says."""

    blob: bytearray | memoryview
    """All paths, one behind the other."""
    ends: "array[int] | memoryview"
    """`[N + 1]` int64: path n lies in `blob[ends[n] : ends[n + 1]]`."""
    labels: NDArray[np.int64] | None
    """`[N]`."""
    classes: tuple[str, ...] | None


def index_key(path: Path, root: str, classes: Sequence[str] | None) -> str | None:
    """Under which name the index of the list `path` is kept; None where the list is short or cannot be read.

    The name is a SHA-256 over every byte of the list, and over what else decides how it is read. So a list that was
    edited, in whatever way and with whatever times and size, has another name, and an index is never out of date.
    Reading the list once costs a second for a gigabyte; parsing it, about a minute and a half.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < _SMALLEST_LIST:
                return None
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
    about = [__version__, _LAYOUT, sys.byteorder, path.suffix, root, classes, content]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def load_index(key: str) -> Index | None:
    """The index that was saved under `key`; None where there is none, or it is damaged.

    Paths stay in the file, which is mapped into memory: processes of one machine share them. Nothing in the file is
    code or makes objects, and a check sum covers all of it.
    """
    try:
        path = _file(key)
        with path.open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        checked = mapped[len(_MAGIC) + _WORD :]
        if not checked or mapped[: len(_MAGIC)] != _MAGIC or _number(mapped[len(_MAGIC) :]) != zlib.crc32(checked):
            return None
        with suppress(OSError):
            os.utime(path)  # somebody asked for it
    except (OSError, RuntimeError, ValueError):  # none there, no home folder, an empty file
        return None
    length = _number(checked)
    header = json.loads(bytes(checked[_WORD : _WORD + length]))
    start, parts = _padded(_WORD + length), []
    for num_bytes in (header["ends"], header["labels"], header["blob"]):
        parts.append(checked[start : start + num_bytes])
        start += num_bytes
    ends, labels, blob = parts
    return Index(
        blob=blob,
        ends=ends.cast("q"),
        labels=np.frombuffer(labels, dtype=np.int64).copy() if header["is_labeled"] else None,
        classes=None if header["classes"] is None else tuple(header["classes"]),
    )


def save_index(key: str, index: Index) -> None:
    """Keep `index` under `key`, in one step; where nothing can be written, nothing is kept.

    What nobody has asked for in 30 days goes first.
    """
    labels = b"" if index.labels is None else index.labels.data.cast("B")
    ends = memoryview(index.ends).cast("B")
    header = json.dumps(
        {
            "ends": len(ends),
            "labels": len(labels),
            "blob": len(index.blob),
            "is_labeled": index.labels is not None,
            "classes": index.classes,
        }
    ).encode()
    start = len(header).to_bytes(_WORD, "little") + header
    parts = (start.ljust(_padded(len(start)), b"\0"), ends, labels, index.blob)
    check_sum = 0
    for part in parts:
        check_sum = zlib.crc32(part, check_sum)
    with suppress(OSError, RuntimeError):
        path = _file(key)
        _remove_unused(path.parent)
        with whole_file(path) as file:
            for part in (_MAGIC, check_sum.to_bytes(_WORD, "little"), *parts):
                file.write(part)


def _file(key: str) -> Path:
    return user_cache("index") / f"{key}.index"


def _remove_unused(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - path.stat().st_mtime > _KEPT_S:
                path.unlink()


def _number(word: memoryview) -> int:
    return int.from_bytes(word[:_WORD], "little")


def _padded(length: int) -> int:
    return -(-length // _WORD) * _WORD
