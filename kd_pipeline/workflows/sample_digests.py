"""Digests of the samples of a source in groups, by which a run later says which of them changed."""

import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from kd_pipeline._core.files import open_regular
from kd_pipeline._core.suggestions import first_few
from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources import Source

__all__ = ["changed_samples", "digest_samples"]

_MAX_SAMPLES = 100_000
"""Of larger data no digests are kept: they would take seconds at every start."""
_MAX_READ = 4096
"""Samples up to which the content is digested too."""
_MAX_FILE = 2**24
_NUM_GROUPS = 1024
_MAX_CLASSES = 1000
_known: WeakKeyDictionary[Source, dict[str, Any]] = WeakKeyDictionary()
"""Several students of a run share a source, which is read once for all of them."""


def digest_samples(source: Source) -> dict[str, Any] | None:
    """Plain values for `changed_samples`; None for data that is too large.

    The samples are in 1,024 groups by their names: folder and file, wherever the data is. Of each group there is the
    number of samples and a digest of their names, of their labels, and for small data of their content.
    """
    if len(source) > _MAX_SAMPLES:
        return None
    if source not in _known:
        _known[source] = _digest(source)
    return _known[source]


def _digest(source: Source) -> dict[str, Any]:
    groups = _grouped(_names(source))
    found: dict[str, Any] = {"count": len(source), "groups": {}}
    if source.labels is not None and (source.num_classes or 0) <= _MAX_CLASSES:
        found["of_each_class"] = np.bincount(source.labels, minlength=source.num_classes or 0).tolist()
    for group, indices in groups.items():
        found["groups"][str(group)] = [len(indices), *_group_digests(source, indices)]
    return found


def changed_samples(old: Mapping[str, Any], source: Source) -> list[str]:
    """What is different between the samples of `source` and those that `old` was made of, a sentence each.

    `old` may have been written by anybody: what is no such value counts as a difference that is not named.
    """
    new = digest_samples(source)
    before = old.get("groups")
    if new is None or not isinstance(before, Mapping):
        return []
    names, lines = _names(source), []
    if old.get("count") != new["count"]:
        lines.append(f"samples: {_count(old.get('count'))} → {new['count']}")
    counts = old.get("of_each_class"), new.get("of_each_class")
    lines += _changed_classes(*counts, source.classes)
    groups = _grouped(names)
    suspects: dict[str, list[str]] = {}
    for group in sorted({*before, *new["groups"]}, key=str):
        now = new["groups"].get(group)
        was = before.get(group)
        if now == was:
            continue
        here = [names[index] for index in groups.get(int(group), [])] if str(group).isdecimal() else []
        suspects.setdefault(_kind(was, now), []).extend(here)
    for kind, found in suspects.items():
        if found:
            lines.append(f"{kind}: {first_few(found)}" if len(found) < _NUM_GROUPS else f"{kind} of many samples")
        elif kind == "removed":
            lines.append("samples that were there are not")
    return lines


def _kind(was: Any, now: Any) -> str:
    """What is different in a group."""
    if not isinstance(was, Sequence) or not isinstance(now, list) or len(was) != len(now):
        return "added" if now is not None else "removed"
    if was[:2] != now[:2]:
        return "other names among"
    return "other labels" if was[2] != now[2] else "other content"


def _changed_classes(old: Any, new: Any, classes: Sequence[str] | None) -> list[str]:
    if not isinstance(old, list) or not isinstance(new, list) or len(old) != len(new):
        return []
    names = classes or [str(label) for label in range(len(new))]
    changed = [f"{name} {_count(was)} → {now}" for name, was, now in zip(names, old, new, strict=False) if was != now]
    return [f"samples of each class: {first_few(changed)}"] if changed else []


def _count(value: Any) -> str:
    return str(value) if type(value) is int and abs(value) < 2**63 else "?"


def _names(source: Source) -> list[str]:
    return [_name(source, index) for index in range(len(source))]


def _name(source: Source, index: int) -> str:
    """The last two parts of a name, which stay the same where the data is moved."""
    return "/".join(source.name(index).split("/")[-2:])


def _grouped(names: Sequence[str]) -> dict[int, list[int]]:
    """The indices of the samples of each group."""
    found: dict[int, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(zlib.crc32(name.encode(errors="backslashreplace")) % _NUM_GROUPS, []).append(index)
    return found


def _group_digests(source: Source, indices: list[int]) -> Iterator[str]:
    yield _short(*(_name(source, index) for index in indices))
    yield _short(*(str(source.labels[index]) for index in indices)) if source.labels is not None else ""
    yield _content(source, indices) if len(source) <= _MAX_READ else ""


def _content(source: Source, indices: list[int]) -> str:
    digest = hashlib.sha256()
    read = source.read(np.array(indices, np.int64))
    for each in read:
        if isinstance(each, UnreadableFileError):
            digest.update(b"-")
        elif source.stores == "files":
            digest.update(_of_file(bytes(each).rstrip(b"\0")))
        else:
            digest.update(np.ascontiguousarray(each).data)
    return digest.hexdigest()[:8]


def _of_file(path: bytes) -> bytes:
    """A digest of a file; of an unreadable one that it is so."""
    try:
        with open_regular(os.fsdecode(path)) as file:
            return hashlib.sha256(file.read(_MAX_FILE)).digest()
    except OSError:
        return b"-"


def _short(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode(errors="backslashreplace")).hexdigest()[:8]
