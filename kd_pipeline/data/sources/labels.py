"""Class names: checking them, saving and loading them, and warnings about a suspicious order."""

import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.suggestions import first_few
from kd_pipeline.errors import DataError

__all__ = ["Classes", "class_names", "count_classes", "load_classes", "name_warnings", "save_classes"]

Classes = Sequence[str] | str | os.PathLike[str]
"""Class names in label order, or the path of a JSON file with them."""


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
        DataError: there are no names, or one is empty, not a string, or duplicated.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_check_names(classes, "classes"), indent=0) + "\n", encoding="utf-8")


def load_classes(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read class names in label order from a JSON file that contains a list of strings.

    Raises:
        DataError: the file cannot be read or is not such a list, or a name is empty or duplicated.
    """
    try:
        names = json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(f"{path}: cannot be read as a JSON list of class names ({exc})") from exc
    if not isinstance(names, list):
        raise DataError(f'{path}: expected a JSON list of class names such as ["cat", "dog"], found {names!r:.60}')
    return _check_names(names, str(path))


def count_classes(labels: NDArray[np.int64] | None, classes: tuple[str, ...] | None) -> int | None:
    """K: `len(classes)`, else the largest label + 1, else None."""
    if classes is not None:
        return len(classes)
    return None if labels is None else int(labels.max()) + 1


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
        similar[unicodedata.normalize("NFC", name).casefold()].append(name)
    if groups := [" and ".join(map(repr, group)) for group in similar.values() if len(group) > 1]:
        warnings.append(f"classes that differ only in case or Unicode form: {first_few(groups)}; merge equal ones")
    return warnings


def _check_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    if not names:
        raise DataError(f"{where}: no class names; list at least one")
    first: dict[str, int] = {}
    for label, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: class {label} is {name!r:.60}; every name must be a string that is not empty")
        if first.setdefault(name, label) != label:
            raise DataError(f"{where}: {name!r} is class {first[name]} and class {label}; remove one of them")
    return tuple(names)


def _natural_key(name: str) -> list[str | int]:
    """Alternating text and numbers, to sort 2 before 10."""
    return [int(part) if at % 2 else part for at, part in enumerate(re.split(r"(\d+)", name))]
