"""Hostile data: arrays, class names, lists, their indexes, folders of images, CIFAR."""

import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources import Arrays, BaseSource, Cifar, FileList, ImageFolder, Masks, MaskSettings
from kd_pipeline.data.sources.labels import load_classes
from kd_pipeline.errors import DataError
from tests import cifar_files
from tests.corpus import png_of_zeros
from tests.hostile.cases import DEEP, HUGE, SPECIAL, Case, Code, Kind, remove, write_zip
from tests.hostile.prepare import BOMB, NUM_PHOTOS, photo

DIGITS = "9" * 5000
"""More digits than Python turns into a number."""


def npy(header: str, body: bytes = b"") -> bytes:
    """An `.npy` file with any header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + body


def header(shape: str, dtype: str = "'|u1'") -> str:
    """The header of an array."""
    return f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}"


def open_arrays(path: Path) -> object:
    arrays = Arrays(path)
    return arrays.read(np.arange(min(len(arrays), 8)))


def open_labels(path: Path) -> object:
    return Arrays(np.zeros((3, 4, 4), np.uint8), path).labels


def read_cut_off(path: Path) -> object:
    """Read images after somebody has cut off the file of the open arrays."""
    arrays = Arrays(path)
    os.truncate(path, 4096)
    return arrays.read(np.arange(1000, 1100))


def open_list(path: Path) -> object:
    found = FileList(path)
    return found.name(0), found.classes, found.labels


def write_npz(path: Path, **members: bytes) -> None:
    """An `.npz` of `.npy` files as they are."""
    write_zip(path, [(f"{name}.npy", [content]) for name, content in members.items()], compress=False)


def patched(content: bytes, local: int, central: int, value: int) -> bytes:
    """A ZIP archive with a byte changed in both headers of its first member."""
    data = bytearray(content)
    data[data.index(b"PK\x03\x04") + local] = value
    data[data.index(b"PK\x01\x02") + central] = value
    return bytes(data)


def objects(folder: Path) -> bytes:
    """An array of objects, which is a pickle."""
    return npy(header("(1,)", "'|O'"), pickle.dumps([Code(folder)], protocol=2))


def array_cases(good: Path) -> list[Case]:
    small = io.BytesIO()
    np.savez(small, images=np.zeros((3, 4, 4), np.uint8))
    arrays = Kind("npy", open_arrays, DataError, file="images.npy")
    arrays.add_special()
    arrays.add("runs code", lambda path: path.write_bytes(objects(path.parent)))
    arrays.add("plain pickle", lambda path: path.write_bytes(pickle.dumps(Code(path.parent))))
    arrays.add_bytes("negative shape", npy(header("(-1, 4, 4)"), bytes(64)))
    arrays.add_bytes("shape that overflows", npy(header(f"({2**62}, 4, 4)"), bytes(64)))
    arrays.add_bytes("shape of 5000 digits", npy(header(f"({DIGITS}, 4, 4)"), bytes(64)))
    arrays.add_bytes("shape of text", npy(header("'abc'"), bytes(64)))
    arrays.add_bytes("cut off", npy(header("(1000, 4, 4)"), bytes(64)))
    arrays.add_bytes("call in the header", npy("__import__('os').mkdir('MARKER')", bytes(64)))
    arrays.add_bytes("nested header", npy("(" * 9000))
    arrays.add_bytes("nested lists in the header", npy("[" * 150 + "]" * 150))
    arrays.add_bytes("header of 2 GB", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{")
    arrays.add_bytes("elements of 2 GB", npy(header("(1,)", "'S2000000000'"), bytes(64)))
    arrays.add_bytes("unknown dtype", npy(header("(1,)", "'load'"), bytes(64)))
    fields = "[" + ", ".join(f"('f{number}', '<f4')" for number in range(20_000)) + "]"
    arrays.add_bytes("many fields", npy(header("(1,)", fields), bytes(64)))
    arrays.add("cut off while open", lambda path: np.save(path, np.ones((2000, 40, 40), np.uint8)), open=read_cut_off)

    npz = Kind("npz", open_arrays, DataError, file="images.npz")
    npz.add("bomb", lambda path: os.link(good / f"{BOMB}.npz", path))
    npz.add("bomb of labels", lambda path: os.link(good / f"{BOMB}.npz", path), open=open_labels)
    npz.add("2**44 images", lambda path: write_npz(path, images=npy(header(f"({2**44}, 4, 4)"), bytes(64))))
    npz.add("negative shape", lambda path: write_npz(path, images=npy(header("(-1, 4, 4)"), bytes(64))))
    npz.add("runs code", lambda path: write_npz(path, images=objects(path.parent)))
    npz.add("no NumPy file", lambda path: write_npz(path, images=b"not an array"))
    npz.add("nested header", lambda path: write_npz(path, images=npy("(" * 9000)))
    npz.add_bytes("cut off", small.getvalue()[:-40])
    npz.add_bytes("wrong checksum", small.getvalue().replace(bytes(20), b"\1" * 20, 1))
    npz.add_bytes("encrypted", patched(small.getvalue(), 6, 8, 1))
    npz.add_bytes("unknown compression", patched(small.getvalue(), 8, 10, 99))
    npz.add("no arrays", lambda path: write_zip(path, []))
    return [*arrays.cases, *npz.cases]


def open_mask(path: Path) -> object:
    """Read a mask, of which an unreadable one is a value."""
    (mask,) = Masks(BaseSource([path]), MaskSettings(num_classes=19)).read(np.zeros(1, np.int64))
    if isinstance(mask, UnreadableFileError):
        raise DataError(str(mask))
    return mask.shape


def mask_cases() -> list[Case]:
    start, end = b"\x89PNG\r\n\x1a\n", png_chunk(b"IEND", b"")
    first = png_chunk(b"IHDR", (4).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0")
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(20)))
    bomb = zlib.compress(bytes(2 * 10**8))

    png = Kind("mask.png", open_mask, DataError, file="mask.png")
    png.add_special("endless device")  # its path is resolved
    png.add_bytes("2**31 rows", start + png_chunk(b"IHDR", b"\x7f\xff\xff\xff" * 2 + b"\x08\0\0\0\0") + pixels + end)
    png.add_bytes("another header", start + first + png_chunk(b"IHDR", b"\0\0\x7f\xff" * 2 + b"\x08\0\0\0\0") + pixels)
    png.add_bytes("many chunks", start + first + png_chunk(b"tEXt", b"") * 2 * 10**6 + pixels + end)
    png.add_bytes("more pixels than promised", start + first + png_chunk(b"IDAT", bomb) + end, error=None)
    png.add_bytes("bomb as text", start + first + png_chunk(b"zTXt", b"a\0\0" + bomb) + pixels + end)
    png.add_bytes("length of 2 GB", start + first + b"\x7f\xff\xff\xffIDAT")
    png.add_bytes("as many pixels as may be", png_of_zeros(9450, 9450, channels=1), error=None)
    png.add_bytes("of 16 bits", png_of_zeros(8000, 8000, bits=16, channels=1), error=None)

    arrays = Kind("mask.npy", open_mask, DataError, file="mask.npy")
    arrays.add("runs code", lambda path: path.write_bytes(objects(path.parent)))
    arrays.add_bytes("negative shape", npy(header("(-1, 4)"), bytes(64)))
    arrays.add_bytes("shape that overflows", npy(header(f"({2**62}, 4)"), bytes(64)))
    arrays.add_bytes("shape of 5000 digits", npy(header(f"({DIGITS}, 4)"), bytes(64)))
    arrays.add_bytes("call in the header", npy("__import__('os').mkdir('MARKER')", bytes(64)))
    arrays.add_bytes("nested header", npy("(" * 9000))
    arrays.add_bytes("elements of 2 GB", npy(header("(1, 1)", "'S2000000000'"), bytes(64)))
    arrays.add_bytes("cut off", npy(header("(1000, 4000)"), bytes(64)))
    return [*png.cases, *arrays.cases]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG."""
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def class_cases() -> list[Case]:
    names = Kind("classes.json", load_classes, DataError, file="classes.json")
    names.add_special()
    names.add_nested_json("id2label")
    names.add_bytes("label of 5000 digits", f'{{"{DIGITS}": "cat"}}'.encode())
    names.add_bytes("number of 5000 digits", f'{{"cat": {DIGITS}}}'.encode())
    names.add_bytes("label 10**18", b'{"cat": 1000000000000000000}')
    names.add_bytes("not UTF-8", b'["\xff\xfe"]')
    names.add_bytes("nested name", b'["cat", ' + b"[" * 900 + b"]" * 900 + b"]")
    names.add_bytes("long name twice", b'["' + b"x" * 10**6 + b'", "' + b"x" * 10**6 + b'"]')
    names.add_bytes("escapes", b'["a\\u001b]0;title\\u0007", "a\\u001b]0;title\\u0007"]')
    text = Kind("classes.txt", load_classes, DataError, file="classes.txt")
    text.add_special()
    return [*names.cases, *text.cases]


