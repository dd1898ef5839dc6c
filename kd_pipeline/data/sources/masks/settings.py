"""Settings of masks: where those of each kind of source are, and which classes their values stand for."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from kd_pipeline._core.settings import Settings
from kd_pipeline.storage import Location

__all__ = ["MAX_VALUE", "ArrayMasks", "FolderMasks", "ListMasks", "MaskSettings", "TableMasks", "TarMasks"]

MAX_VALUE = 2**15 - 1
"""Largest class, and largest ignore index: that of int16, the widest type of integers that DALI warps beside int32."""


Value = Annotated[int, Field(ge=0, le=2**16 - 1)]
"""Of a pixel in a file."""


class MaskSettings(Settings):
    """Which classes the values in the masks stand for."""

    num_classes: int | None = Field(default=None, ge=1, le=MAX_VALUE + 1)
    """Classes of the pixels; defaults to the number of the source's `classes`, or of `values`."""
    ignore_index: int = Field(default=255, ge=0, le=MAX_VALUE)
    """What pixels without a class have, in the files and in a batch."""
    first_class: int = Field(default=0, ge=0, le=MAX_VALUE)
    """Value of the first class in the files, as 1 where 0 stands for no class (ADE20K); other values that are none of a
    class are ignored then."""
    values: tuple[Value | tuple[Value, ...], ...] | None = Field(default=None, min_length=1, max_length=MAX_VALUE + 1)
    """Value of each class in the files, in the order of the classes, such as `[7, 8, 11]`, or `[7, [8, 9], 11]` where
    two values are one class; all other values are ignored."""

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        if self.values is not None and self.first_class:
            raise ValueError("first_class and values exclude each other; leave out first_class")
        found = Counter(value for _, value in self.class_of_value())
        if twice := [value for value, count in found.items() if count > 1]:
            raise ValueError(f"values has {twice[0]} more than once; a value is of one class")
        return self

    def class_of_value(self) -> Iterator[tuple[int, int]]:
        """The class and the value of each in `values`."""
        for label, given in enumerate(self.values or ()):
            for value in given if isinstance(given, tuple) else (given,):
                yield label, value


class FolderMasks(MaskSettings):
    """Masks in a folder with the same folders and names as the images, but for their endings."""

    root: Location
    """The folder; a local path, or a URL of a store that lists its files."""
    replace: dict[str, str] = Field(default_factory=dict)
    """What parts of the images' names are in those of the masks, such as `{_leftImg8bit: _gtFine_labelIds}`."""


class ListMasks(MaskSettings):
    """Masks whose paths are in a column of the list, relative to the same folder as the images."""

    column: str = Field(default="mask", min_length=1)
    """Name of the column, which the first line of the list has, or of the key in JSONL."""


class TarMasks(MaskSettings):
    """Masks in the same shards, as files with the same name as their image, but for the extension."""

    extension: str = Field(min_length=1)
    """Extension of the masks, such as `seg.png`."""


class TableMasks(MaskSettings):
    """Masks as encoded images in another column."""

    column: str = Field(min_length=1)
    """Name of the column."""


class ArrayMasks(MaskSettings):
    """Masks in an array."""

    path: Path
    """Integers `[N, H, W]` in an `.npy` file, or in the array `masks` of an `.npz`."""
