"""CIFAR-10 and CIFAR-100 as published by their authors: binary or Python version, packed or unpacked."""

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.files import open_regular
from kd_pipeline._core.suggestions import first_few
from kd_pipeline.data.sources.containers import user_path
from kd_pipeline.data.sources.pixels.arrays import Arrays
from kd_pipeline.data.sources.pixels.download import fetch_file
from kd_pipeline.data.sources.pixels.safe_pickle import Call, read_pickle
from kd_pipeline.errors import DataError

__all__ = ["Cifar"]

Split = Literal["train", "test"]

_SITE = "https://www.cs.toronto.edu/~kriz/"
_BLOCK = 2**20
_MAX_UNPACKED = 2**28
"""Bytes of an archive's content; the versions of both datasets have some 186 million."""
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
"""Kinds of members that have none, whatever size their header claims."""
_NUM_IMAGES: Mapping[Split, int] = {"train": 50_000, "test": 10_000}
_NUM_CLASSES = {"label": 10, "fine_label": 100, "coarse_label": 20}
"""By kind of label, as the files name it."""
_PIXELS = 3 * 32 * 32
_NUMPY = frozenset({("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")})
"""What a pickled array of pixels is made with."""


class Cifar(Arrays):
    """CIFAR-10 or CIFAR-100, held in memory as one uint8 array `[N, 32, 32, 3]` with the authors' class names.

    Files are read from `root`, from the archive's folder below it, or directly from the archive; the binary version is
    preferred over the Python one. Pickles are never executed, and archives never unpacked to disk.

    Args:
        dataset: "cifar10" or "cifar100".
        root: the folder, or the archive itself.
        split: 50,000 training images, or 10,000 test images.
        labels: the 100 fine or the 20 coarse classes of CIFAR-100.
        download: fetch the binary archive into `root` if `root` has no version of the dataset.

    Raises:
        DataError: the dataset is missing or cannot be downloaded, or one of its files is damaged.
    """

    def __init__(
        self,
        dataset: Literal["cifar10", "cifar100"],
        root: str | os.PathLike[str],
        *,
        split: Split,
        labels: Literal["fine", "coarse"] = "fine",
        download: bool = False,
    ) -> None:
        version, self._place = _find(dataset, user_path(root), download=download)
        self._files = version.files[split]
        self._num_per_file = _NUM_IMAGES[split] // len(self._files)
        label = "label" if dataset == "cifar10" else f"{labels}_label"
        images = np.empty((_NUM_IMAGES[split], 32, 32, 3), dtype=np.uint8)
        targets = np.empty(_NUM_IMAGES[split], dtype=np.int64)
        names = version.names.format(label=label)
        classes: list[str] = []
        try:
            for name, file in _opened(self._place, version, (*self._files, names)):
                where = f"{self._place}/{name}"
                if name == names:
                    classes = _checked_names(version.read_names(file, where, label), where, _NUM_CLASSES[label])
                    continue
                pixels, found = version.read_images(file, where, label, self._num_per_file)
                start = self._files.index(name) * self._num_per_file
                part = slice(start, start + self._num_per_file)
                images[part] = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                targets[part] = _checked_labels(found, where, _NUM_CLASSES[label])
        except (OSError, EOFError, tarfile.TarError, zlib.error) as exc:
            reason = getattr(exc, "strerror", None) or exc
            file_name = getattr(exc, "filename", None) or self._place
            raise DataError(f"{file_name}: cannot be read ({reason}); get {version.url} again") from exc
        super().__init__(images, targets, classes=classes)

    def name(self, index: int) -> str:
        """The file and the position in it, such as `data_batch_1[17]`."""
        file, row = divmod(index, self._num_per_file)
        return f"{self._place}/{self._files[file]}[{row}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """The files of a dataset in one of its two formats."""

    archive: str
    folder: str
    """The archive's top folder."""
    files: Mapping[Split, tuple[str, ...]]
    names: str
    """The file with the class names; `{label}` stands for the kind of label."""

    @property
    def url(self) -> str:
        return f"{_SITE}{self.archive}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Binary(_Version):
    """Records of one byte per kind of label and 3072 for the pixels; one line per class name."""

    labels: tuple[str, ...]
    archive_bytes: int
    archive_sha256: str
    """As TensorFlow Datasets publishes them for the authors' archive, who publish MD5 alone."""

    def read_images(self, file: IO[bytes], where: str, label: str, num: int) -> tuple[NDArray[np.uint8], list[Any]]:
        """Pixels `[num, 3072]` and labels."""
        num_bytes = num * (len(self.labels) + _PIXELS)
        raw = file.read(num_bytes + 1)
        if len(raw) != num_bytes:
            found = "more" if len(raw) > num_bytes else len(raw)
            raise DataError(f"{where}: has {found} bytes, expected {num_bytes} for {num} images; get {self.url} again")
        records = np.frombuffer(raw, dtype=np.uint8).reshape(num, -1)
        return records[:, len(self.labels) :], records[:, self.labels.index(label)].tolist()

    def read_names(self, file: IO[bytes], where: str, label: str) -> list[Any]:
        """Class names as bytes."""
        return [line.strip() for line in file.read(2**16).splitlines() if line.strip()]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pickled(_Version):
    """Pickled dicts of lists and an array."""

    def read_images(self, file: IO[bytes], where: str, label: str, num: int) -> tuple[NDArray[np.uint8], list[Any]]:
        """Pixels `[num, 3072]` and labels."""
        content = read_pickle(file, where, functions=_NUMPY)
        labels = content.get(f"{label}s".encode()) if isinstance(content, dict) else None
        match content:
            case {
                b"data": Call(state=(_, (int(rows), int(columns)), Call(arguments=(b"u1", *_)), is_fortran, bytes(raw)))
            } if columns == _PIXELS and len(raw) == rows * columns and isinstance(labels, list):
                if not rows == len(labels) == num:
                    raise DataError(
                        f"{where}: has {rows} images and {len(labels)} labels, expected {num}; get {self.url} again"
                    )
                order: Literal["C", "F"] = "F" if is_fortran else "C"
                return np.frombuffer(raw, dtype=np.uint8).reshape(rows, columns, order=order), labels
        raise DataError(
            f"{where}: has no uint8 array data [{num}, {_PIXELS}] with a list {label}s; get {self.url} again"
        )

    def read_names(self, file: IO[bytes], where: str, label: str) -> list[Any]:
        """Class names as bytes."""
        match read_pickle(file, where, functions=()):
            case {**content} if isinstance(names := content.get(f"{label}_names".encode()), list):
                return names
        raise DataError(f"{where}: has no list called {label}_names; get {self.url} again")


