"""The files in a tar archive: the name, place and size of each, from headers alone."""

import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple
from zlib import adler32

from kd_pipeline._core.text import printable

__all__ = ["BLOCK", "MAX_MEMBER", "Member", "TarError", "TarMembers", "is_header_of"]

BLOCK = 512
"""Bytes of a header; what follows it is padded to a multiple."""
MAX_MEMBER = 2**62
"""Bytes that a header may claim for a file; what is larger does not fit into an index."""
_ZEROS = bytes(BLOCK)
_SPACES = b" " * 8
"""What the place of the checksum counts as."""
_MAX_EXTENSION = 2**20
"""Bytes of a long name, or of the records of a PAX header."""
_RECORD_SIZE = 20 * BLOCK
"""An archive is padded with zeros to a multiple of it."""
_ADLER = 65521
_REGULAR = frozenset(b"0\x007")
_LINKS = frozenset(b"123456")
"""Links, devices, folders and pipes, after whose header there is no content."""
_FOLDER, _SPARSE = b"5S"
_LONG_NAME, _LONG_LINK, _PAX_GLOBAL = b"LKg"
_EXTENSIONS = frozenset(b"LKgxX")
"""Headers whose content is about the next one: GNU's, and those of PAX."""
_RECORD = re.compile(rb"([0-9]{1,9}) ([^=]*)=")
_COMPRESSED = {b"\x1f\x8b": ("gzip", "gunzip"), b"BZh": ("bzip2", "bunzip2"), b"\xfd7zXZ": ("xz", "unxz")}
_COMPRESSED[b"\x28\xb5\x2f\xfd"] = ("zstd", "unzstd")


class Member(NamedTuple):
    """A file in an archive."""

    name: bytes
    """As it is in the archive, in any encoding, with folders."""
    start: int
    """Byte of the archive at which its content starts, after its header."""
    num_bytes: int
    """Of its content, which the archive may not have in full."""


class TarError(Exception):
    """Where an archive is no tar archive, or one that is not read; the message says at which byte."""


