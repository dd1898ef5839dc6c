"""Tar shards for tests, written by Python's tarfile."""

import io
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["folder_as_shards", "write_tar"]


def write_tar(
    path: Path,
    files: Mapping[str, bytes] | Iterable[tuple[str, bytes]],
    *,
    format: int = tarfile.GNU_FORMAT,
    headers: Mapping[str, str] | None = None,
) -> Path:
    """An archive of files; `headers` are PAX records of all of them."""
    with tarfile.open(path, "w", format=format, errors="surrogateescape") as archive:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), dict(headers or {})
            archive.addfile(member, io.BytesIO(content))
    return path


def folder_as_shards(root: Path, shards: Path, *, per_shard: int, label: str = "cls") -> str:
    """The images of class folders as samples `CLASS/NAME.jpg` of numbered shards, in the folder's order.

    Args:
        root: the class folders.
        shards: an empty folder for the shards.
        per_shard: samples in each shard.
        label: `cls` for files with the index, `txt` for files with the name, or `folder` for neither.

    Returns:
        A pattern of the shards.
    """
    classes = sorted(os.listdir(root))
    images = [path for name in classes for path in sorted((root / name).iterdir())]
    for number, start in enumerate(range(0, len(images), per_shard)):
        files = {}
        for path in images[start : start + per_shard]:
            name = path.parent.name
            files[f"{name}/{path.name}"] = path.read_bytes()
            if label != "folder":
                content = str(classes.index(name)) if label == "cls" else name
                files[f"{name}/{path.stem}.{label}"] = f"{content}\n".encode()
        write_tar(shards / f"train-{number:04}.tar", files)
    return str(shards / "train-*.tar")
