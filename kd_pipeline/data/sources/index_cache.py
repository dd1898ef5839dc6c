"""A cache of parsed file lists, memory-mapped instead of parsed again."""

import hashlib
import json
import logging
import mmap
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.atomic_write import atomic_file
from kd_pipeline._core.files import UntrustedFileError, open_regular, open_trusted
from kd_pipeline._core.user_cache import user_cache
from kd_pipeline._core.version import __version__
from kd_pipeline.data.sources.fingerprint import content_digest
from kd_pipeline.data.sources.labels import class_names
from kd_pipeline.data.sources.list_format import ListFormat
from kd_pipeline.data.sources.paths import PathTable
from kd_pipeline.errors import DataError

__all__ = ["ListIndex", "index_key", "load_index", "save_index"]

_logger = logging.getLogger("kd_pipeline")

_FORMAT_VERSION = 3
"""To be raised whenever the parsing of lists or the format of an index changes."""
_MAGIC = b"kdindex3"
_WORD = 8
"""Bytes of the header's length; the parts after the header start at a multiple of it."""
_START = len(_MAGIC) + hashlib.sha256().digest_size
_MIN_LIST_BYTES = 2**20
"""Shorter lists are not cached, because parsing them takes no noticeable time."""
_MAX_LIST_BYTES = 2**32
"""Longer lists are not cached: what has a terabyte is no list, and hashing it takes longer than finding that out."""
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
    """The key under which the index of the list `path` is cached; None if the list is short, huge or cannot be read.

    It is a SHA-256 over every byte of the list and over everything else that affects parsing. An edited list has a
    different key, whatever its times and size, so an index is never stale. Hashing a gigabyte takes two seconds,
    parsing it about fifteen.
    """
    try:
        with open_regular(path, max_bytes=_MAX_LIST_BYTES) as file:
            if os.fstat(file.fileno()).st_size < _MIN_LIST_BYTES:
                return None
            content = content_digest(file, _MAX_LIST_BYTES).hexdigest()
    except OSError:
        return None
    inputs = [__version__, _FORMAT_VERSION, sys.byteorder, asdict(form), str(path), root, classes, content]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def load_index(key: str, root: str) -> ListIndex | None:
    """The index cached under `key` with paths below `root`; None if there is none, it is damaged or perhaps not ours.

    Paths stay in the memory-mapped file, which the processes of a machine share. It is never changed, only replaced.
    The file contains no code and no serialized objects, and a checksum covers all of it. An index that another user
    could have written is not used, with a warning, the first time in a process.
    """
    try:
        path = _file(key)
        with open_trusted(path) as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        index = _parse(mapped, root)
        with suppress(OSError):
            os.utime(path)  # marks it as used
        return index
    except UntrustedFileError as exc:
        _warn_once(f"{exc.strerror}")
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, DataError):
        pass  # no such file, no home folder, an empty or damaged file
    return None


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
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    with suppress(OSError, RuntimeError):
        path = _file(key)
        _delete_unused(path.parent)
        with atomic_file(path, permissions=0o600) as file:
            for part in (_MAGIC, digest.digest(), *parts):
                file.write(part)


def _parse(mapped: memoryview, root: str) -> ListIndex:
    """The index in a file.

    Raises:
        ValueError, KeyError, TypeError, DataError, RecursionError: it is damaged.
    """
    magic, checksum, body = mapped[: len(_MAGIC)], mapped[len(_MAGIC) : _START], mapped[_START:]
    if magic != _MAGIC or checksum != hashlib.sha256(body).digest():
        raise ValueError("damaged")
    header_end = _WORD + _to_int(body)
    header = json.loads(bytes(body[_WORD:header_end]))
    classes, remarks = header["classes"], header["remarks"]
    bounds = [_round_up(header_end)]
    for name in ("ends", "labels", "blob"):
        if type(header[name]) is not int or header[name] < 0:
            raise ValueError(f"{name} is no size")
        bounds.append(bounds[-1] + header[name])
    if bounds[-1] != len(body):
        raise ValueError("the sizes are not those of the parts")
    ends, labels, blob = (body[start:end] for start, end in pairwise(bounds))
    found = np.frombuffer(labels, dtype=np.int64) if header["is_labeled"] else None
    _check(np.frombuffer(ends, dtype=np.int64), found, len(blob), classes)
    return ListIndex(
        paths=PathTable(root, blob, ends.cast("q")),
        labels=None if found is None else found.copy(),
        classes=None if classes is None else class_names(classes),
        remarks=tuple(map(str, remarks)),
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


@cache
def _warn_once(text: str) -> None:
    _logger.warning("a list is parsed again and not taken from the cache: %s", text)


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