class TarMembers:
    """Iterates over the files of an archive in its order. Folders, links and devices are left out.

    Headers of ustar, GNU and PAX are read. Nothing in them is believed: a file that would end after the archive is the
    last one, and every step leads forward.

    Args:
        read: returns exactly the bytes from a place on, so many of them.
        num_bytes: of the archive.
        window: bytes that are read at once, of which those after a header are often needed too.

    Raises:
        TarError: from iteration.
    """

    def __init__(self, read: Callable[[int, int], bytes], num_bytes: int, window: int) -> None:
        self._read, self._num_bytes, self._window = read, num_bytes, window
        self._buffer, self._buffer_start = b"", 0
        self.is_cut = False
        """Whether the archive ends without its mark of the end, as a copy that is not whole."""
        self.num_ignored_bytes = 0
        """What follows the mark of the end, where that is no padding."""
        self.links: list[bytes] = []
        """Names of links and devices, which have no content."""

    def __iter__(self) -> Iterator[Member]:
        place, long_name, long_size = 0, None, None
        while True:
            head = self._header(place)
            if head is None:
                return
            kind, size, start = head[156], _size_in(head, place), place + BLOCK
            if kind in _REGULAR:
                if long_name is None and long_size is None:
                    name = _name_in(head)
                else:
                    size = size if long_size is None else long_size
                    name = _name_in(head) if long_name is None else long_name
                    long_name = long_size = None
                if not name.endswith(b"/"):  # a folder, before there was a letter for those
                    yield Member(name, start, size)
            elif kind in _EXTENSIONS:
                content = self._extension(start, size, place)
                if content is None:
                    return
                if kind == _LONG_NAME:
                    long_name = content.partition(b"\0")[0]
                elif kind != _LONG_LINK:
                    own_name, long_size = _pax(content.rstrip(b"\0"), place, is_global=kind == _PAX_GLOBAL)
                    long_name = own_name or long_name
            elif kind == _SPARSE:
                raise TarError(_sparse(place))
            else:
                if kind != _FOLDER:
                    self.links.append(_name_in(head) if long_name is None else long_name)
                size = 0 if kind in _LINKS else size
                long_name = long_size = None
            place = start + -(-size // BLOCK) * BLOCK

    def content(self, member: Member) -> bytes | None:
        """All bytes of a member, for which the archive is often not read again; None if it is cut off."""
        if member.start + member.num_bytes > self._num_bytes:
            return None
        _, start, num_bytes = member
        if num_bytes > self._window:
            return self._read(start, num_bytes)
        place = start - self._buffer_start
        if place < 0 or place + num_bytes > len(self._buffer):
            self._fill(start)  # with what follows it too, which is the next header
            place = 0
        return self._buffer[place : place + num_bytes]

    def _fill(self, place: int) -> None:
        self._buffer = self._read(place, min(self._window, self._num_bytes - place))
        self._buffer_start = place

    def _header(self, place: int) -> bytes | None:
        """The header at `place`, whose checksum is right; None at the end."""
        offset = place - self._buffer_start
        if not 0 <= offset <= len(self._buffer) - BLOCK:
            if place + BLOCK > self._num_bytes:
                if place == 0:
                    raise TarError(_no_header(self._read(0, self._num_bytes), place))
                self.is_cut = True
                return None
            self._fill(place)
            offset = 0
        head = self._buffer[offset : offset + BLOCK]
        if not _has_checksum(head):
            if head != _ZEROS:
                raise TarError(_no_header(head, place))
            self._look_after(place)
            return None
        return head

    def _look_after(self, place: int) -> None:
        """Note what follows the mark of the end, as where archives were joined by `cat`."""
        left = self._num_bytes - place
        if self._read(place, min(left, 2 * _RECORD_SIZE)).strip(b"\0"):
            self.num_ignored_bytes = left

    def _extension(self, start: int, size: int, place: int) -> bytes | None:
        """The content of a header that belongs to the next one; None if it is cut off."""
        if size > _MAX_EXTENSION:
            raise TarError(f"byte {place}: a name or header of {size} bytes; at most {_MAX_EXTENSION} are read")
        content = self.content(Member(b"", start, size))
        self.is_cut = content is None
        return content


def is_header_of(head: bytes, num_bytes: int) -> bool:
    """Whether `head` `[512]` is the header of a file of `num_bytes`."""
    # As nearly all write it, which compares faster than a number is read.
    return head[124:135] == b"%011o" % num_bytes or (_has_checksum(head) and _stated_size(head) == num_bytes)


def _has_checksum(head: bytes) -> bool:
    summed = head[:148] + _SPACES + head[156:]
    try:
        # Six digits, as nearly all write it. The lower half of adler32 is 1 and the sum of all bytes, modulo 65521.
        if adler32(summed) & 0xFFFF == (int(head[148:154], 8) + 1) % _ADLER:
            return True
        stated = int(head[148:156].rstrip(b"\0 "), 8)
    except ValueError:
        return False
    # Some old programs added bytes from 128 on as negative numbers.
    return stated in (sum(summed), sum(byte - 256 * (byte > 127) for byte in summed))


def _stated_size(head: bytes) -> int | None:
    try:
        return int(head[124:135], 8)  # as nearly all write it
    except ValueError:
        field = head[124:136]
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return None


def _size_in(head: bytes, place: int) -> int:
    size = _stated_size(head)
    if size is None or size < 0 or size > MAX_MEMBER:
        raise TarError(f"byte {place}: the size of a file is {_shown(head[124:136])}, which is none; copy it again")
    return size


def _name_in(head: bytes) -> bytes:
    name = head[:100].partition(b"\0")[0]
    if head[345] and head[257:263] == b"ustar\0":  # GNU has times in this place
        name = head[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _pax(content: bytes, place: int, *, is_global: bool) -> tuple[bytes | None, int | None]:
    """Name and size of the next file as the records of a PAX header give them."""
    name = size = None
    position = 0
    while position < len(content):
        match = _RECORD.match(content, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(content) or content[end - 1] != ord("\n"):
            raise TarError(f"byte {place}: the records of a PAX header are damaged; copy the archive again")
        keyword, value = match[2], content[match.end() : end - 1]
        if keyword.startswith(b"GNU.sparse."):
            raise TarError(_sparse(place))
        if is_global and keyword in (b"path", b"size"):
            raise TarError(f"byte {place}: a PAX header gives all files the same {keyword.decode()}")
        if keyword == b"path":
            name = value
        elif keyword == b"size":
            if not (value.isdigit() and len(value) < 20 and int(value) <= MAX_MEMBER):
                raise TarError(f"byte {place}: the size of a file is {_shown(value[:30])}, which is none")
            size = int(value)
        position = end
    return name, size


def _shown(field: bytes) -> str:
    return repr(printable(os.fsdecode(field.rstrip(b"\0"))))


def _sparse(place: int) -> str:
    return f"byte {place}: a sparse file, which is not read; make the archive again without the option --sparse"


def _no_header(head: bytes, place: int) -> str:
    if place == 0:
        for magic, (kind, command) in _COMPRESSED.items():
            if head.startswith(magic):
                return (
                    f"it is compressed with {kind}, so nothing in it can be read alone; decompress it with {command}, "
                    "which costs hardly any space, as images are compressed already"
                )
        if len(head) < BLOCK:
            return f"it has {len(head)} bytes, fewer than a tar archive; copy it again"
        return "it is no tar archive, as it does not start with a header; check the path"
    return (
        f"byte {place}: there is no header where one should be, so all after it is unknown: the archive is damaged; "
        "copy it again"
    )
