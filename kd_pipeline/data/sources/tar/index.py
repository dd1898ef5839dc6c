"""The samples of one tar shard: from the index file of DALI beside it if that is right, else from the shard."""

import logging
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import TypeVar

from kd_pipeline._core.text import printable
from kd_pipeline.data.sources.tar.members import BLOCK, Member, TarError, TarMembers, is_header_of
from kd_pipeline.data.sources.tar.samples import Count, LabelRule, ShardSamples, collect_samples, find_label_rule
from kd_pipeline.errors import DataError, StorageError, shown
from kd_pipeline.storage import FileStat, NoSuchFileError, Store, scheme_of

__all__ = ["Shard", "dali_index"]

_logger = logging.getLogger("kd_pipeline")

_T = TypeVar("_T")

_WINDOW, _REMOTE_WINDOW = 2**12, 2**22
"""Bytes that are read at once while headers are looked for: a page, as a label is often in it; of a remote file much,
as a request takes as long as to transfer this."""
_MAX_WHOLE = 2**28
"""Bytes of a remote shard that is read at once, so that the store may keep it."""
_INDEX_HEAD = re.compile(rb"v1\.2 ([0-9]{1,12})")
_MIN_INDEX_BYTES = 2**20
"""An index may have as many bytes as its shard, or so many."""
_CUT_OFF = "archive(s) cut off, whose last samples are missing or unreadable; copy them again"
_JOINED = "archive(s) with more after their end, which no program reads; join archives with tar -A and not with cat"
_LINKS = "link(s) or devices, which are skipped; make the archive again with tar -h --hard-dereference"


