"""Files of the user's cache that are mapped into memory: a header of JSON, and parts of bytes after it."""

import hashlib
import json
import logging
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from kd_pipeline._core.atomic_write import atomic_file
from kd_pipeline._core.files import UntrustedFileError, open_trusted
from kd_pipeline._core.user_cache import user_cache
from kd_pipeline.data.sources.fingerprint import content_digest
from kd_pipeline.errors import DataError

__all__ = ["index_file", "load_index_file", "save_index_file"]

_logger = logging.getLogger("kd_pipeline")

_MAGIC = b"kdindex3"
_WORD = 8
"""Bytes of the header's length; each part starts at a multiple of it."""
_START = len(_MAGIC) + hashlib.sha256().digest_size
_MAX_BYTES = 2**40
_MAX_AGE_S = 30 * 24 * 3600.0
"""An index that was not used for this long is deleted."""

T = TypeVar("T")


def index_file(key: str) -> Path:
    """The file of the index `key`, whose folder exists when this returns.

    Raises:
        OSError, RuntimeError: there is no cache folder that is this user's alone.
    """
    return user_cache("index") / f"{key}.index"


def load_index_file(
    key: str,
    parts: Sequence[str],
    parse: Callable[[dict[str, Any], list[memoryview]], T],
    *,
    what: str,
    is_hashed: bool = True,
) -> T | None:
    """What `parse` makes of the file cached under `key`; None if there is none, it is damaged or perhaps not ours.

    The parts stay in the memory-mapped file, which the processes of a machine share. It is never changed, only
    replaced. The file contains no code and no serialized objects. One that another user could have written is not used,
    with a warning, the first time in a process.

    Args:
        key: of the index.
        parts: names of the parts, in the order in which they were saved.
        parse: gets the header and the parts; a ValueError, KeyError, TypeError, RuntimeError or DataError of it means
            that the file is damaged.
        what: what is done instead, for the warning.
        is_hashed: as it was saved.
    """
    try:
        path = index_file(key)
        with open_trusted(path) as file:
            _check_intact(file, is_hashed=is_hashed)
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        found = parse(*_split(mapped[_START:], parts))
        with suppress(OSError):
            os.utime(path)  # marks it as used
        return found
    except UntrustedFileError as exc:
        _warn_once(f"{what} and not taken from the cache: {exc.strerror}")
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, DataError):
        pass  # no such file, no home folder, an empty or damaged file
    return None


def save_index_file(
    key: str,
    header: Mapping[str, object],
    parts: Mapping[str, memoryview | bytes | bytearray],
    *,
    is_hashed: bool = True,
) -> None:
    """Cache a header of JSON values and parts under `key` atomically, after deleting what was not used for 30 days.

    If the cache cannot be written, nothing is cached and no error raised.

    Args:
        key: of the index.
        header: must not have the names of the parts as keys.
        parts: bytes by name, which are written in this order.
        is_hashed: whether the checksum covers the parts as well as the header, so that loading reads all of them.
    """
    sizes = {name: len(part) for name, part in parts.items()}
    encoded = json.dumps(sizes | dict(header)).encode()
    start = len(encoded).to_bytes(_WORD, "little") + encoded
    start = start.ljust(_round_up(len(start)), b"\0")
    digest = hashlib.sha256(start)
    for part in parts.values() if is_hashed else ():
        digest.update(part)
    with suppress(OSError, RuntimeError):
        path = index_file(key)
        _delete_unused(path.parent)
        with atomic_file(path, permissions=0o600) as file:
            for part in (_MAGIC, digest.digest(), start, *parts.values()):
                file.write(part)


def _check_intact(file: BinaryIO, *, is_hashed: bool) -> None:
    """Compare the checksum. The file is read, as what is mapped counts as memory of the process once it was looked at.

    Raises:
        ValueError: it is damaged.
    """
    magic, checksum, word = file.read(len(_MAGIC)), file.read(hashlib.sha256().digest_size), file.read(_WORD)
    if magic != _MAGIC:  # before anything of perhaps many gigabytes is read
        raise ValueError("no index")
    header_bytes = _round_up(_WORD + int.from_bytes(word, "little"))
    file.seek(_START)
    digest = content_digest(file, _MAX_BYTES if is_hashed else header_bytes)
    if checksum != digest.digest():
        raise ValueError("damaged")


def _split(body: memoryview, parts: Sequence[str]) -> tuple[dict[str, Any], list[memoryview]]:
    """Header and parts of an intact file.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: its content is no index.
    """
    header_end = _WORD + int.from_bytes(body[:_WORD], "little")
    header = json.loads(bytes(body[_WORD:header_end]))
    bounds = [_round_up(header_end)]
    for name in parts:
        if type(header[name]) is not int or header[name] < 0:
            raise ValueError(f"{name} is no size")
        bounds.append(bounds[-1] + header[name])
    if bounds[-1] != len(body):
        raise ValueError("the sizes are not those of the parts")
    return header, [body[start:end] for start, end in pairwise(bounds)]


@cache
def _warn_once(text: str) -> None:
    _logger.warning("%s", text)


def _delete_unused(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - path.stat().st_mtime > _MAX_AGE_S:
                path.unlink()


def _round_up(length: int) -> int:
    return -(-length // _WORD) * _WORD