def list_cases(good: Path) -> list[Case]:
    first = photo(good, 0)
    found = []
    for suffix in ("csv", "jsonl"):
        kind = Kind(f"list.{suffix}", open_list, DataError, file=f"list.{suffix}")
        kind.add_special()
        kind.add_bytes("not UTF-8", b"\xfa\xfb.jpg,1\n" * 10)
        kind.add_bytes("zeros", bytes(10**6))
        kind.add_bytes("line of 100 MB", b"a" * 10**8)
        found.append(kind)
    csv, jsonl = found
    csv.add_bytes("many columns", b"path," + b"a," * 10**6 + b"label\n" + b"b," * 10**6 + b"1\n")
    csv.add_bytes("open quote", b'path,label\n"' + b"a,\n" * 2 * 10**6)
    csv.add_bytes("label of 5000 digits", f"{first},{DIGITS}\n".encode())
    csv.add_bytes("label of 5000 digits after a point", f"{first},1.{DIGITS}e{DIGITS}\n".encode())
    jsonl.add_bytes("nested", b'{"path": "a.jpg", "label": ' + b"[" * DEEP + b"]" * DEEP + b"}\n")
    jsonl.add_bytes("number of 5000 digits", f'{{"path": "a.jpg", "label": {DIGITS}}}\n'.encode())
    jsonl.add_bytes("number as path", b'{"path": 7, "label": 1}\n')
    jsonl.add_bytes("list as path", b'{"path": [["a.jpg"]], "label": 1}\n')
    jsonl.add_bytes("infinite label", b'{"path": "a.jpg", "label": Infinity}\n')
    jsonl.add_bytes("half a character", b'{"path": "\\ud800.jpg", "label": 1}\n')
    lines = [f'{{"path": "{first}", "label": "x{DIGITS}{end}"}}' for end in "ab"]
    jsonl.add_bytes("classes with 5000 digits", "\n".join(lines).encode())
    return [*csv.cases, *jsonl.cases]