class Shard:
    """A tar archive of samples.

    Args:
        path: a local path or URL.
        store: reads it.
        stat: what the store says of it.
    """

    def __init__(self, path: str, store: Store, stat: FileStat) -> None:
        self._path, self._store, self._stat = path, store, stat

    def find_label_rule(self) -> LabelRule | None:
        """Where the labels are; None if there are no images either.

        Raises:
            DataError: it is not clear, or the shard is no tar archive.
            StorageError: the shard cannot be read.
        """
        window = _WINDOW if scheme_of(self._path) is None else _REMOTE_WINDOW
        members = TarMembers(self._read, self._stat.num_bytes, window)
        return self._checked(lambda: find_label_rule(members, members.content))

    def samples(self, rule: LabelRule, images: tuple[str, ...] | None, *, write_index: bool) -> ShardSamples:
        """All samples.

        Args:
            rule: where the labels are.
            images: extensions of the images; None for any.
            write_index: write an index of DALI's beside the shard where there is none that is right.

        Raises:
            DataError: the shard is no tar archive, or a sample has several images or a label that is none.
            StorageError: the shard cannot be read.
        """
        members = self._members()
        # Remote labels take a request each, and reading the whole shard takes few.
        is_useful = not rule.is_file or scheme_of(self._path) is None
        indexed = self._indexed(members) if is_useful or write_index else None
        if indexed is not None and is_useful:
            return self._checked(lambda: collect_samples(indexed, members.content, rule, images))
        found: list[Member] = []
        walked = _noted(members, found) if write_index and indexed is None else members
        samples = self._checked(lambda: collect_samples(walked, members.content, rule, images))
        for what, names in ((_LINKS, members.links), (_CUT_OFF, [b""] * members.is_cut)):
            if names:
                samples.counts[what] = Count(len(names), printable(os.fsdecode(names[0])))
        if members.num_ignored_bytes:
            samples.counts[_JOINED] = Count(1)
        if found and not members.is_cut:
            self._write_index(found)
        return samples

    def _members(self) -> TarMembers:
        num_bytes, window = self._stat.num_bytes, _WINDOW
        if scheme_of(self._path) is not None:
            window = num_bytes if num_bytes <= _MAX_WHOLE else _REMOTE_WINDOW
        return TarMembers(self._read, num_bytes, window)

    def _read(self, start: int, num_bytes: int) -> bytes:
        return self._store.read(self._path, start, num_bytes, expected=self._stat)

    def _checked(self, function: Callable[[], _T]) -> _T:
        try:
            return function()
        except TarError as exc:
            raise DataError(f"{shown(self._path)}: {exc}") from None

    def _indexed(self, members: TarMembers) -> list[Member] | None:
        """The members by the index beside the shard; None if there is none, or it is not that of this shard."""
        path = _index_path(self._path)
        try:
            stat = self._store.stat(path)
            if stat.num_bytes > max(_MIN_INDEX_BYTES, self._stat.num_bytes):
                raise ValueError(f"it has {stat.num_bytes} bytes, more than its shard")
            found = _parse(self._store.read(path, 0, stat.num_bytes))
            self._check_index(found)
        except NoSuchFileError:
            return None
        except (ValueError, StorageError) as exc:
            reason = exc.reason if isinstance(exc, StorageError) else exc
            _logger.warning(
                "%s is not the index of %s (%s) and is not used; delete it, or make it again: wds2idx %s",
                *map(printable, (shown(path), shown(self._path), reason, shown(self._path))),
            )
            return None
        return found

    def _check_index(self, members: list[Member]) -> None:
        """Look at the first and the last header, and at the end.

        Raises:
            ValueError: the index is not that of this shard.
        """
        end = 0
        for member in members:
            if member.start < end + BLOCK or member.start % BLOCK:
                raise ValueError(f"byte {member.start} is no place of a file")
            end = member.start + -(-member.num_bytes // BLOCK) * BLOCK
        if end > self._stat.num_bytes:
            raise ValueError(f"it has {end} bytes, and the shard {self._stat.num_bytes}")
        for member in (members[0], members[-1]):
            head = self._read(member.start - BLOCK, BLOCK)
            if not is_header_of(head, member.num_bytes):
                raise ValueError(f"there is no file of {member.num_bytes} bytes at byte {member.start}")
        after = self._read(end, min(BLOCK, self._stat.num_bytes - end))
        if after.strip(b"\0"):
            raise ValueError(f"the shard has more files, from byte {end} on")

    def _write_index(self, members: list[Member]) -> None:
        try:
            self._store.write(_index_path(self._path), dali_index(members))
        except (StorageError, ValueError) as exc:
            reason = exc.reason if isinstance(exc, StorageError) else str(exc)
            _warn_once(shown(self._path).rpartition("/")[0], printable(reason))


def dali_index(members: list[Member]) -> bytes:
    """The index that DALI's `wds2idx` makes of a shard with these files, version 1.2.

    Raises:
        ValueError: a name cannot be written into one, as it has a space or a line break.
    """
    lines: list[list[bytes]] = []
    last = None
    for name, start, num_bytes in members:
        slash = name.rfind(b"/") + 1
        dot = name.find(b".", slash)
        if dot <= slash:
            continue
        if re.search(rb"\s", name):
            raise ValueError(f"the name {printable(os.fsdecode(name))!r} has a space")
        if name[:dot] != last:
            last = name[:dot]
            lines.append([])
        lines[-1].append(b"%s %d %d %s" % (name[dot + 1 :], start, num_bytes, name))
    return b"\n".join([b"v1.2 %d" % len(lines), *map(b" ".join, lines), b""])


def _parse(text: bytes) -> list[Member]:
    """The files that an index of DALI's lists.

    Raises:
        ValueError: it is none, or one of a version that has no names.
    """
    head, *lines = text.split(b"\n")
    match = _INDEX_HEAD.fullmatch(head.strip())
    if match is None:
        raise ValueError(f"it starts with {printable(os.fsdecode(head[:30]))!r} and not with the version v1.2")
    if lines and not lines[-1]:
        lines.pop()
    members = []
    for line in lines:
        fields = line.split()
        if not fields or len(fields) % 4:
            raise ValueError(f"a line has {len(fields)} columns and not four for each file")
        for start, num_bytes, name in zip(fields[1::4], fields[2::4], fields[3::4], strict=True):
            if not (start.isdigit() and num_bytes.isdigit() and len(start) < 19 and len(num_bytes) < 19):
                raise ValueError("a place or size is no number")
            members.append(Member(name, int(start), int(num_bytes)))
    if len(lines) != int(match[1]) or not members:
        raise ValueError(f"it says that it has {int(match[1])} samples, and has {len(lines)}")
    return members


@cache
def _warn_once(folder: str, reason: str) -> None:
    _logger.warning("no index is written beside the shards in %s (%s), only into the cache", folder, reason)


def _noted(members: TarMembers, found: list[Member]) -> Iterator[Member]:
    for member in members:
        found.append(member)
        yield member


def _index_path(path: str) -> str:
    """`a/train-0001.idx` of `a/train-0001.tar`; the query of a URL stays."""
    before, mark, query = path.partition("?") if scheme_of(path) else (path, "", "")
    return f"{before.removesuffix('.tar')}.idx{mark}{query}"
