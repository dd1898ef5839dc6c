"""Hostile tar shards, and index files beside them."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources import Tar
from kd_pipeline.errors import DataError
from tests.hostile.cases import DEEP, HUGE, Case, Kind
from tests.tar_files import write_tar

DIGITS = b"9" * 5000


def open_tar(path: Path, label: str = "auto") -> object:
    found = Tar(path, label=label)
    return [found.name(index) for index in range(len(found))], found.labels, found.read(np.arange(len(found)))


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **fields: object) -> bytes:
    """A header, with fields that tarfile itself would not write."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def labeled(content: bytes, extension: str = "json") -> Callable[[Path], object]:
    """A sample whose label is `content`."""
    return lambda path: write_tar(path, {"a.jpg": b"image", f"a.{extension}": content})


def shard_cases() -> list[Case]:
    kind = Kind("tar", open_tar, DataError, file="shard.tar")
    kind.add_special()
    kind.add_bytes("zeros", bytes(10**8))
    kind.add_bytes("garbage", b"\xff" * 10**6)
    kind.add_bytes("long name of 64 GB", member("././@LongLink", tarfile.GNUTYPE_LONGNAME, HUGE))
    kind.add_bytes("PAX header of 64 GB", member("x", tarfile.XHDTYPE, HUGE))
    kind.add_bytes("PAX record of no length", member("x", tarfile.XHDTYPE, 12) + padded(b"0 path=a.jpg") + bytes(1024))
    kind.add_bytes("PAX record of 5000 digits", member("x", tarfile.XHDTYPE, 5008) + padded(DIGITS + b" path=a") * 2)
    kind.add_bytes(
        "PAX size of 1000 digits", member("x", tarfile.XHDTYPE, 1010) + padded(b"1010 size=%s\n" % DIGITS[:999])
    )
    kind.add_bytes("many PAX headers", member("x", tarfile.XHDTYPE) * 50_000)
    kind.add_bytes("sparse", member("a.jpg", tarfile.GNUTYPE_SPARSE, 512) + bytes(2048))
    kind.add_bytes(
        "link to a file of the system", member("a.jpg", tarfile.SYMTYPE, linkname="/etc/passwd") + bytes(1024)
    )
    kind.add_bytes("hard link", member("a.jpg", tarfile.LNKTYPE, linkname="/etc/passwd") + bytes(1024))
    kind.add_bytes("device", member("a.jpg", tarfile.CHRTYPE, devmajor=1, devminor=5) + bytes(1024))
    kind.add_bytes("many folders", b"".join([member("d/" * 20, tarfile.DIRTYPE)] * 50_000))
    kind.add("label of 5000 digits", labeled(DIGITS, "cls"))
    kind.add("label of no text", labeled(b"\xff\xfe\0\0", "cls"))
    json_label = Kind("label in a tar", lambda path: open_tar(path, "json:id"), DataError, file="shard.tar")
    json_label.add("nested", labeled(b"[" * DEEP))
    json_label.add("nested value", labeled(b'{"id": ' + b"[" * DEEP + b"]" * DEEP + b"}"))
    json_label.add("number of 5000 digits", labeled(b'{"id": ' + DIGITS + b"}"))
    json_label.add("infinite", labeled(b'{"id": Infinity}'))
    json_label.add("half a character", labeled(b'{"id": "\\ud800"}'))
    return [*kind.cases, *json_label.cases, *harmless_cases(), *index_cases()]


def harmless_cases() -> list[Case]:
    """What is read, but for samples that are not there in full."""

    def open_harmless(path: Path) -> object:
        found = Tar(path, label="none")
        names, images = [found.name(index) for index in range(len(found))], found.read(np.arange(len(found)))
        assert all(name.isprintable() and name.startswith("shard.tar::") for name in names), names
        assert all(isinstance(image, UnreadableFileError) or image.tobytes() == b"image" for image in images)
        return len(found)

    kind = Kind("names in a tar", open_harmless, None, file="shard.tar")
    odd = ("../../../etc/cron.d/a.jpg", "/etc/passwd.jpg", "a\nb\x1b[2J.jpg", "\u202egpj.b.jpg", "n" * 5000 + ".jpg")
    for name in odd:
        kind.add(ascii(name)[:30], lambda path, name=name: write_tar(path, {name: b"image"}))
    good = member("a.jpg", size=5) + padded(b"image")
    kind.add_bytes("then 2**60 bytes", good + member("b.jpg", size=2**60) + bytes(100))
    kind.add_bytes("then a file of 64 GB", good + member("b.jpg", size=HUGE) + bytes(10**6))
    return kind.cases


def index_cases() -> list[Case]:
    """Index files of DALI's beside a good shard, which are then not used."""

    def around(folder: Path) -> None:
        write_tar(folder / "shard.tar", {"a.jpg": b"image", "a.cls": b"3"})

    def open_again(path: Path) -> object:
        found = Tar(path)
        assert found.labels is not None and found.labels.tolist() == [3]
        assert [image.tobytes() for image in found.read(np.arange(1))] == [b"image"]
        return "the shard"

    kind = Kind("index of a shard", open_again, None, file="shard.idx", around=around, target="shard.tar")
    kind.add_special()
    kind.add_bytes("zeros", bytes(10**6))
    kind.add_bytes("number of 5000 digits", b"v1.2 1\njpg " + DIGITS + b" 5 a.jpg\n")
    kind.add_bytes("count of 5000 digits", b"v1.2 " + DIGITS + b"\n")
    kind.add_bytes("place beyond the shard", b"v1.2 1\njpg 4611686018427387904 5 a.jpg cls 1536 1 a.cls\n")
    kind.add_bytes("line of a million files", b"v1.2 1\n" + b"jpg 512 5 a.jpg " * 60_000 + b"\n")
    return kind.cases


def cases(good: Path) -> list[Case]:
    return shard_cases()
