"""Files as users name them: paths, globs, ranges such as {0000..0146}, alternatives {a,b}, and lists of these."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from kd_pipeline._core.suggestions import suggest
from kd_pipeline.errors import DataError, shown
from kd_pipeline.storage.base import Store, scheme_of

__all__ = ["expand"]

_BRACES = re.compile(r"\{([^{}]*)\}")
_NESTED = re.compile(r"\{[^{}]*\{[^{}]*\}[^{}]*\}")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
_MAX_FILES = 10_000_000
_MAX_LEVELS = 3
"""Folders up to which it is looked for what is there instead."""


def expand(paths: str | Path | Sequence[str | Path], store: Store) -> list[str]:
    """The files that `paths` stands for, in its order; those of one glob are sorted.

    - `*`, `?` and `[...]` match names in the store. `?` starts the query of an https URL, and is no pattern there.
    - `{0000..0146}` counts, with as many digits as are written. `{a,b}` is each of the two. Neither looks at the store,
      so a file that is missing is an error when it is opened.
    - A local file whose name looks like a glob is itself.

    Raises:
        DataError: a glob matches nothing, braces are wrong, or a file is there twice.
        StorageError: the store cannot list files.
    """
    patterns = [str(paths)] if isinstance(paths, str | Path) else [str(path) for path in paths]
    found: list[str] = []
    for pattern in patterns:
        for path in _without_braces(pattern):
            found += _matches(path, store) if _is_glob(path) else [path]
            if len(found) > _MAX_FILES:
                raise DataError(f"{shown(pattern)}: this is more than {_MAX_FILES} files; check the range")
    if not found:
        raise DataError("the list of files is empty; name at least one")
    _refuse_duplicates(found)
    return found


def _without_braces(pattern: str) -> Iterator[str]:
    if _NESTED.search(pattern):
        raise DataError(f"{shown(pattern)}: braces cannot be nested; write a list of patterns instead")
    for match in _BRACES.finditer(pattern):
        choices = _choices(match[1], pattern)
        if choices is not None:
            before, after = pattern[: match.start()], pattern[match.end() :]
            for choice in choices:
                for rest in _without_braces(after):
                    yield f"{before}{choice}{rest}"
            return
    yield pattern


def _choices(text: str, pattern: str) -> Iterator[str] | None:
    """What is in braces, one after the other; None if these braces are part of a name."""
    if match := _RANGE.fullmatch(text):
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise DataError(f"{shown(pattern)}: the range {{{text}}} counts down; write {{{match[2]}..{match[1]}}}")
        width = max(len(match[1]), len(match[2])) if match[1].startswith("0") and len(match[1]) > 1 else 0
        if last - first >= _MAX_FILES:
            raise DataError(f"{shown(pattern)}: the range {{{text}}} is more than {_MAX_FILES} files; check it")
        return (f"{number:0{width}d}" for number in range(first, last + 1))
    if ".." in text:
        raise DataError(f"{shown(pattern)}: the range {{{text}}} should be two numbers, such as {{0000..0146}}")
    return iter(text.split(",")) if "," in text else None


def _is_glob(path: str) -> bool:
    scheme = scheme_of(path)
    name = path if scheme is None else path.partition("://")[2].partition("/")[2]  # not [::1]
    if scheme in ("http", "https"):
        return any(character in name.partition("?")[0] for character in "*[")
    return any(character in name for character in "*?[")


def _matches(pattern: str, store: Store) -> list[str]:
    if scheme_of(pattern) is None and os.path.lexists(pattern):
        return [pattern]
    found = store.find(pattern)
    if not found:
        raise DataError(f"{shown(pattern)}: no file matches{_near(pattern, store)}")
    return found


def _near(pattern: str, store: Store) -> str:
    """The end of the message: what the first folder that is there holds."""
    for _ in range(_MAX_LEVELS):
        folder, _, name = pattern.rpartition("/")
        if not _is_glob(folder) and not folder.endswith((":", "/")):
            is_root = not folder and pattern.startswith("/")
            if names := [
                shown(path).rpartition("/")[2] for path in store.find(f"{folder}/*" if folder or is_root else "*")
            ]:
                where = shown(folder) or ("/" if is_root else "the current folder")
                return f"; {where} holds something else{suggest(name, names)}"
        if not folder:
            break
        pattern = folder
    return "; check the folder"


def _refuse_duplicates(paths: list[str]) -> None:
    seen: set[str] = set()
    for path in paths:
        name = path if scheme_of(path) else os.path.normpath(path)
        if name in seen:
            raise DataError(f"{shown(path)}: this file is in the list twice; remove one of the two")
        seen.add(name)
