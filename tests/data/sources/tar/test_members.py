"""The headers of tar archives say where files are, whoever wrote them, and nothing in them is believed."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from kd_pipeline.data.sources.tar.members import BLOCK, Member, TarError, TarMembers, is_header_of
from tests.tar_files import write_tar

LONG = "folder/" * 30 + "n" * 120 + ".jpg"
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def members_of(content: bytes, window: int = 4096) -> TarMembers:
    return TarMembers(lambda start, length: content[start : start + length], len(content), window)


def listed(content: bytes, window: int = 4096) -> list[tuple[str, bytes | None]]:
    members = members_of(content, window)
    return [(os.fsdecode(member.name), members.content(member)) for member in members]


def headers_of(content: bytes) -> list[int]:
    return [member.start - BLOCK for member in members_of(content)]


def with_field(content: bytes, place: int, start: int, field: bytes) -> bytes:
    """`content` with a field of the header at `place` changed, and its checksum right again."""
    head = bytearray(content[place : place + BLOCK])
    head[start : start + len(field)] = field
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return content[:place] + bytes(head) + content[place + BLOCK :]


@pytest.fixture
def plain(tmp_path: Path) -> bytes:
    return write_tar(tmp_path / "a.tar", {"a.jpg": b"A" * 600, "b.jpg": b"", "c.jpg": b"C" * 512}).read_bytes()


@pytest.mark.parametrize("window", [512, 4096, 2**20])
@pytest.mark.parametrize("form", FORMATS)
def test_names_and_contents_are_those_of_tarfile(tmp_path, form, window):
    files = {"a.jpg": b"A" * 700, "é.cls": b"3", "x/" * 60 + "d.jpg": b"", "e.jpg": os.urandom(9000)}
    if form != "ustar":
        files |= {LONG: b"long", "f.cls": b"4"}
    path = write_tar(tmp_path / "a.tar", files, format=FORMATS[form])
    with tarfile.open(path) as archive:
        assert [(each.name, archive.extractfile(each).read()) for each in archive] == list(files.items())
    assert listed(path.read_bytes(), window) == list(files.items())


def test_folders_links_and_devices_are_left_out(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"member{kind.decode()}.jpg")
            member.type, member.linkname, member.size = kind, "a" * 150, 0
            archive.addfile(member)
        member = tarfile.TarInfo("a.jpg")
        member.size = 2
        archive.addfile(member, io.BytesIO(b"aa"))
    members = members_of(stream.getvalue())
    assert [member.name for member in members] == [b"a.jpg"]
    assert members.links == [b"member2.jpg", b"member1.jpg", b"member6.jpg", b"member3.jpg"]


def test_size_in_binary_and_in_pax_records(plain, tmp_path):
    binary = with_field(plain, 0, 124, b"\x80" + (600).to_bytes(11, "big"))
    assert listed(binary) == listed(plain)
    # Sizes above 8 GiB do not fit into a header, which then says 0.
    path = write_tar(tmp_path / "b.tar", {"a.jpg": b"A" * 600}, format=tarfile.PAX_FORMAT, headers={"size": "600"})
    content = path.read_bytes()
    (place,) = headers_of(content)
    assert listed(with_field(content, place, 124, b"%011o\0" % 0)) == [("a.jpg", b"A" * 600)]


def test_archive_that_is_cut_off(plain):
    _, second, third = headers_of(plain)
    for length in (second, third, third + BLOCK, third + BLOCK + 100, third + 2 * BLOCK):
        members = members_of(plain[:length])
        names = [member.name for member in members]
        assert members.is_cut and names == [b"a.jpg", b"b.jpg", b"c.jpg"][: 1 + (length > second) + (length > third)]
    members = members_of(plain[: third + BLOCK + 100])
    assert [members.content(member) for member in members] == [b"A" * 600, b"", None]
    members = members_of(plain)
    assert list(members) and not members.is_cut and not members.num_ignored_bytes


def test_archives_joined_by_cat(plain):
    members = members_of(plain + plain)
    assert len(list(members)) == 3 and members.num_ignored_bytes > len(plain)


@pytest.mark.parametrize("cut", [512, 900, 1024, 1030, 1536])
def test_cut_within_a_long_name(tmp_path, cut):
    content = write_tar(tmp_path / "a.tar", {LONG: b"x" * 600}).read_bytes()
    members = members_of(content[:cut])
    assert all(members.content(member) is None for member in members) and members.is_cut


GZIP = b"\x1f\x8b" + bytes(600)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it has 0 bytes, fewer than a tar archive"),
    "little": (b"ustar", "it has 5 bytes"),
    "text": (b"a line\n" * 200, "it is no tar archive"),
    "little gzip": (GZIP[:60], "decompress it with gunzip"),
    "gzip": (GZIP, "compressed with gzip, .* decompress it with gunzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "decompress it with unzstd"),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_archive(content, reason):
    with pytest.raises(TarError, match=reason):
        list(members_of(content))


def test_damage_names_the_byte(plain):
    _, second, _ = headers_of(plain)
    flipped = bytearray(plain)
    flipped[second + 5] ^= 1
    with pytest.raises(TarError, match=f"byte {second}: there is no header where one should be"):
        list(members_of(bytes(flipped)))


SIZES: dict[str, bytes] = {
    "negative": b"-0000000001\0",
    "negative in binary": b"\xff" * 12,
    "text": b"abcdefghijk\0",
    "96 bits": b"\x80" + b"\xff" * 11,
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_size_that_is_none(plain, size):
    with pytest.raises(TarError, match="byte 0: the size of a file is"):
        list(members_of(with_field(plain, 0, 124, size)))


def test_size_beyond_the_archive_ends_it(plain):
    members = members_of(with_field(plain, 0, 124, b"\x80\0\0\0" + (2**60).to_bytes(8, "big")))
    assert list(members) == [Member(b"a.jpg", BLOCK, 2**60)] and members.is_cut


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (b"12 path=abc", "records of a PAX header are damaged"),
        (b"999999999 path=abc\n", "records of a PAX header are damaged"),
        (b"0 path=abc\n", "records of a PAX header are damaged"),
        (b"9" * 5000 + b" path=abc\n", "records of a PAX header are damaged"),
        (b"11 size=-1\n", "size of a file is '-1'"),
        (b"29 size=99999999999999999999\n", "size of a file is '9999"),
        (b"22 GNU.sparse.major=1\n", "without the option --sparse"),
    ],
)
def test_hostile_pax_records(plain, records, reason):
    head = tarfile.TarInfo("././@PaxHeader")
    head.type, head.size = tarfile.XHDTYPE, len(records)
    content = head.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // BLOCK) * BLOCK, b"\0") + plain
    with pytest.raises(TarError, match=reason):
        list(members_of(content))


def test_endless_extensions_and_sparse_files_are_refused(plain):
    for kind, size, reason in ((tarfile.XHDTYPE, 2**40, "at most"), (tarfile.GNUTYPE_SPARSE, 0, "--sparse")):
        head = tarfile.TarInfo("a.jpg")
        head.type, head.size = kind, size
        with pytest.raises(TarError, match=reason):
            list(members_of(head.tobuf(tarfile.GNU_FORMAT) + plain))


def test_header_says_its_size(plain):
    head = plain[:BLOCK]
    assert is_header_of(head, 600) and not is_header_of(head, 601) and not is_header_of(bytes(BLOCK), 0)
    assert is_header_of(with_field(plain, 0, 124, b"   1130 \0\0\0\0")[:BLOCK], 600)
    assert not is_header_of(head[:100], 600)
