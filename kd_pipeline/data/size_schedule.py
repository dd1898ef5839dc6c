"""Sizes of images that change between batches or epochs, as pure functions of the seed, the epoch and the batch."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag, model_validator

from kd_pipeline._core.image_size import Size, height_width
from kd_pipeline._core.settings import Settings
from kd_pipeline.data.philox import named_key, philox

__all__ = ["ProgressiveSize", "RandomSize", "SizeSchedule"]

HeightWidth = tuple[int, int]


class RandomSize(Settings):
    """A size that is drawn for each batch, or each epoch, all with the same probability.

    A network that has seen several sizes works at all of them, as RADIO's do (Heinrich et al., arXiv 2412.07679).
    """

    choices: tuple[Size, ...] = Field(min_length=2)
    """The sizes to draw from, each as `size` has it."""
    per: Literal["batch", "epoch"] = "batch"
    """`batch` draws for each batch of an epoch by its number, the same on all ranks. So what size a sample has depends
    on the global batch size, and outputs of a teacher cannot be recorded. `epoch` draws for each epoch."""

    @property
    def changes_in_epoch(self) -> bool:
        """Whether two batches of an epoch can have different sizes."""
        return self.per == "batch"

    @property
    def sizes(self) -> list[HeightWidth]:
        """All that can come, the largest first."""
        return sorted({height_width(size) for size in self.choices}, key=lambda size: (-size[0] * size[1], size))

    def at(self, view: str, *, seed: int, epoch: int, number: NDArray[np.int64]) -> list[HeightWidth]:
        """Height and width of the batches `number` `[n]` of an epoch; each `view` draws for itself."""
        number = number if self.per == "batch" else np.zeros_like(number)
        zero = np.zeros(1, np.uint64)
        counter = (number.astype(np.uint64), np.array(epoch, np.uint64), zero, zero)
        words = philox(named_key(seed, f"{view}\nsize"), counter)[:, 0]
        drawn = (words >> np.uint64(32)) * np.uint64(len(self.choices)) >> np.uint64(32)
        return [height_width(self.choices[place]) for place in drawn.tolist()]

    def __str__(self) -> str:
        sizes = [f"{height} x {width}" for height, width in map(height_width, self.choices)]
        return f"{', '.join(sizes[:-1])} or {sizes[-1]}"


class ProgressiveSize(Settings):
    """A size that grows from `start` to `end` in equal steps, one in each epoch, and then stays.

    As in EfficientNetV2's progressive learning (Tan and Le, arXiv 2104.00298, algorithm 1, with an epoch for each
    stage), but only the size changes. `end` is the size that the network is exported for.
    """

    start: Size
    """The size in the first epoch."""
    end: Size
    """The size from epoch number `epochs` on."""
    epochs: int = Field(ge=2)
    """Epochs until the size is `end`: the first has `start`, the last of them, and all after, have `end`."""
    step: int = Field(default=32, ge=1)
    """Heights and widths between the two are rounded to multiples of it."""

    changes_in_epoch: ClassVar[bool] = False
    """Whether two batches of an epoch can have different sizes."""

    @model_validator(mode="after")
    def _grows(self) -> "ProgressiveSize":
        start, end = height_width(self.start), height_width(self.end)
        if start == end or start[0] > end[0] or start[1] > end[1]:
            raise ValueError(f"start must be smaller than end, got {self.start} and {self.end}")
        if odd := [side for side in (*start, *end) if side % self.step]:
            raise ValueError(
                f"start and end must be multiples of step, got {odd[0]} for a step of {self.step}; set step to 1 for "
                "any size"
            )
        return self

    @property
    def sizes(self) -> list[HeightWidth]:
        """All that can come, the largest first."""
        return list(dict.fromkeys(map(self._of_epoch, reversed(range(self.epochs)))))

    def at(self, view: str, *, seed: int, epoch: int, number: NDArray[np.int64]) -> list[HeightWidth]:
        """Height and width of the batches `number` `[n]` of an epoch, counted from 0."""
        return [self._of_epoch(epoch)] * len(number)

    def _of_epoch(self, epoch: int) -> HeightWidth:
        done, stages, step = min(epoch, self.epochs - 1), self.epochs - 1, self.step
        pairs = zip(height_width(self.start), height_width(self.end), strict=True)
        # In whole numbers, which every machine rounds alike; halves up.
        height, width = (
            (2 * (low * stages + (high - low) * done) + step * stages) // (2 * step * stages) * step
            for low, high in pairs
        )
        return height, width

    def __str__(self) -> str:
        (low, first), (high, last) = height_width(self.start), height_width(self.end)
        return f"{low} x {first} to {high} x {last}"


def _kind_of(value: Any) -> str:
    is_progressive = isinstance(value, Mapping) and not {"start", "end", "epochs", "step"}.isdisjoint(value)
    return "ProgressiveSize" if is_progressive or isinstance(value, ProgressiveSize) else "RandomSize"


SizeSchedule = Annotated[
    Annotated[RandomSize, Tag("RandomSize")] | Annotated[ProgressiveSize, Tag("ProgressiveSize")],
    Discriminator(_kind_of),
]
"""What a config may have as the size of random images, besides a number or two."""
