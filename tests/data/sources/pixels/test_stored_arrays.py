"""Arrays in files that somebody else made: no claim of a header takes memory, and no file ends the process."""

import os
import re
import shlex
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.data.sources import Arrays
from kd_pipeline.data.sources.pixels import stored_arrays
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import DataError
from kd_pipeline.loader import KDDataLoader
from tests.data.sources.helpers import error_of

PIXELS = bytes(range(16))
SHAPE = (4, 2, 2)


def npy(
    shape: tuple[object, ...],
    descr: object = "|u1",
    body: bytes = PIXELS,
    *,
    is_fortran: bool = False,
    version: int = 1,
) -> bytes:
    header = f"{{'descr': {descr!r}, 'fortran_order': {is_fortran}, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(header)) + header + body


def with_header(header: bytes, claimed: int | None = None, version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header) if claimed is None else claimed)
    return b"\x93NUMPY" + bytes([version, 0]) + length + header


def npz(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What the test does takes less than 8 MiB."""
    tracemalloc.start()
    yield
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**23


BAD = {
    "promises too much": (npy((2**44, 8, 8, 3)), "it has 144 bytes, and its header promises"),
    "more than an int64": (npy((2**70, 8, 8)), "and its header promises"),
    "negative": (npy((-4, 2, 2)), "its header has the shape (-4, 2, 2)"),
    "bool": (npy((True, 4, 4)), "its header has the shape (True, 4, 4)"),
    "text": (npy(("4", 2, 2)), "its header is damaged"),
    "many dimensions": (npy((1,) * 33), "its header has the shape (1, 1,"),
    "objects": (npy(SHAPE, "|O", bytes(128)), "or it contains Python objects"),
    "fields": (npy(SHAPE, [("r", "u1")]), "expected uint8 images [N, H, W]"),
    "nothing per element": (npy((2**40, 2, 2), "|S0", b""), "expected uint8 images [N, H, W]"),
    "no such type": (npy(SHAPE, "\x1b]0;evil\x07"), "its header is damaged"),
    "version 3": (npy(SHAPE, version=3), "plain arrays have no version (3, 0)"),
    "header of 4 GiB": (with_header(b"", 2**32 - 1, version=2), "its header is damaged: EOF"),
    "header of brackets": (with_header(b"(" * 3000 + b"\n"), "its header is damaged"),
    "header of signs": (with_header(b"-" * 8999 + b"\n"), "its header is damaged"),
    "huge image": (npy((1, 2**20, 2**20)), "promises"),
}


@pytest.mark.parametrize(("content", "words"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("end", ["npy", "npz"])
def test_lying_header_is_refused_without_taking_memory(tmp_path, little_memory, content, words, end):
    path = tmp_path / f"images.{end}"
    if end == "npy":
        path.write_bytes(content)
        os.truncate(path, max(len(content), 2**40 if "GiB" in str(words) else 0))
    else:
        npz(path, [("images.npy", content)])
        words = re.sub("it has 144 bytes, and its", "'images.npy' has 144 bytes, and the", words)
        words = words.replace("and its header promises", "and the header promises")
    message = error_of(Arrays, path)
    assert message.startswith(f"{path}: ") and words in message and "\x1b" not in message and len(message) < 1000


def sparse(path: Path, content: bytes, size: int) -> Path:
    path.write_bytes(content)
    os.truncate(path, size)
    return path


def test_sparse_files_are_refused_without_taking_memory(tmp_path, little_memory):
    """They have a terabyte and take no space on a disk."""
    terabyte = 2**40
    many = sparse(tmp_path / "many.npy", npy((terabyte, 1, 1)), terabyte + 128)
    assert "many.npy: needs 8.19e+03 GiB of memory, more than half of the" in error_of(Arrays, many)
    wide = sparse(tmp_path / "wide.npy", npy((1, 2**20, 2**20)), terabyte + 128)
    assert "images of 1048576 x 1048576 are larger than 134217728 pixels; resize them" in error_of(Arrays, wide)
    columns = sparse(tmp_path / "columns.npy", npy((2**20, 2**10, 2**10), is_fortran=True), terabyte + 128)
    assert "GiB that are free; np.save(NEW, np.ascontiguousarray(" in error_of(Arrays, columns)
    labels = sparse(tmp_path / "labels.npy", npy((2**37,), "<i8"), terabyte + 128)
    assert "found int64 [137438953472]" in error_of(Arrays, np.zeros(SHAPE, np.uint8), labels)


def test_large_array_on_disk_takes_no_memory(tmp_path, little_memory):
    source = Arrays(sparse(tmp_path / "images.npy", npy((2**24, 2**8, 2**8)), 2**40 + 128))
    assert len(source) == 2**24 and source.read(np.array([2**24 - 1, 0]))[:, 0, 1, 0].tolist() == [0, PIXELS[1]]


def bomb(path: Path, num: int) -> Path:
    """`num` black images of a MiB, which are packed into a KiB each."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("images.npy", "w") as member:
        member.write(npy((num, 2**10, 2**10), body=b""))
        for _ in range(num):
            member.write(bytes(2**20))
    return path


def test_npz_that_fills_a_memory_is_refused(tmp_path, little_memory, monkeypatch):
    monkeypatch.setattr(stored_arrays, "_ALWAYS_UNPACKED", 2**21)
    path = bomb(tmp_path / "bomb.npz", 20)
    assert path.stat().st_size < 2**15
    expected = f"to {20 * 2**20}, more than 100 times as many, as archives do that are made to fill a memory"
    assert expected in error_of(Arrays, path)
    assert len(Arrays(bomb(tmp_path / "small.npz", 2))) == 2, "a small data set may be black"


def test_advice_about_a_refused_npz_works(tmp_path, pixels, monkeypatch):
    monkeypatch.setattr(stored_arrays, "_ALWAYS_UNPACKED", 0)
    np.savez_compressed(tmp_path / "a b.npz", images=np.zeros((9, 64, 64), np.uint8))
    message = error_of(Arrays, tmp_path / "a b.npz")
    command, archive, member = shlex.split(message.rpartition(": ")[2])
    assert command == "unzip"
    zipfile.ZipFile(archive).extract(member, tmp_path)
    assert len(Arrays(tmp_path / member)) == 9
    np.savez_compressed(tmp_path / "noise.npz", images=pixels)
    assert len(Arrays(tmp_path / "noise.npz")) == 7


def test_advice_about_an_array_larger_than_the_memory_works(tmp_path, pixels, monkeypatch):
    monkeypatch.setattr(stored_arrays, "_free_memory", lambda: 2 * pixels.nbytes - 1)
    np.savez(tmp_path / "images.npz", images=pixels)
    assert "more than half of the" in error_of(Arrays, tmp_path / "images.npz")
    np.save(tmp_path / "fortran.npy", np.asfortranarray(pixels))
    code = error_of(Arrays, tmp_path / "fortran.npy").rpartition("; ")[2].partition(" writes")[0]
    eval(code, {"np": np, "OLD": tmp_path / "fortran.npy", "NEW": tmp_path / "new.npy"})
    assert np.array_equal(Arrays(tmp_path / "new.npy").read(np.arange(7)), pixels)


@pytest.mark.parametrize(
    "limit", [("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory")]
)
def test_free_memory_is_that_of_machine_and_container(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(stored_arrays, "_CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:    4 kB\n")
    monkeypatch.setattr(stored_arrays, "_MEMINFO", tmp_path / "meminfo")
    assert stored_arrays._free_memory() == 4096
    most, used, folder = limit
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / most).write_text("3000\n")
    (tmp_path / folder / used).write_text("1500\n")
    (tmp_path / folder / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    assert stored_arrays._free_memory() == 2000
    (tmp_path / folder / most).write_text("max\n")
    assert stored_arrays._free_memory() == 4096


def patched(content: bytes, marker: bytes, at: int, new: bytes) -> bytes:
    """`content` with other bytes, `at` bytes after the marker."""
    start = content.index(marker) + at
    return content[:start] + new + content[start + len(new) :]


CENTRAL, END = b"PK\x01\x02", b"PK\x05\x06"
TRICKS = {
    "encrypted": (lambda zipped: patched(zipped, CENTRAL, 8, b"\1"), "is encrypted or compressed as no np.savez"),
    "size in the directory": (lambda zipped: patched(zipped, CENTRAL, 24, b"\xfe\xff\xff\xff"), "has 4294967294 bytes"),
    "size of the directory": (lambda zipped: patched(zipped, END, 12, b"\0\0\0\x80"), "directory"),
    "start of the member": (lambda zipped: patched(zipped, CENTRAL, 42, b"\x09\0\0\0"), ""),
    "changed pixel": (lambda zipped: patched(zipped, b"\x05\x06\x07\x08", 0, b"\6"), "Bad CRC-32"),
    "cut off": (lambda zipped: zipped[:-30], ""),
}  # fmt: skip


@pytest.mark.parametrize(("trick", "words"), TRICKS.values(), ids=TRICKS)
def test_trick_of_a_zip_is_refused(tmp_path, little_memory, trick, words):
    path = npz(tmp_path / "images.npz", [("images.npy", npy(SHAPE))], zipfile.ZIP_STORED)
    assert len(Arrays(path)) == 4
    path.write_bytes(trick(path.read_bytes()))
    message = error_of(Arrays, path)
    assert message.startswith(f"{path}: cannot be read as an .npy or .npz file") and words in message


def test_same_name_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = npz(tmp_path / "images.npz", [("images.npy", npy(SHAPE)), ("images.npy", npy((2, 2, 4)))])
    assert "it has 'images' more than once" in error_of(Arrays, path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_ways_to_pack_that_unpack_without_limit_are_refused(tmp_path, method):
    path = npz(tmp_path / "images.npz", [("images.npy", npy(SHAPE))], method)
    assert "compressed as no np.savez does it" in error_of(Arrays, path)


def test_only_the_wanted_arrays_are_read(tmp_path, little_memory):
    members = [("../../evil.npy", npy((2**44,))), ("/evil", b"no array"), ("images.npy", npy(SHAPE))]
    members += [(f"{number}.npy", b"") for number in range(300)]
    (tmp_path / "a/b").mkdir(parents=True)
    path = npz(tmp_path / "a/b/images.npz", members)
    source = Arrays(path)
    assert source.read(np.arange(4))[..., 0].tobytes() == PIXELS
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a/b", tmp_path / "a/b/images.npz"]
    path = npz(tmp_path / "none.npz", [(f"\x1b{number}.npy", b"") for number in range(300)])
    message = error_of(Arrays, path)
    assert "and 290 more]" in message and "\x1b" not in message


def test_damaged_arrays_are_read_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "fuzzed"
    originals = (npy(SHAPE), npz(tmp_path / "images.npz", [("images.npy", npy(SHAPE))]).read_bytes())
    num_refused = 0
    for content in originals:
        for _ in range(150):
            damaged = bytearray(content)
            damaged[rng.integers(len(damaged))] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                Arrays(path)
            except DataError as exc:
                assert str(exc).startswith(str(path))
                num_refused += 1
    assert 50 < num_refused < 300


def test_rows_equal_those_of_memory_in_any_order(tmp_path, pixels):
    np.save(tmp_path / "images.npy", pixels)
    source = Arrays(tmp_path / "images.npy")
    for index in ([0, 1, 2, 3, 4, 5, 6], [6, 5, 5, 6], [3], [], [1, 2, 5, 6, 0]):
        rows = source.read(np.array(index, dtype=np.int64))
        assert np.array_equal(rows, pixels[index]) and rows.flags.writeable


def num_open_below(folder):
    """Descriptors of this process for files below `folder`, which may have been replaced."""
    links = Path("/proc/self/fd").iterdir()
    return sum(os.path.realpath(link).startswith(f"{folder}/") for link in links)


def test_file_stays_open_and_is_closed_with_its_source(tmp_path, pixels):
    np.save(tmp_path / "images.npy", pixels)
    np.savez(tmp_path / "images.npz", images=pixels)
    assert num_open_below(tmp_path) == 0
    sources = [Arrays(tmp_path / "images.npy"), Arrays(tmp_path / "images.npz")]
    assert num_open_below(tmp_path) > 0
    np.save(tmp_path / "new.npy", pixels[::-1])
    (tmp_path / "new.npy").replace(tmp_path / "images.npy")
    assert all(np.array_equal(source.read(np.arange(7)), pixels) for source in sources), "not the file that replaced it"
    del sources
    assert num_open_below(tmp_path) == 0


def test_file_cut_off_while_in_use_is_one_error(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (4000, 8, 8, 3), dtype=np.uint8))
    source = Arrays(path)
    with KDDataLoader(source, EvalTransform(size=8), batch_size=4, device="cpu", shuffle=False) as loader:
        batches = iter(loader)
        next(batches)
        os.truncate(path, 1000)
        with pytest.raises(DataError, match=re.escape(f"{path}: it was cut off while it was in use, to 1000 bytes")):
            list(batches)
    assert "write it again, and resume the run" in error_of(source.read, np.array([3999]))
    with pytest.raises(DataError, match="it was cut off"):
        assert source.fingerprint
