"""From the values in masks to classes: a table that says what each value stands for."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources.masks.settings import MAX_VALUE, MaskSettings
from kd_pipeline.errors import DataError

__all__ = ["MaskValues"]

_BLOCK = 2**20
"""Values that are looked up at once."""
_NUM_VALUES = 2**16
"""Values of a mask that may have a class, those of 16 bits; all others count as one more."""


class MaskValues:
    """What the values of a source's masks stand for.

    Args:
        settings: what the user says.
        classes: names of the classes, if there are any.
        name: where the masks are, for messages.

    Raises:
        DataError: the number of classes is not known, or a class is not among them.
    """

    def __init__(self, settings: MaskSettings, classes: Sequence[str] | None, name: str) -> None:
        self._settings = settings
        self.num_classes = _num_classes(settings, classes, name)
        self.ignore_index = settings.ignore_index
        self.dtype: np.dtype[Any] = np.dtype(
            np.uint8 if max(self.num_classes - 1, settings.ignore_index) <= 255 else np.int16
        )
        """Of classes: uint8 if it holds all, else int16."""
        self._table = self._make_table(name)
        """`[65537]` int16, the class of each value, or -1 for none; the last entry is of all that are not listed."""

    def classes_of(self, values: NDArray[Any]) -> NDArray[Any]:
        """The classes `[H, W]` of integers `[H, W]`.

        Raises:
            UnreadableFileError: one is neither the value of a class nor ignored.
        """
        is_small = values.dtype == self.dtype == np.uint8
        if is_small and self._table[-1] >= 0:  # three times as fast as NumPy looks up bytes
            found = values.tobytes().translate(self._table[:256].astype(np.uint8).tobytes())
            return np.frombuffer(found, np.uint8).reshape(values.shape)
        if is_small and not ((values >= self.num_classes) & (values != self.ignore_index)).any():
            return values
        classes = np.empty(values.shape, self.dtype)
        step = max(1, _BLOCK // max(1, values.shape[1]))
        for start in range(0, len(values), step):  # NumPy takes eight bytes for each value that it looks up
            rows = slice(start, start + step)
            found = self._table[_known(values[rows])]
            if self._table[-1] < 0 and (wrong := found < 0).any():
                row = start + int(wrong.any(axis=1).argmax())
                raise UnreadableFileError(
                    f"it has the value {values[rows][wrong][0]} in row {row}, which is neither a class from 0 to "
                    f"{self.num_classes - 1} nor ignore_index {self.ignore_index}; correct it, or set num_classes, "
                    "ignore_index or values under masks"
                )
            classes[rows] = found
        return classes

    def digest(self) -> bytes:
        """What the classes depend on besides the files."""
        return json.dumps(["masks 1", self.num_classes, self.ignore_index]).encode() + self._table.astype("<i2").data

    def _make_table(self, name: str) -> NDArray[np.int16]:
        settings = self._settings
        table = np.full(_NUM_VALUES + 1, -1, np.int16)
        first = settings.first_class
        if settings.values is not None or first:
            if settings.ignore_index < self.num_classes:
                raise DataError(
                    f"{name}: ignore_index {settings.ignore_index} is one of the {self.num_classes} classes that "
                    f"{'first_class gives' if first else 'have values'}; set ignore_index to another, such as "
                    f"{max(255, self.num_classes)}"
                )
            table[:] = settings.ignore_index
        if settings.values is not None:
            for label, value in settings.class_of_value():
                table[value] = label
            return table
        if not first:
            table[settings.ignore_index] = settings.ignore_index
        table[first : first + self.num_classes] = np.arange(self.num_classes)
        return table


def _known(values: NDArray[Any]) -> NDArray[Any]:
    """Places in the table."""
    if values.dtype in (np.uint8, np.uint16):
        return values
    return np.where((values < 0) | (values >= _NUM_VALUES), _NUM_VALUES, values).astype(np.int64)


def _num_classes(settings: MaskSettings, classes: Sequence[str] | None, name: str) -> int:
    found = {
        "num_classes under masks": settings.num_classes,
        "the names in `classes`": None if classes is None else len(classes),
        "values under masks": None if settings.values is None else len(settings.values),
    }
    said = {what: number for what, number in found.items() if number is not None}
    if not said:
        raise DataError(
            f"{name}: how many classes the masks have is not known; set num_classes under masks, or list the names in "
            "`classes`"
        )
    (first, number), *others = said.items()
    for what, other in others:
        if other != number:
            raise DataError(f"{name}: {first} says {number} classes, and {what} {other}; correct one of them")
    if number > MAX_VALUE + 1:
        raise DataError(f"{name}: there are {number} names of classes, and masks have at most {MAX_VALUE + 1}")
    return number
