"""Class names: checking them, saving and loading them, and warnings about a suspicious order."""

import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.files import read_regular
from kd_pipeline._core.suggestions import first_few
from kd_pipeline.data.sources.containers import user_path
from kd_pipeline.errors import DataError

if TYPE_CHECKING:
    from kd_pipeline.data.sources.base import Source

__all__ = [
    "MAX_NAME",
    "Classes",
    "class_names",
    "combination_warnings",
    "count_classes",
    "label_warnings",
    "load_classes",
    "name_warnings",
    "save_classes",
    "shown_samples",
    "used_label_warnings",
]

Classes = Sequence[str] | str | os.PathLike[str]
"""Class names in label order, or the path of a file with them."""

MAX_NAME = 1000
"""Characters of a class name."""
_MAX_FILE_BYTES = 2**22
"""Of a file with class names; JSON takes up to thirty times as much memory."""
_MAX_DIGITS = 10
_MIN_DISTINCT = 20
"""So many samples without two of the same class are no accident."""
_JOINTS = re.compile(r"[\s,/&+]+")
_SPACES = re.compile(r"[\s_-]+")


def class_names(classes: Classes) -> tuple[str, ...]:
    """The names in `classes`, loaded from the file if it is a path.

    Raises:
        DataError: the file cannot be read, there are no names, or one is empty, not a string, or duplicated.
    """
    if isinstance(classes, str | os.PathLike):
        return load_classes(classes)
    return _check_names(classes, "classes")


def save_classes(path: str | os.PathLike[str], classes: Sequence[str]) -> None:
    """Write class names in label order to the JSON file `path`, for `load_classes` and `classes: <path>` to read.

    Raises:
        DataError: there are no names, or one is empty, not a string, or duplicated; or the file cannot be written.
    """
    path = Path(path)
    content = json.dumps(_check_names(classes, "classes"), indent=0) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as exc:
        raise DataError(f"{path} cannot be written: {exc.strerror}") from None