def index_cases(good: Path) -> list[Case]:
    """Damaged indexes, without which the list is parsed."""
    photos = [photo(good, number) for number in range(NUM_PHOTOS)]
    lines = [f"{photos[number % NUM_PHOTOS]},{number % 7}" for number in range(40_000)]

    def write_list(folder: Path) -> None:
        (folder / "list.csv").write_text("\n".join(lines) + "\n")
        FileList(folder / "list.csv")

    def open_again(path: Path) -> object:
        found = FileList(path)
        assert len(found) == len(lines)
        assert [found.name(number) for number in range(12)] == [line.partition(",")[0] for line in lines[:12]]
        assert found.labels is not None and found.labels.tolist() == [number % 7 for number in range(len(lines))]
        return "the list"

    kind = Kind("index", open_again, None, file="unused", around=write_list, target="list.csv")

    def damage(name: str, change: Callable[[Path, bytes], object]) -> None:
        def write(unused: Path) -> None:
            (index,) = (unused.parent / "cache").rglob("*.index")
            content = index.read_bytes()
            remove(index)
            change(index, content)

        kind.add(name, write)

    for name, make in SPECIAL.items():
        damage(name, lambda path, content, make=make: make(path))
    for part in (0, 1, 8, 20, 500):
        damage(f"first {part} bytes", lambda path, content, part=part: path.write_bytes(content[:part]))
    damage("cut off", lambda path, content: path.write_bytes(content[:-8]))
    damage("swapped paths", lambda path, content: path.write_bytes(content.replace(b"/00.jpg", b"/01.jpg")))
    damage("huge header", lambda path, content: path.write_bytes(with_header(content, b'{"ends": 1}', 2**62)))
    damage("no header", lambda path, content: path.write_bytes(with_header(content, b"[]")))
    damage("nested header", lambda path, content: path.write_bytes(with_header(content, b"[" * DEEP)))
    counts = b'{"ends": -8, "labels": 1e300, "blob": 8, "is_labeled": true, "classes": 5, "remarks": null}'
    damage("odd header", lambda path, content: path.write_bytes(with_header(content, counts)))
    return kind.cases


