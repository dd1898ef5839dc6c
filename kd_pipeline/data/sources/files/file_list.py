"""Paths and labels listed in a CSV or JSONL file."""

import logging
import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import replace
from types import NoneType

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.suggestions import suggest
from kd_pipeline.data.sources.containers import user_location
from kd_pipeline.data.sources.files.folder_scan import EXTENSIONS
from kd_pipeline.data.sources.files.index_cache import ListIndex, index_key, load_index, save_index
from kd_pipeline.data.sources.files.list_file import ListFile, open_list
from kd_pipeline.data.sources.files.list_format import ListFormat, find_format, find_mask_column
from kd_pipeline.data.sources.files.list_rows import Block, ListRows
from kd_pipeline.data.sources.files.missing_files import check_files
from kd_pipeline.data.sources.files.paths import FileSource, PathTable
from kd_pipeline.data.sources.files.remote_files import RemoteFiles, Stores
from kd_pipeline.data.sources.labels import Classes, class_names, combination_warnings, label_warnings, name_warnings
from kd_pipeline.data.sources.masks.masks import Masks
from kd_pipeline.data.sources.masks.settings import ListMasks
from kd_pipeline.errors import DataError, shown
from kd_pipeline.storage import StoreSettings, scheme_of
from kd_pipeline.storage.location import folder_of

__all__ = ["FileList"]

_logger = logging.getLogger("kd_pipeline")

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_FRACTION = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_SEVERAL = re.compile(r"[-+]?[0-9]+([\s,]+[-+]?[0-9]+)+|.*[|;].*|\[.*\]|\{.*\}", re.DOTALL)
_MAX_KNOWN = 2**20
"""Labels whose class is kept; a list may have another one in each line."""
_KINDS = {NoneType: "no label", int: "a class index", str: "a class name"}