def load_classes(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read class names in label order from a file.

    It is a JSON list of names; a JSON object from names to labels, such as torchvision's `class_to_idx`, or from labels
    to names, such as Hugging Face's `id2label`, also within its `config.json`; or a `.txt` file with a name per line.

    Raises:
        DataError: the file cannot be read or is nothing of this kind, or a name is empty or duplicated.
    """
    file = user_path(path)
    try:
        text = read_regular(file, max_bytes=_MAX_FILE_BYTES).decode("utf-8-sig")
        if file.suffix.lower() == ".txt":
            return _check_names([line.strip() for line in text.splitlines() if line.strip()], str(path))
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise DataError(f"{path}: cannot be read as a JSON list of class names ({reason})") from exc
    if isinstance(content, dict):
        content = _names_in_order(content)
    if not isinstance(content, list):
        raise DataError(
            f'{path}: expected a JSON list of class names such as ["cat", "dog"], or an object from names to labels '
            f"without gaps or the other way around, found {text.strip()!r:.60}"
        )
    return _check_names(content, str(path))


def _names_in_order(content: dict[str, object]) -> list[object] | None:
    """The names of a `class_to_idx` or `id2label`; None if it is neither, or a label is missing."""
    for key in ("id2label", "class_to_idx"):
        if isinstance(inner := content.get(key), dict):
            content = inner
            break
    by_label: dict[object, object] = {label: name for name, label in content.items() if type(label) is int}
    if not by_label:
        numbers = ((label, name) for label, name in content.items() if label.isdecimal() and len(label) < _MAX_DIGITS)
        by_label = {int(label): name for label, name in numbers}
    if not content or len(by_label) != len(content) or set(by_label) != set(range(len(content))):
        return None
    return [by_label[label] for label in range(len(content))]


def count_classes(labels: NDArray[np.int64] | None, classes: tuple[str, ...] | None) -> int | None:
    """K: `len(classes)`, else the largest label + 1, else None."""
    if classes is not None:
        return len(classes)
    return None if labels is None else int(labels.max()) + 1


def shown_samples(what: str, source: "Source") -> str:
    """The samples of a source in a few words, such as `37 files, 3 classes`."""
    of = "" if source.num_classes is None else f", {source.num_classes} classes"
    labels = "" if source.labels is not None else ", unlabeled" if source.masks is None else ", with masks"
    return f"{len(source)} {what}{of}{labels}"


def name_warnings(names: Sequence[str]) -> list[str]:
    """Warnings about class names in text order: numbers out of numeric order, names that are nearly the same."""
    warnings = []
    if sorted(names, key=_natural_key) != list(names):
        mapping = ", ".join(f"{label}: {name}" for label, name in enumerate(names[:10]))
        warnings.append(
            f"class names with numbers are in text order ({mapping}{', ...' if len(names) > 10 else ''}); "
            "list them in `classes` if the teacher has a different order"
        )
    similar = defaultdict(list)
    for name in names:
        similar[_SPACES.sub(" ", unicodedata.normalize("NFC", name).casefold()).strip()].append(name)
    if groups := [" and ".join(map(repr, group)) for group in similar.values() if len(group) > 1]:
        warnings.append(
            f"classes that differ only in case, spaces or Unicode form: {first_few(groups)}; merge equal ones"
        )
    return warnings


def combination_warnings(names: Sequence[str]) -> list[str]:
    """A warning about class names that consist of other ones, as where a sample has several labels in one text."""
    known = set(names)
    combined = [
        name
        for name in names
        if len(parts := set(_JOINTS.split(name)) - {""}) > 1 and all(part in known for part in parts)
    ]
    if not combined:
        return []
    examples = first_few(list(map(repr, combined)))
    return [f"classes that consist of other classes: {examples}; a sample has one class, so split or merge them"]


def label_warnings(labels: NDArray[np.int64], classes: Sequence[str] | None, *, is_given: bool) -> list[str]:
    """Warnings about labels that leave classes without a sample, count from 1 or give each sample its own class.

    Args:
        labels: `[N]`.
        classes: class names, if there are any.
        is_given: whether the user listed the names, so they are not just those that occur.
    """
    return used_label_warnings(np.unique(labels), len(labels), classes, is_given=is_given)


def used_label_warnings(
    used: NDArray[np.int64], num_samples: int, classes: Sequence[str] | None, *, is_given: bool
) -> list[str]:
    """`label_warnings` about `num_samples` whose labels are `used` `[U]`, each once and sorted."""
    num_classes = len(classes) if classes else int(used[-1]) + 1
    if not is_given and len(used) == num_samples >= _MIN_DISTINCT:
        return [
            f"each of the {num_samples} samples has a class of its own; are the labels numbers of lines or names of "
            "files?"
        ]
    if not is_given and used[0] == 1 and len(used) == num_classes - 1:
        return [
            f"labels from 1 to {used[-1]}, and classes count from 0: class 0 has no samples, and a teacher that counts "
            "from 0 has other labels; subtract 1 from each label"
        ]
    if len(used) == num_classes:
        return []
    unused = np.setdiff1d(np.arange(min(num_classes, len(used) + 10)), used)[:10].tolist()
    shown = first_few([classes[label] if classes else str(label) for label in unused], num_classes - len(used))
    return [f"no samples for {num_classes - len(used)} of {num_classes} classes: {shown}"]


def _check_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    if not names:
        raise DataError(f"{where}: no class names; list at least one")
    first: dict[str, int] = {}
    for label, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: class {label} is {name!r:.60}; every name must be a string that is not empty")
        if len(name) > MAX_NAME:
            raise DataError(
                f"{where}: class {label} is {name!r:.60}..., a name of {len(name)} characters; write at most {MAX_NAME}"
            )
        if first.setdefault(name, label) != label:
            raise DataError(f"{where}: {name!r:.60} is class {first[name]} and class {label}; remove one of them")
    return tuple(names)


def _natural_key(name: str) -> list[str | tuple[int, str]]:
    """Alternating text and numbers, to sort 2 before 10. Numbers are compared as text: int() refuses the longest."""
    parts = re.split(r"(\d+)", name)
    return [_number_key(part) if at % 2 else part for at, part in enumerate(parts)]


def _number_key(digits: str) -> tuple[int, str]:
    significant = "".join(str(unicodedata.decimal(digit)) for digit in digits).lstrip("0")
    return len(significant), significant
