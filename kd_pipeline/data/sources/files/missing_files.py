"""Looks for some files of a list, and where they are if not where they should be."""

import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kd_pipeline._core.text import printable
from kd_pipeline.data.sources.files.folder_scan import EXTENSIONS
from kd_pipeline.data.sources.files.list_file import ListFile
from kd_pipeline.data.sources.files.paths import PathTable
from kd_pipeline.data.sources.files.remote_files import RemoteFiles
from kd_pipeline.errors import DataError, shown
from kd_pipeline.storage import scheme_of

__all__ = ["check_files"]

_MAX_LOOKED_AT = 100
_MAX_REQUESTS = 16
"""Files that are looked for in stores."""
_MAX_TRIED = 5
"""Missing files that are looked for elsewhere."""
_MAX_FOLDERS = 200
"""Subfolders of a folder in which they are looked for."""


_MAX_PARTS = 20
"""Parts of a path that may be too many at its start."""


class _Spelling(NamedTuple):
    """Another way to write a path, and what to do if the file exists under it."""

    path: str
    advice: str
    """`{root}` is where the file was found."""


def check_files(path: ListFile, paths: PathTable, remote: RemoteFiles | None = None) -> list[str]:
    """Look for at most a hundred files of the list `path`, evenly spaced; a list may have millions of them.

    Args:
        path: the list.
        paths: what it lists.
        remote: looks for those that are behind URLs; of these fewer are looked for.

    Returns:
        A warning if some are missing, or the only one.

    Raises:
        DataError: all are missing, with the root to set if they are found below another one.
        StorageError: a store does not say whether they are there.
    """
    root = paths.root
    num = min(len(paths), _MAX_LOOKED_AT if remote is None else _MAX_REQUESTS)
    looked_at = np.linspace(0, len(paths) - 1, num).astype(int).tolist()
    files = [paths.location(index) for index in looked_at]
    if remote is not None:
        missing = [shown(file) for file, size in zip(files, remote.sizes(looked_at), strict=True) if size < 0]
    else:
        missing = [file for file in files if os.path.isdir(file) or not os.path.exists(file)]
    if not missing:
        return []
    prefix = os.path.join(shown(root), "")
    entries = [entry.removeprefix(prefix) for entry in missing[:_MAX_TRIED]]
    advice = None if path.folder is None or remote is not None else _find_elsewhere(entries, path.folder, root)
    if len(missing) < num or num == 1:  # one file alone may well be missing
        return [
            f"{path}: {len(missing)} of {num} listed files that were looked for do not exist, such as "
            f"{_described(missing[0])}; {advice or 'correct or remove these lines'}"
        ]
    counted = (
        f"none of the {num} listed files exists" if num == len(paths) else f"none of {num} looked-for files exists"
    )
    if os.path.isabs(entries[0]) or scheme_of(entries[0]) is not None:
        where, otherwise = "the paths are absolute", "correct the paths in the list"
    else:
        where, otherwise = (
            f"relative paths start in {shown(root)}",
            f"set root to the folder in which {entries[0]!r} is",
        )
    raise DataError(printable(f"{path}: {counted}, such as {_described(missing[0])}; {where}; {advice or otherwise}"))


def _described(file: str) -> str:
    return f"{file} (a folder)" if os.path.isdir(file) else file


def _find_elsewhere(entries: list[str], folder: Path, root: str) -> str | None:
    """What to change for the listed `entries` to exist; None if they are found nowhere."""
    roots = list(dict.fromkeys([root, *_folders(folder, root)]))
    for entry in entries:
        if not os.path.isabs(entry):
            for base in roots[1:]:
                if os.path.isfile(os.path.join(base, entry)):
                    return f"the files are below another folder: set root: {_shown(base)}"
        for base in roots:
            for spelling in _spellings(entry):
                if os.path.isfile(os.path.join(base, spelling.path)):
                    also = "" if base == root or os.path.isabs(spelling.path) else f", and set root: {_shown(base)}"
                    return f"{spelling.advice}{also}"
    return None


def _folders(folder: Path, root: str) -> Iterator[str]:
    """Where the root may really be: the working directory, the folders around it, the list and `root`, and in these."""
    starts = [Path.cwd(), folder, Path(root)]
    yield from map(str, starts)
    yield from map(str, chain.from_iterable(start.parents for start in starts))
    for start in starts:
        yield from islice(_subfolders(start), _MAX_FOLDERS)


def _subfolders(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry.path for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError:
        return


def _spellings(entry: str) -> Iterator[_Spelling]:
    """Ways in which the path of a list is often wrong."""
    slashes = entry.replace("\\", "/")
    if slashes != entry:
        yield _Spelling(slashes, "the paths have backslashes: write / in place of each")
    if entry.startswith("~"):
        yield _Spelling(os.path.expanduser(entry), "~ is not expanded in a list: write the whole path")
    stem, ending = os.path.splitext(entry)
    stem, ending = (stem, ending) if ending.lower() in EXTENSIONS else (entry, "")
    for other in dict.fromkeys([ending.lower(), ending.upper(), *EXTENSIONS, *map(str.upper, EXTENSIONS)]):
        if other != ending:
            wrong = f"end in {other} and not in {ending}" if ending else f"need the ending {other}"
            yield _Spelling(stem + other, f"the paths {wrong}")
    if " " in entry.strip() or "\t" in entry:
        yield _Spelling(entry.split()[0], "the paths end at a space: write path,label with a comma")
    parts = slashes.split("/")
    for start in range(1, min(len(parts), _MAX_PARTS)):
        tail, prefix = "/".join(parts[start:]), "/".join(parts[:start]) + "/"
        if tail:
            yield _Spelling(tail, f"remove {prefix!r} from the start of the paths")


def _shown(folder: str) -> str:
    """The folder as it may be written: relative to the working directory if it is below it."""
    relative = os.path.relpath(folder)
    return folder if relative.startswith("..") else relative