_VERSIONS: Mapping[str, tuple[_Binary, _Pickled]] = {
    "cifar10": (
        _Binary(
            archive="cifar-10-binary.tar.gz",
            folder="cifar-10-batches-bin",
            files={"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)},
            names="batches.meta.txt",
            labels=("label",),
            archive_bytes=170_052_171,
            archive_sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
        _Pickled(
            archive="cifar-10-python.tar.gz",
            folder="cifar-10-batches-py",
            files={"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "test": ("test_batch",)},
            names="batches.meta",
        ),
    ),
    "cifar100": (
        _Binary(
            archive="cifar-100-binary.tar.gz",
            folder="cifar-100-binary",
            files={"train": ("train.bin",), "test": ("test.bin",)},
            names="{label}_names.txt",
            labels=("coarse_label", "fine_label"),
            archive_bytes=168_513_733,
            archive_sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
        _Pickled(
            archive="cifar-100-python.tar.gz",
            folder="cifar-100-python",
            files={"train": ("train",), "test": ("test",)},
            names="meta",
        ),
    ),
}


def _find(dataset: str, root: Path, *, download: bool) -> tuple[_Binary | _Pickled, Path]:
    """The version found below `root`, and its folder or archive; a folder is faster to read."""
    versions = _VERSIONS[dataset]
    for version in versions:
        files = [name for names in version.files.values() for name in names]
        for folder in (root, root / version.folder):
            if any(os.path.isfile(folder / name) for name in files):
                return version, folder
    for version in versions:
        for archive in (root, root / version.archive):
            if archive.name == version.archive and os.path.isfile(archive):
                return version, archive
    if download:
        binary = versions[0]
        return binary, fetch_file(binary.url, root, num_bytes=binary.archive_bytes, sha256=binary.archive_sha256)
    known = first_few([name for version in versions for name in (version.folder, version.archive)])
    raise DataError(
        f"{root}: no {dataset} here, none of {known}; {_where_else(dataset, root)}put {versions[0].url} there, or set "
        "download: true"
    )


def _where_else(dataset: str, root: Path) -> str:
    """What to set if the dataset is next to `root` or below it, or if the other dataset is in it; empty if not."""
    parts = [file for file in sorted(root.glob("*")) if file.is_dir()] if os.path.isdir(root) else []
    for kind in (dataset, *_VERSIONS):
        names = [name for version in _VERSIONS[kind] for name in (version.folder, version.archive)]
        for folder in (root.parent, *parts) if kind == dataset else (root,):
            if any(os.path.exists(folder / name) for name in names):
                setting = f"root: {folder}, where it is" if kind == dataset else f"kind: {kind}, which is here"
                return f"set {setting}, or "
    return ""


def _opened(place: Path, version: _Version, wanted: tuple[str, ...]) -> Iterator[tuple[str, IO[bytes]]]:
    """The wanted files by name, in any order, from the folder or archive at `place`."""
    if os.path.isdir(place):
        for name in wanted:
            with open_regular(place / name) as file:
                yield name, file
        return
    missing = set(wanted)
    with open_regular(place) as packed, gzip.open(packed) as unpacked:
        archive = _Unpacked(unpacked, place, version.url)
        for path, size in _members(archive):
            name = path.removeprefix("./").removeprefix(f"{version.folder}/")
            if name in missing:
                missing.remove(name)
                yield name, io.BytesIO(archive.read(size))
    if missing:
        raise DataError(f"{place}: has no {first_few(sorted(missing))} in {version.folder}/; get {version.url} again")


class _Unpacked:
    """The content of an archive, as far as the datasets have any."""

    def __init__(self, file: gzip.GzipFile, place: Path, url: str) -> None:
        self._file, self._place, self._url = file, place, url
        self.position = 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end.

        Raises:
            DataError: they are more than the datasets have.
        """
        if not 0 <= size <= _MAX_UNPACKED - self.position:
            raise DataError(
                f"{self._place}: unpacks to more than {_MAX_UNPACKED} bytes, and no version of the dataset does; get "
                f"{self._url} again"
            )
        content = self._file.read(size)
        self.position += len(content)
        return content


def _members(archive: _Unpacked) -> Iterator[tuple[str, int]]:
    """Path and size of each regular file in a tar archive, whose content may then be read, in the archive's order.

    Of the format it takes the plain headers alone. The module tarfile also reads extensions, which can be of any size.
    """
    while (head := archive.read(tarfile.BLOCKSIZE)).strip(b"\0"):
        member = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
        size = 0 if member.type in _WITHOUT_CONTENT else member.size
        end = archive.position + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield member.name, size
        while archive.position < end and archive.read(min(end - archive.position, _BLOCK)):
            pass
    while archive.read(_BLOCK):  # to the end, which verifies the checksum
        pass


def _checked_names(names: list[Any], where: str, num_classes: int) -> list[str]:
    if len(names) != num_classes or not all(isinstance(name, bytes) for name in names):
        raise DataError(f"{where}: has {len(names)} class names, expected {num_classes} texts; get the file again")
    return [name.decode("latin-1") for name in names]


def _checked_labels(labels: list[Any], where: str, num_classes: int) -> list[int]:
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < num_classes:
            found = label if type(label) is int else f"of type {type(label).__name__}"
            raise DataError(f"{where}[{row}]: the label {found} is not a class index from 0 to {num_classes - 1}")
    return labels
