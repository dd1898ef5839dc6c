"""Settings of the data: the splits, and how a loader reads their images."""

from collections.abc import Iterable
from typing import Literal, Self, TypedDict

import torch
from pydantic import Field, ValidationError, model_validator

from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import suggest
from kd_pipeline._core.text import printable
from kd_pipeline.data.decode import Decode
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.order import Shuffle
from kd_pipeline.data.plan import LastBatch
from kd_pipeline.data.sources.base import SourceSettings
from kd_pipeline.data.transforms import TransformSettings
from kd_pipeline.data.views import View, Views, ViewSettings
from kd_pipeline.errors import ConfigError

__all__ = ["SPLITS", "DataSettings", "LoaderOptions", "LoaderSettings", "OnBadSample", "SplitSettings"]

SPLITS = ("train", "val", "test")
"""Splits that are keys of `data` itself; others have their names under `data.more`."""

OnBadSample = Literal["raise", "substitute"]


class LoaderSettings(Settings):
    """How a loader reads images: on which device, how far ahead, and what it does about unreadable files."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto` for a GPU if there is one."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads for DALI; defaults to the cores that this process may use."""
    prefetch: int = Field(default=2, ge=1)
    """Batches, or groups of small batches, in DALI's queue, including the current one; 1 decodes nothing ahead."""
    ahead: int | None = Field(default=None, ge=0)
    """Batches for which the teacher has been started ahead of the current one. It defaults to 1 on a GPU, and to 0 on a
    CPU, where the teacher has finished when its call returns: nothing would run beside it."""
    decode: Decode = "auto"
    """`window` decodes only the crop's window of a file, `full` the whole image, which is cropped afterward. `auto` is
    `window` on a CPU, where both give the same pixels; on a GPU it is `full`, unless a short trial finds that only
    `window` works."""
    hw_decoder_load: float | None = Field(default=None, ge=0, le=1)
    """Share of a batch's JPEG images for the GPU's hardware decoder. With `decode: auto` it defaults to 1 if the trial
    finds that this gives the right pixels in any batch, else to 0. With any share between them, the last bits of an
    image depend on its batch: a different batch size, a resumed run or different ranks change them."""
    on_bad_sample: OnBadSample = "raise"
    """`raise` an error with the file's name, or `substitute` the next readable sample, with `valid=False`."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """With `substitute`, more unreadable samples than this fraction of the dataset are an error; one is allowed."""
    max_pixels: int = Field(default=89_478_485, ge=1)
    """Larger images count as unreadable and are never decoded; defaults to the size from which Pillow warns of a
    decompression bomb. It counts pixels of 3 bytes, as in RGB of 8 bits: an image that takes more memory for a pixel
    while it is decoded, such as one of 16 bits, may have fewer of them. A file may have as many bytes as its pixels
    without compression, and 64 MiB more."""

    @classmethod
    def of(cls, options: "LoaderOptions", *, others: Iterable[str] = ()) -> Self:
        """The settings of keyword arguments; `others` are further keywords of the function that takes them.

        Raises:
            ConfigError: names the first option that is unknown or out of range.
        """
        try:
            return cls.model_validate(
                {name: str(value) if name == "device" else value for name, value in options.items()}
            )
        except ValidationError as exc:
            error = exc.errors()[0]
        name = str(error["loc"][0])
        if error["type"] == "extra_forbidden":
            raise ConfigError(f"there is no option {name!r}{suggest(name, [*cls.model_fields, *others])}")
        expected = error["msg"].removeprefix("Input should be ")
        expected = expected.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
        raise ConfigError(f"{name} must be {expected}, got {error['input']!r}")


class LoaderOptions(TypedDict, total=False):
    """The fields of `LoaderSettings` as keyword arguments."""

    device: torch.device | str
    num_threads: int | None
    prefetch: int
    ahead: int | None
    decode: Decode
    hw_decoder_load: float | None
    on_bad_sample: OnBadSample
    max_bad_fraction: float
    max_pixels: int


class SplitSettings(Settings):
    """Where the images of a split come from, and how they are transformed."""

    source: SourceSettings
    """Where the images and labels are; `kind` says what it is."""
    transform: TransformSettings
    """How an image becomes the network's input: `preset: train` is random, `preset: eval` is not."""
    views: dict[str, ViewSettings] = Field(default_factory=dict)
    """More views of each image, made of the same decoding: one that follows another at a different size, or one with a
    transform of its own. `transform` describes the view `images`."""
    mix: MixSettings | None = None
    """Mixup and CutMix of whole batches, before the teacher sees them; defaults to none."""
    repeats: int = Field(default=1, ge=1)
    """Views of a sample in a row in an epoch. The epoch keeps its length and shows fewer samples."""
    shuffle: Shuffle | None = None
    """A new order in every epoch: `true` or `global` for a uniform permutation, and `{kind: shards, buffer: 20000}` for
    one in which each shard of the source is read once; defaults to true for the split `train` and to false for all
    others."""
    last_batch: LastBatch | None = None
    """What to do with samples that do not fill a batch; defaults to `drop` for `train`. For all others it is
    `keep` or, on several ranks, `pad`, whose extra rows are not valid and so not counted."""

    @model_validator(mode="after")
    def _views_exist(self) -> "SplitSettings":
        try:
            Views.of(self.transform, self.views)
        except ConfigError as exc:
            raise ValueError(str(exc)) from None
        return self