class FileList(FileSource):
    """The paths or URLs, and optionally labels, in a CSV or JSONL file, which may itself be behind a URL.

    CSV has the columns `path,label` or `path`, with or without a header. A header may have further columns, any order,
    and usual names such as `filename` and `class`; which columns are read is logged. The delimiter is found: comma,
    tab, semicolon, `|` or whitespace. JSONL has an object per line, with the same names as keys. Lines that start with
    `#` are comments. Either every line has a label or none has. Integers are class indices, strings are class names. In
    CSV everything that reads as an integer is one, so classes named by numbers need JSONL, where `10` and `"10"`
    differ. Spaces around a value of CSV do not count.

    A list of a megabyte or more is parsed once and cached in `~/.cache/kd_pipeline/index`. Of the listed files at most
    a hundred are looked for.

    Args:
        path: the list.
        root: base of relative paths; defaults to the folder of the list.
        classes: names in label order, or a file with them; defaults to the sorted names in the list, if any.
        masks: which column has the paths of masks; labels are not read then, and `classes` are those of the pixels.
        storage: how what is behind URLs is read.

    Raises:
        DataError: the list cannot be read, is empty, has columns that may mean more than one thing or a malformed line,
            or none of its files exists; names file and line.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        classes: Classes | None = None,
        masks: ListMasks | None = None,
        storage: StoreSettings | None = None,
    ) -> None:
        stores, location = Stores(storage), user_location(path)
        top = folder_of(str(location)) if root is None else str(user_location(root))
        top = os.path.abspath(top) if scheme_of(top) is None else top
        names = None if classes is None else class_names(classes)
        file = open_list(location, stores)
        form = find_format(file, top, stores.is_file, None if masks is None else masks.column)
        if form.columns is not None:
            _logger.info("%s: %s", file, form.columns.description)
        index = _index(file, top, names, form, stores)
        remote = _remote(index.paths, stores)
        warnings = [*index.remarks, *check_files(file, index.paths, remote)]
        warnings += name_warnings(index.classes) if index.classes and classes is None else []
        found = None if masks is None else _masks(masks, file, top, names, form, stores)
        super().__init__(index.paths, index.labels, index.classes, warnings, remote, found)


def _masks(
    masks: ListMasks, file: ListFile, top: str, names: tuple[str, ...] | None, form: ListFormat, stores: Stores
) -> Masks:
    """The masks of a list in the format `form`; it is read again, with another column as that of the paths."""
    columns = None if form.columns is None else find_mask_column(form.columns.names, masks.column)
    paths = _index(file, top, None, replace(form, columns=columns, is_of_masks=True), stores).paths
    remote = _remote(paths, stores)
    return Masks(FileSource(paths, None, None, check_files(file, paths, remote), remote), masks, classes=names)


def _index(file: ListFile, top: str, names: tuple[str, ...] | None, form: ListFormat, stores: Stores) -> ListIndex:
    """What a list holds, from the cache if it has not changed."""
    key = index_key(file, top, names, form)
    index = None if key is None else load_index(key, top)
    if index is None:
        index = _parse(file, top, names, form, stores)
        if key is not None and key == index_key(file, top, names, form):  # it was not edited during parsing
            index = save_index(key, index, top)
    return index


def _remote(paths: PathTable, stores: Stores) -> RemoteFiles | None:
    return RemoteFiles(paths, stores) if paths.schemes or scheme_of(paths.root) is not None else None


def _parse(path: ListFile, root: str, names: tuple[str, ...] | None, form: ListFormat, stores: Stores) -> ListIndex:
    samples, rows = _Samples(path, root, names, form, stores), ListRows(path, form)
    try:
        for block in rows.blocks():
            samples.extend(block)
    except (DataError, ValueError):  # each line alone, to report the first one that is wrong
        samples, rows = _Samples(path, root, names, form, stores), ListRows(path, form)
        for line, sample, label in rows:
            try:
                samples.extend(Block([os.fsencode(sample)], [label]))
            except ValueError as exc:
                raise DataError(f"{path}:{line}: {exc}") from exc
    return samples.index(rows.remarks())


class _Samples:
    """The samples of a list, collected from its start to its end."""

    def __init__(
        self, path: ListFile, root: str, names: tuple[str, ...] | None, form: ListFormat, stores: Stores
    ) -> None:
        self._path, self._names, self._stores = path, names, stores
        self._paths, self._labels = PathTable(root), _LabelColumn(names, typed=form.delimiter is None)
        self._hashes = array("q")

    def extend(self, block: Block) -> None:
        """Add samples.

        Raises:
            ValueError: a label is none, or not of the kind of those before it; or nothing reads such a URL.
            MissingPackageError: the package that reads such a URL is not installed.
        """
        self._labels.extend(block.labels)
        self._paths.extend_encoded(block.paths)
        for scheme in self._paths.schemes:
            self._stores.of(f"{scheme}://")
        self._hashes.extend(map(hash, block.paths))

    def index(self, remarks: list[str]) -> ListIndex:
        """What was collected, with `remarks` and others about it.

        Raises:
            DataError: there are no samples.
        """
        path, names = self._path, self._names
        if not len(self._paths):
            raise DataError(f"{path}: lists no samples; write one path per line")
        labels, classes = self._labels.finish()
        if labels is not None:
            remarks += [f"{path}: {warning}" for warning in label_warnings(labels, classes, is_given=names is not None)]
            remarks += _contradictions(path, self._paths, np.frombuffer(self._hashes, dtype=np.int64), labels)
            remarks += combination_warnings(classes) if classes and names is None else []
        return ListIndex(self._paths, labels, classes, tuple(remarks))


def _contradictions(
    path: ListFile, paths: PathTable, hashes: NDArray[np.int64], labels: NDArray[np.int64]
) -> list[str]:
    """A warning about files that are listed with different labels, found by hashes of their paths `[N]`."""
    ascending = np.sort(hashes)
    if (ascending[1:] != ascending[:-1]).all():  # sorting them alone is ten times as fast
        return []
    del ascending
    order = np.argsort(hashes, kind="stable")
    hashes, labels = hashes[order], labels[order]
    rows = np.flatnonzero((hashes[1:] == hashes[:-1]) & (labels[1:] != labels[:-1]))
    pairs = ((order[row], order[row + 1]) for row in rows.tolist())
    first = next((a for a, b in pairs if paths.location(a) == paths.location(b)), None)
    if first is None:
        return []
    return [
        f"{path}: {len(rows)} line(s) list a file again with another label, such as "
        f"{shown(paths.location(first))}; each line is a sample of its own, so remove the wrong ones"
    ]


class _LabelColumn:
    """Collects the labels of a list in order; all must be None, all class indices, or all class names."""

    def __init__(self, names: tuple[str, ...] | None, *, typed: bool) -> None:
        self._names, self._typed = names, typed
        self._kind: type | None = None
        self._codes = array("i")
        self._code_of = {name: code for code, name in enumerate(names or ())}
        self._code_as_listed: dict[bytes | str | int, int] = {}
        numbers = (name for code, name in enumerate(names or ()) if _INTEGER.fullmatch(name) and name != str(code))
        self._number_name = next(numbers, None)

    def extend(self, labels: Sequence[bytes | str | int | None]) -> None:
        """Add labels, in UTF-8 or as they were parsed.

        Raises:
            ValueError: one is none of a class, or not of the kind of those before it.
        """
        if len(self._code_as_listed) > _MAX_KNOWN:
            self._code_as_listed.clear()
        for label in set(labels) - self._code_as_listed.keys():
            code = self._code(label.decode() if isinstance(label, bytes) else label)
            if label is not None and code is not None:
                self._code_as_listed[label] = code
        if self._kind is not NoneType:
            self._codes.extend(map(self._code_as_listed.__getitem__, labels))  # type: ignore[arg-type]

    def _code(self, label: int | str | None) -> int | None:
        """The number of a label among all of its kind; None for no label."""
        if isinstance(label, str) and not self._typed and _INTEGER.fullmatch(label):
            label = int(label)
            if self._number_name is not None:
                raise ValueError(
                    f"the label {label} may be a class index or a name, as a class is named {self._number_name!r}; "
                    f'write the list as .jsonl, with {label} for the index and "{label}" for the name'
                )
        if isinstance(label, str) and label not in self._code_of:
            _check_name(label)
        self._kind = self._kind or type(label)
        if type(label) is not self._kind:
            raise ValueError(
                f"found {_KINDS[type(label)]} ({label!r}) where the lines above have {_KINDS[self._kind]}; "
                "use the same on every line"
            )
        if isinstance(label, int):
            limit = len(self._names) if self._names else 2**31
            if not 0 <= label < limit:
                raise ValueError(
                    f"the label {label} is not a class index from 0 to {limit - 1}; classes count from 0, and a line "
                    "without a class must be removed"
                )
            return label
        if label is None:
            return None
        if self._names and label not in self._code_of:
            raise ValueError(f"{label!r} is not among the {len(self._names)} classes{suggest(label, self._names)}")
        return self._code_of.setdefault(label, len(self._code_of))

    def finish(self) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
        """Labels `[N]` and class names in label order."""
        if self._kind is NoneType:
            return None, self._names
        labels = np.array(self._codes, dtype=np.int64)
        if self._kind is int or self._names:
            return labels, self._names
        names = sorted(self._code_of)
        label_of_code = np.empty(len(names), dtype=np.int64)
        label_of_code[[self._code_of[name] for name in names]] = np.arange(len(names))
        return label_of_code[labels], tuple(names)


def _check_name(label: str) -> None:
    """Refuse what no class is called. A class that is called so nevertheless can be listed in `classes`."""
    if _FRACTION.fullmatch(label):
        number = float(label)
        advice = f"write {number:.0f}" if number.is_integer() else "a class is a whole number or a name"
        problem = f"the label {label!r} is neither a class index nor a name: {advice}"
    elif _SEVERAL.fullmatch(label):
        problem = f"the label {label!r:.60} looks like several, and a sample has one class"
    elif label.casefold() in ("nan", "<na>"):
        problem = f"the label {label!r} stands for none: remove the line"
    elif label.lower().endswith(EXTENSIONS):
        problem = f"the label {label!r:.60} is an image file: write path,label on a line"
    else:
        return
    raise ValueError(f"{problem}; if a class has this name, list all names in `classes`")
