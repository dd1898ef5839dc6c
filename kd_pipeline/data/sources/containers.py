"""Archives, tables and databases of images: what a path is, and what reads it or how to convert it."""

import os
import shlex
from pathlib import Path
from typing import NamedTuple

from kd_pipeline._core.paths import Url, local_path, path_or_url
from kd_pipeline.errors import DataError

__all__ = ["find_container", "how_to_convert", "user_location", "user_path"]

_TAR = "a tar archive"
_COMPRESSED_TAR = "a compressed tar archive"
_ZIP = "a ZIP archive"
_PARQUET = "a Parquet file"
_ARROW = "an Arrow file"
_DATABASE = "a database"
_SPREADSHEET = "a spreadsheet"
_COMPRESSED = "a compressed file"
_POINTER = "a pointer of git-lfs"

_KINDS = {
    ".tar": _TAR,
    **dict.fromkeys((".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tar.xz", ".txz", ".tar.zst"), _COMPRESSED_TAR),
    ".zip": _ZIP,
    **dict.fromkeys((".7z", ".rar"), "an archive"),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst"), _COMPRESSED),
    **dict.fromkeys((".parquet", ".parq"), _PARQUET),
    **dict.fromkeys((".arrow", ".feather"), _ARROW),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), _SPREADSHEET),
    **dict.fromkeys((".lmdb", ".mdb", ".h5", ".hdf5", ".tfrecord", ".tfrecords", ".rec", ".beton", ".mds"), _DATABASE),
    **dict.fromkeys((".mat", ".pkl", ".pickle", ".pt", ".pth"), "a file of Python or MATLAB objects"),
}
"""What a file is, by the end of its name."""
_MAGIC = (
    (0, b"PK\x03\x04", _ZIP),
    (0, b"\x1f\x8b", _COMPRESSED),
    (0, b"BZh", _COMPRESSED),
    (0, b"\xfd7zXZ\0", _COMPRESSED),
    (0, b"\x28\xb5\x2f\xfd", _COMPRESSED),
    (0, b"7z\xbc\xaf\x27\x1c", "an archive"),
    (0, b"Rar!", "an archive"),
    (257, b"ustar", _TAR),
    (0, b"PAR1", _PARQUET),
    (0, b"ARROW1", _ARROW),
    (0, b"\x89HDF", _DATABASE),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"version https://git-lfs", _POINTER),
    (0, b"\xff\xd8\xff", "an image"),
    (0, b"\x89PNG", "an image"),
)
"""Offset and bytes at the start of a file."""
_ADVICE = {
    _TAR: "take kind: tar with path: {path}",
    _COMPRESSED_TAR: "decompress it, as with gunzip {path}, and take kind: tar with the path of the .tar file",
    _ZIP: "unpack it: unzip {path} -d FOLDER",
    "an archive": "unpack it: 7z x {path} -oFOLDER",
    _COMPRESSED: "decompress it first",
    _POINTER: "fetch the file itself: git lfs pull",
    _PARQUET: "take kind: parquet with path: {path}",
    _ARROW: "take kind: huggingface for the folder that Dataset.save_to_disk has written, or write it as Parquet",
    _SPREADSHEET: "save it as CSV with the columns path and label",
    "a NumPy array": "take kind: arrays for an array of images",
    "an image": "write its path into a list, or take kind: image_folder for its folder",
}
_WRITE_FILES = (
    "write its images to files, one folder for each class for kind: image_folder, or with a list of path,label for "
    "kind: file_list"
)


class Container(NamedTuple):
    """A file that holds images or a list, and is neither an image nor a list."""

    kind: str
    """Such as "a tar archive"."""
    advice: str
    """How to convert it."""


def find_container(path: str | os.PathLike[str], content: bytes = b"") -> Container | None:
    """What the file `path` is by its name, or by its first bytes `content`; None if it may be a list or an image."""
    name = os.path.basename(os.fspath(path)).lower()
    kind = next((kind for ending, kind in _KINDS.items() if name.endswith(ending)), None)
    if kind in (None, _COMPRESSED):
        found = (kind for offset, magic, kind in _MAGIC if content[offset : offset + len(magic)] == magic)
        kind = next(found, kind)
    return None if kind is None else Container(kind, how_to_convert(kind, path))


def how_to_convert(kind: str, path: str | os.PathLike[str]) -> str:
    """What to do with a file that is `kind`, or with a pattern of such files."""
    return _ADVICE.get(kind, _WRITE_FILES).format(path=shlex.quote(os.fspath(path)))


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path of a source's folder or file with `~` expanded, relative if it was.

    Raises:
        DataError: it is empty or a URL, or has a variable such as `$DATA` in it.
    """
    try:
        return local_path(path)
    except ValueError as exc:
        raise DataError(str(exc)) from None


def user_location(path: str | os.PathLike[str]) -> Path | Url:
    """`user_path` where a URL may be too, which stays as it is.

    Raises:
        DataError: it is empty, a URL of a local file or without a host, or has a variable such as `$DATA` in it.
    """
    try:
        return path_or_url(path)
    except ValueError as exc:
        raise DataError(str(exc)) from None
