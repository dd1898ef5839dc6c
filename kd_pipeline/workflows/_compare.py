"""Compare models on a split of a config."""

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch import nn

from kd_pipeline._core.settings import require_config
from kd_pipeline._core.text import counted
from kd_pipeline.config.config import Config
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.settings import LoaderSettings
from kd_pipeline.data.sources import open_source
from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation._compare import Comparison, compare
from kd_pipeline.evaluation._metrics import MetricSettings, open_metrics
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.workflows.compared_models import ModelOpener
from kd_pipeline.workflows.evaluation_sizes import EvaluationSizes
from kd_pipeline.workflows.exported import OpenedModel

__all__ = ["TEACHER", "compare_files"]

TEACHER = "teacher of the config"
"""Name of the row of the config's own teacher."""


def compare_files(
    config: Config,
    models: Sequence[str | os.PathLike[str]] = (),
    *,
    split: str = "val",
    teacher: str | os.PathLike[str] | Literal["config"] | None = "config",
    metrics: Sequence[MetricSettings] = (),
    bank: str | None = None,
    sizes: Sequence[int | tuple[int, int]] = (),
    crops: Sequence[float] = (),
    pretrained: bool = True,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    report: Callable[[str], object] = lambda line: None,
) -> Comparison:
    """Open the models, match their classes to those of the data, and compare them on a split of `config`.

    Models without logits are judged by their features, as `compare` describes.

    Args:
        config: describes the data, and the teacher if it has one.
        models: folders of finished runs, ONNX files and engines; checkpoints of the config's student, or else of its
            teacher; and backbones by name: `timm:NAME` or `torchvision:NAME` with the pretrained weights, for which
            images are normalized as they were trained, and `timm:NAME=FILE` with those of a checkpoint. The rows are
            named as these are written.
        split: the split.
        teacher: the model to measure agreement with, which has the first row: a path as of `models`, where a checkpoint
            is first tried as one of the config's teacher; None for none; or `"config"` for the config's teacher, with
            the weights of its run if there are. A config without a teacher, or with one that cannot run here, is
            compared without, and a warning says why.
        metrics: further metrics, of models with logits.
        bank: a split with labels, whose images are the neighbors of those of `split`; defaults to `split` itself, every
            fifth of whose images is then classified by the rest.
        sizes: height and width of the images, each of which gets a row of every model with logits; defaults to those of
            the split. All are made of one reading and decoding of each image, as are `crops`. Students and teachers
            see them instead of their views.
        crops: fractions of the resized image's shorter side that the center crop leaves, for each of `sizes`; defaults
            to that of the split. With several sizes or crops, a further row is the mean of all their probabilities.
        pretrained: whether backbones by name without a checkpoint have their pretrained weights, which are downloaded,
            or random ones, which show what the network is worth untrained.
        plugins: modules that factories and custom metrics may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        report: called with lines of progress.

    Raises:
        ConfigError: there is no such model or split, nothing to compare, or a metric is unknown.
        DataError, TeacherError: the data or a model cannot be read, or they do not fit together.
    """
    require_config(config)
    opened_metrics = open_metrics(metrics, plugins=plugins)
    transform, shown = config.data.split(split).transform, config.data.split(split).views
    at = EvaluationSizes.of(transform, sizes, crops) if sizes or crops else None
    configs = {transform.height_width: config} if at is None else at.configs(config, split)
    with ExitStack() as stack:
        # Without a process group, each process of a launcher compares on the whole split.
        shard = None if torch.distributed.is_initialized() else Shard()
        loader = stack.enter_context(
            KDDataLoader.from_config(
                config,
                split,
                teacher=None,
                shard=shard,
                run_dir=None,
                plugins=plugins,
                views=shown if at is None else at.views,
                shown_views=config.seen_views & shown.keys() if at is None else None,
            )
        )
        images = f"{counted(len(loader.source), 'image')}{_of_classes(loader)}"
        report(f"{split}: {images} in batches of {loader.batch_size}")
        allowed = {"plugins": plugins, "trust_engines": trust_engines}
        opener = ModelOpener(configs, split, loader, stack, is_pretrained=pretrained, **allowed)
        if teacher == "config" and config.teacher is not None:
            report("opening the teacher of the config")
        reference, opened = _open_models(opener, models, teacher)
        own_bank = None if bank in (None, split) else stack.enter_context(_open_bank(config, bank, loader, plugins))
        return compare(
            {name: each.model for name, each in opened.items()},
            loader,
            reference=reference,
            metrics=opened_metrics,
            files={name: each.files for name, each in opened.items()},
            bank=own_bank,
            views=opener.views,
            sizes=None if at is None else at.view_names,
            report=report,
        )


def _open_models(
    opener: ModelOpener,
    models: Sequence[str | os.PathLike[str]],
    teacher: str | os.PathLike[str] | Literal["config"] | None,
) -> tuple[nn.Module | Teacher | None, dict[str, OpenedModel]]:
    """What agreement is measured with, and all models by their names, the teacher first.

    Raises:
        ConfigError: there is none.
    """
    opened: dict[str, OpenedModel] = {}
    reference: nn.Module | Teacher | None = None
    if teacher == "config":
        own = opener.open_teacher_of_config(is_required=not models)
        if own is not None:
            reference = own.model
            opened[TEACHER] = own
    elif teacher is not None:
        named = opener.open(teacher, "teacher")
        reference = named.model
        if os.fspath(teacher) not in [os.fspath(path) for path in models]:
            opened[os.fspath(teacher)] = named
    opened |= {os.fspath(path): opener.open(path) for path in models}
    if not opened:
        raise ConfigError("there is nothing to compare: name a run, an ONNX file or an engine")
    return reference, opened


def _of_classes(loader: KDDataLoader) -> str:
    return f" of {counted(loader.num_classes, 'class')}" if loader.num_classes else ""


def _open_bank(config: Config, split: str, loader: KDDataLoader, plugins: Collection[str]) -> KDDataLoader:
    """Every image of a split once, transformed as those of `loader`, and with labels of the same order."""
    data = config.data
    return KDDataLoader(
        open_source(data.split(split).source, classes=loader.classes, plugins=plugins),
        loader.transform,
        views=loader.view_settings,
        shown_views=loader.views.names[1:],
        batch_size=data.batch_size,
        seed=config.seed,
        shuffle=False,
        shard=loader.shard,
        last_batch="keep",
        plugins=plugins,
        **data.model_dump(include={*LoaderSettings.model_fields}),
    )
