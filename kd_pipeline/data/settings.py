"""What a config says of the images: the splits, and how they are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from kd_pipeline._core.settings import Settings
from kd_pipeline.data.decode import Decode
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.plan import LastBatch
from kd_pipeline.data.sources.base import SourceSettings
from kd_pipeline.data.transforms import TransformSettings
from kd_pipeline.errors import ConfigError

__all__ = ["SPLITS", "DataSettings", "SplitSettings", "Untaught"]

SPLITS = ("train", "val", "test")
"""Splits with a key of their own; others have their names under `more`."""


class SplitSettings(Settings):
    """Where the images of one split come from and what is done to them."""

    source: SourceSettings
    transform: TransformSettings
    mix: MixSettings | None = None
    """Mixup and CutMix of whole batches, before the teacher sees them; not at all where left out."""
    repeats: int = Field(default=1, ge=1)
    """How often in a row an epoch shows a sample, each time in another view; it stays as long and shows fewer."""
    shuffle: bool | None = None
    """A new order every epoch; by default true for the split `train` and false for any other."""
    last_batch: LastBatch | None = None
    """What becomes of samples that fill no whole batch; by default `drop` for `train` and `keep` for any other."""


class DataSettings(Settings):
    """Everything a loader needs to know, apart from the teacher."""

    batch_size: int = Field(gt=0)
    """Images in a batch of one process."""
    train: SplitSettings | None = None
    val: SplitSettings | None = None
    test: SplitSettings | None = None
    more: dict[str, SplitSettings] = Field(default_factory=dict)
    """More splits by names of their own, such as other validation sets."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto` for a GPU where there is one."""
    num_threads: int | None = Field(default=None, gt=0)
    """CPU threads for DALI; the cores this process may use where left out."""
    prefetch: int = Field(default=2, ge=1)
    """Batches, or groups of small ones, in DALI's queue, the one that is taken among them."""
    ahead: int = Field(default=1, ge=0)
    """Batches for which the teacher has been started ahead of the one handed out."""
    decode: Decode = "auto"
    """`window` decodes only the crop's window of a file, `full` the whole image, which is cut afterward. `auto` is
    `window` on a CPU, where both give the same pixels; on a GPU a short trial finds out what works there."""
    hw_decoder_load: float = Field(default=0.0, ge=0, le=1)
    """Share of the JPEG images of a batch for a GPU's hardware decoder. With any but 0, who decodes an image depends
    on its batch, and so do the last bits of its pixels: batch size, resuming and ranks change them."""
    on_bad_sample: Literal["raise", "substitute"] = "raise"
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    max_pixels: int = Field(default=89_478_485, gt=0)

    @model_validator(mode="after")
    def _names_are_used_once(self) -> "DataSettings":
        for name in SPLITS:
            if name in self.more:
                raise ValueError(f"more must not have a split {name!r}, which is a key of data itself; move it there")
        return self

    @property
    def splits(self) -> dict[str, SplitSettings]:
        """All splits that there are, by name."""
        own = {split: getattr(self, split) for split in SPLITS}
        return {split: found for split, found in own.items() if found is not None} | self.more

    @property
    def validated(self) -> tuple[str, ...]:
        """Names of the splits that a training is measured on as it goes: all but `train` and `test`."""
        return tuple(name for name in self.splits if name not in ("train", "test"))

    def split(self, name: str) -> SplitSettings:
        """The split of that name.

        Raises:
            ConfigError: there is none; names those that there are.
        """
        splits = self.splits
        if name not in splits:
            key = f"data.{name}" if name in SPLITS else f"data.more.{name}"
            raise ConfigError(
                f"the config has no split {name!r}; add {key} with a source and a transform, or take one that is "
                f"there: {', '.join(splits) or 'none'}"
            )
        return splits[name]

    def with_split(self, name: str, settings: SplitSettings) -> Self:
        """A copy in which the split of that name is another."""
        return self.model_copy(update={name: settings} if name in SPLITS else {"more": {**self.more, name: settings}})


@dataclass(frozen=True, slots=True)
class Untaught:
    """The part of a config that gives a loader, without the teacher."""

    seed: int
    data: DataSettings
    run_dir: Path | None = None
    teacher: None = None

    @classmethod
    def of(
        cls, seed: int, data: DataSettings, split: str, *, shuffle: bool | None = None, run_dir: Path | None = None
    ) -> Self:
        """For each image of the split once, alone, in the order that `shuffle` says or else the split itself.

        Raises:
            ConfigError: there is no such split.
        """
        settings = data.split(split)
        update = {"mix": None, "repeats": 1, "last_batch": "keep"}
        if shuffle is not None:
            update["shuffle"] = shuffle
        return cls(seed, data.with_split(split, settings.model_copy(update=update)), run_dir)
