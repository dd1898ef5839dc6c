"""A split of a config: its source, and the arguments of its loader."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.order import Shuffle
from kd_pipeline.data.plan import LastBatch
from kd_pipeline.data.settings import LoaderOptions, LoaderSettings
from kd_pipeline.data.sources import Source, open_source
from kd_pipeline.data.views import ViewSettings

if TYPE_CHECKING:
    from kd_pipeline.config.config import Config

__all__ = ["EACH_IMAGE_ONCE", "LoaderArguments", "open_split", "split_arguments"]


class LoaderArguments(LoaderOptions, total=False):
    """The arguments of `KDDataLoader` that a config has, which `from_config` can change."""

    views: Mapping[str, ViewSettings] | None
    shown_views: Collection[str] | None
    teacher_view: str | None
    mix: MixSettings | None
    batch_size: int
    seed: int
    shuffle: Shuffle
    last_batch: LastBatch | None
    repeats: int
    run_dir: Path | str | None


EACH_IMAGE_ONCE: dict[str, Any] = {"mix": None, "repeats": 1, "last_batch": "keep", "run_dir": None}
"""Arguments of `from_config` for every image of a split once, unmixed, without writing into the run's folder."""


def split_arguments(config: "Config", split: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the loader of a split, besides source, transform, teacher and shard; `changes` replace some.

    Raises:
        ConfigError: the config has no such split.
    """
    data, settings = config.data, config.data.split(split)
    is_training = split == "train"
    return {
        "views": settings.views,
        "mix": settings.mix,
        "batch_size": data.batch_size,
        "seed": config.seed,
        "shuffle": is_training if settings.shuffle is None else settings.shuffle,
        "last_batch": settings.last_batch or ("drop" if is_training else None),
        "repeats": settings.repeats,
        "run_dir": config.run_dir,
        **data.model_dump(include={*LoaderSettings.model_fields}),
        **changes,
    }


def open_split(config: "Config", split: str, *, training: Source | None, plugins: Collection[str]) -> Source:
    """The source of a split, with the class order of the split `train`, whose source is `training` if it is open.

    Raises:
        ConfigError: the config has no such split.
        DataError: the data is not what the config says.
    """
    data, settings = config.data, config.data.split(split)
    if training is None and data.train is not None:
        training = open_source(data.train.source, plugins=plugins)
    if split == "train":
        assert training is not None  # data.split found it
        return training
    classes = None if training is None else training.classes
    return open_source(settings.source, classes=classes, plugins=plugins)