class DataSettings(LoaderSettings):
    """Everything that a loader needs except the teacher."""

    batch_size: int = Field(gt=0)
    """Images in a batch of one process."""
    train: SplitSettings | None = None
    """The images to train on."""
    val: SplitSettings | None = None
    """The images to validate on during training."""
    test: SplitSettings | None = None
    """Images that training does not see; `kd-pipeline eval --split test` measures on them."""
    more: dict[str, SplitSettings] = Field(default_factory=dict)
    """More splits by name, such as further validation sets."""

    @model_validator(mode="after")
    def _names_are_used_once(self) -> "DataSettings":
        for name in SPLITS:
            if name in self.more:
                raise ValueError(f"more must not have a split {name!r}, which is a key of data itself; move it there")
        for name in self.more:  # progress bars and loggers show it as it is
            if not name or printable(name) != name:
                raise ValueError(f"more has a split {name!r}; give it a name of printable characters")
        return self

    @property
    def splits(self) -> dict[str, SplitSettings]:
        """All splits of the config, by name."""
        own = {split: getattr(self, split) for split in SPLITS}
        return {split: found for split, found in own.items() if found is not None} | self.more

    @property
    def validated(self) -> tuple[str, ...]:
        """Names of the splits for validation during training: all but `train` and `test`."""
        return tuple(name for name in self.splits if name not in ("train", "test"))

    def view(self, split: str, name: str) -> View:
        """How the view `name` of a split is made.

        Raises:
            ConfigError: there is no such split, or it has no such view.
        """
        settings = self.split(split)
        views = Views.of(settings.transform, settings.views)
        if name not in views:
            key = f"data.{split}" if split in SPLITS else f"data.more.{split}"
            raise ConfigError(
                f"{key} has no view {name!r}{suggest(name, views.names, otherwise='')}; add {key}.views.{name}, such "
                "as {follow: images, size: 96}"
            )
        return views[name]

    def with_split(self, name: str, settings: SplitSettings) -> Self:
        """The same with other settings of the split called `name`."""
        update = {name: settings} if name in SPLITS else {"more": {**self.more, name: settings}}
        return self.model_copy(update=update)

    def split(self, name: str) -> SplitSettings:
        """The split called `name`.

        Raises:
            ConfigError: there is none; names those that exist.
        """
        splits = self.splits
        if name not in splits:
            key = f"data.{name}" if name in SPLITS else f"data.more.{name}"
            instead = f"use an existing one: {', '.join(splits)}"
            if not splits:
                instead = "evaluate on batches of your own in Python: kd_pipeline.evaluate(student, loader)"
            raise ConfigError(
                f"the config has no split {name!r}; add {key} with a source and a transform, or {instead}"
            )
        return splits[name]
