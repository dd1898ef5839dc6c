"""Settings of masks: where those of each kind of source are, and which classes their values stand for."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from kd_pipeline._core.settings import Settings
from kd_pipeline.storage import Location

__all__ = ["MAX_VALUE", "ArrayMasks", "FolderMasks", "ListMasks", "MaskSettings", "TableMasks", "TarMasks"]

MAX_VALUE = 2**15 - 1
"""Largest class, and largest ignore index: that of int16, the widest type of integers that DALI warps beside int32."""


class MaskSettings(Settings):
    """Which classes the values in the masks stand for."""

    num_classes: int | None = Field(default=None, ge=1, le=MAX_VALUE + 1)
    """Classes of the pixels; defaults to the number of the source's `classes`."""
    ignore_index: int = Field(default=255, ge=0, le=MAX_VALUE)
    """What pixels without a class have, in the files and in a batch."""
    first_class: int = Field(default=0, ge=0, le=MAX_VALUE)
    """Value of the first class in the files, as 1 where 0 stands for no class (ADE20K); other values that are none of a
    class are ignored then."""
    label_map: dict[int, int] | None = None
    """The class of each value in the files, such as `{7: 0, 8: 1, 11: 2}`; all other values are ignored."""

    @model_validator(mode="after")
    def _check_map(self) -> Self:
        if self.label_map is not None and self.first_class:
            raise ValueError("first_class and label_map exclude each other; write all values into label_map")
        if self.label_map is not None and not self.label_map:
            raise ValueError("label_map is empty; write the class of each value, such as {7: 0, 8: 1}")
        return self


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