def with_header(content: bytes, text: bytes, length: int | None = None) -> bytes:
    """An index of the second version with another header, and the checksum for it."""
    body = (len(text) if length is None else length).to_bytes(8, "little") + text
    return content[:8] + zlib.crc32(body).to_bytes(8, "little") + body


def folder_cases() -> list[Case]:
    def open_folder(path: Path) -> object:
        return ImageFolder(path).classes

    def fill(folder: Path, name: str, make: Callable[[Path], object]) -> None:
        for place in ("cat", "dog"):
            (folder / place).mkdir(parents=True)
        make(folder / "cat" / name)
        (folder / "dog" / "good.jpg").write_bytes(b"")

    kind = Kind("image folder", open_folder, DataError, file="images")
    for name, make in SPECIAL.items():
        if name not in ("folder", "link to itself", "larger than memory"):
            kind.add(f"of a {name}", lambda path, make=make: fill(path, "image.jpg", make))
    for name, make in SPECIAL.items():
        if name not in ("folder", "larger than memory"):
            kind.add(f"{name} in its place", make)

    digits = Kind("class folders with 250 digits", open_folder, None, file="images")

    def make_digits(path: Path) -> None:
        for end in "ab":
            (path / ("9" * 250 + end)).mkdir(parents=True)
            (path / ("9" * 250 + end) / "a.jpg").write_bytes(b"")

    digits.add("are read", make_digits)
    return [*kind.cases, *digits.cases]


def cifar_cases() -> list[Case]:
    def open_cifar(path: Path) -> object:
        return len(Cifar("cifar10", path, split="test"))

    def around(folder: Path) -> None:
        cifar_files.write("cifar10", "python", folder / "cifar-10-batches-py")

    batch = Kind(
        "CIFAR", open_cifar, DataError, file="cifar-10-batches-py/test_batch", around=around,
        target="cifar-10-batches-py",
    )  # fmt: skip
    batch.add_special(names="cifar-10-batches-py")
    place = {"names": "cifar-10-batches-py"}
    batch.add("runs code", lambda path: path.write_bytes(pickle.dumps(Code(path.parents[1]), protocol=2)), **place)
    batch.add_bytes("nested", b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".", **place)
    batch.add_bytes("text of 2 GB", b"\x80\x02T\xff\xff\xff\x7f.", **place)
    batch.add_bytes("memo of 2**31", b"\x80\x02]r\xff\xff\xff\x7f.", **place)
    batch.add_bytes("empty dict", b"\x80\x02}.", **place)

    archive = Kind("CIFAR archive", open_cifar, DataError, file="cifar-10-python.tar.gz")
    archive.add_special("folder")
    archive.add_bytes("no archive", b"\x1f\x8b" + bytes(1000))
    archive.add("member larger than memory", write_tar_of_zeros)
    return [*batch.cases, *archive.cases]


def write_tar_of_zeros(path: Path) -> None:
    """An archive with a member that claims to be huge and is cut off."""
    info = tarfile.TarInfo("cifar-10-batches-py/test_batch")
    info.size = HUGE
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("cifar-10-batches-py/batches.meta"))
        archive.fileobj.write(info.tobuf())  # type: ignore[union-attr]


def cases(good: Path) -> list[Case]:
    found = [*array_cases(good), *mask_cases(), *class_cases(), *list_cases(good), *index_cases(good), *folder_cases()]
    return [*found, *cifar_cases()]
