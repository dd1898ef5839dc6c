"""Compare models on a split of a config: runs, ONNX files, engines, backbones by name, and the config's own teacher."""

import logging
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from torch import nn

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.paths import argument_path
from kd_pipeline._core.settings import require_config
from kd_pipeline.config.config import Config
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.settings import LoaderSettings
from kd_pipeline.data.sources import open_source
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.errors import ConfigError, KDPipelineError, StateError, TeacherError
from kd_pipeline.evaluation._compare import Comparison, compare
from kd_pipeline.evaluation._metrics import MetricSettings, open_metrics
from kd_pipeline.loader.config_teacher import open_config_teacher
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.input_adapter import ExpectedInput, InputAdapter, InputAdapterLayer, Normalization
from kd_pipeline.models.registry import ModelSettings, open_model, pretrained_input
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.settings import TeacherSettings, is_recording, members_of, with_runtimes
from kd_pipeline.teachers.sized import SizedTeacher
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.workflows.evaluation_sizes import EvaluationSizes
from kd_pipeline.workflows.exported import OpenedModel, open_model_file
from kd_pipeline.workflows.open_checkpoint import is_checkpoint, open_checkpoint
from kd_pipeline.workflows.stage import stage_dir, view_of
from kd_pipeline.workflows.teacher import saved_runtimes, student_precision, with_trained_weights

__all__ = ["TEACHER", "compare_files", "open_logits_teacher"]

_logger = logging.getLogger("kd_pipeline")

_BY_NAME = re.compile(r"(timm|torchvision):([^=]+)(?:=(.+))?")
"""A backbone by name, and possibly a file with its weights."""

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
        report(f"{split}: {len(loader.source):,} images{_of_classes(loader)} in batches of {loader.batch_size}")

        views: dict[str, str] = {}
        """What networks see, by their names."""

        def open_one(path: str | os.PathLike[str], wanted: Literal["teacher", "student"] = "student") -> OpenedModel:
            if (named := _BY_NAME.fullmatch(os.fspath(path))) is not None:
                return _open_backbone(loader, *named.groups(), is_pretrained=pretrained)
            allowed = {"plugins": plugins, "trust_engines": trust_engines}
            file = argument_path(path)

            def open_for(config: Config) -> OpenedModel:
                view = view_of(config, "distill")
                if is_checkpoint(file):
                    model = open_checkpoint(file, config, loader, split, wanted=wanted, **allowed)
                else:
                    model, view = _open_file(file, config, split, loader, **allowed)
                views[os.fspath(path)] = view
                return model

            model = _open_for_each(configs, open_for, stack)
            assert model is not None
            return model

        opened: dict[str, OpenedModel] = {}
        reference: nn.Module | Teacher | None = None
        if teacher == "config":
            if config.teacher is not None:
                report("opening the teacher of the config")

            def open_own(config: Config) -> OpenedModel | None:
                return open_logits_teacher(config, split, loader, plugins, trust_engines, is_required=not models)

            own = _open_for_each(configs, open_own, stack)
            if own is not None:
                reference = own.model
                opened[TEACHER] = own
        elif teacher is not None:
            named = open_one(teacher, "teacher")
            reference = named.model
            if os.fspath(teacher) not in [os.fspath(path) for path in models]:
                opened[os.fspath(teacher)] = named
        opened |= {os.fspath(path): open_one(path) for path in models}
        if not opened:
            raise ConfigError("there is nothing to compare: name a run, an ONNX file or an engine")
        own_bank = None if bank in (None, split) else stack.enter_context(_open_bank(config, bank, loader, plugins))
        return compare(
            {name: each.model for name, each in opened.items()},
            loader,
            reference=reference,
            metrics=opened_metrics,
            files={name: each.files for name, each in opened.items()},
            bank=own_bank,
            views=views,
            sizes=None if at is None else at.view_names,
            report=report,
        )


def _open_for_each(
    configs: Mapping[tuple[int, int], Config], open_for: Callable[[Config], OpenedModel | None], stack: ExitStack
) -> OpenedModel | None:
    """A model that `stack` closes, opened for images of each height and width; a network takes them all as it is.

    Raises:
        TeacherError: it cannot be opened for one of several sizes; names this.
    """
    opened: dict[tuple[int, int], OpenedModel] = {}
    for (height, width), config in configs.items():
        try:
            model = open_for(config)
        except TeacherError as exc:
            if len(configs) == 1:
                raise
            raise type(exc)(f"for images of {height} x {width}: {exc}; or leave out this size") from exc
        if model is None:
            return None
        stack.callback(model.close)
        if isinstance(model.model, nn.Module) or len(configs) == 1:
            return model
        opened[height, width] = model
    first = next(iter(opened.values()))
    teachers = {size: each.model for size, each in opened.items() if isinstance(each.model, Teacher)}
    return replace(first, model=SizedTeacher(teachers))


def _of_classes(loader: KDDataLoader) -> str:
    return f" of {loader.num_classes} classes" if loader.num_classes else ""


def _open_backbone(
    loader: KDDataLoader, library: str, name: str, checkpoint: str | None, *, is_pretrained: bool
) -> OpenedModel:
    """A network without a head by name, for the images of `loader`."""
    file = None if checkpoint is None else argument_path(checkpoint)
    try:
        settings = ModelSettings.model_validate(
            {library: name, "num_classes": 0, "checkpoint": file, "pretrained": is_pretrained and file is None}
        )
    except ValidationError as error:
        raise ConfigError(f"{library}:{name}: {error.errors()[0]['msg']}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = open_model(settings)
    adapter = _adapter(network, loader.transform, is_pretrained=bool(settings.pretrained))
    network = network if adapter is None else nn.Sequential(InputAdapterLayer(adapter), network)
    network = network.to(loader.device, getattr(torch, loader.transform.dtype)).eval()
    return OpenedModel(network, None, () if file is None else (file,), lambda: None)


def _adapter(network: nn.Module, images: TrainTransform | EvalTransform, *, is_pretrained: bool) -> InputAdapter | None:
    """Makes the images that a backbone by name expects of those of the data.

    Pretrained weights expect the normalization of their training, and others that of the data. Some networks of timm
    take one size only.
    """
    own = Normalization(images.mean, images.std)
    known = pretrained_input(network)
    wanted = own
    if is_pretrained:
        wanted = Normalization() if known is None else Normalization(known.mean, known.std)  # torchvision's
    size = None if known is None or not known.fixed_input_size else known.size
    size = None if size == images.height_width else size
    if wanted == own and size is None:
        return None
    return ExpectedInput(mean=wanted.mean, std=wanted.std, size=size).adapter(own)


def _open_file(
    file: Path,
    config: Config,
    split: str,
    loader: KDDataLoader,
    *,
    plugins: Collection[str],
    trust_engines: Collection[str],
) -> tuple[OpenedModel, str]:
    """The model in `file`, and the view that it sees: the student's, or another of the config whose images it takes."""
    failure: TeacherError | None = None
    others = [*sorted(config.seen_views & config.data.split(split).views.keys()), IMAGES]
    for name in dict.fromkeys([view_of(config, "distill"), *others]):
        view = config.data.view(split, name)
        try:
            opened = open_model_file(
                file,
                image_shape=view.image_shape,
                device=loader.device,
                dtype=getattr(torch, view.normalize.dtype),
                classes=loader.classes,
                plugins=plugins,
                trust_engines=trust_engines,
            )
        except TeacherError as exc:
            failure = failure or exc
            continue
        if isinstance(opened.model, Teacher):
            opened.model.view = name
        return opened, name
    assert failure is not None
    raise failure


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


def open_logits_teacher(
    config: Config,
    split: str,
    loader: KDDataLoader,
    plugins: Collection[str],
    trust_engines: Collection[str],
    *,
    is_required: bool,
) -> OpenedModel | None:
    """The teacher of `config`; None if it has none that can run.

    Raises:
        ConfigError, TeacherError: that, if it is required.
    """
    if config.teacher is None and not is_required:
        return None
    try:
        if config.teacher is None:
            raise ConfigError(
                "there is nothing to compare: name a run, an ONNX file or an engine, or set teacher in the config"
            )
        if is_recording(config.teacher):
            raise ConfigError(
                f"the config's teacher is the recording {config.teacher.path}, which has outputs for training images "
                "only; name the teacher that was recorded with --teacher"
            )
        settings = config.teacher
        if isinstance(settings, TeacherSettings):
            settings = with_trained_weights(config, settings)
        begun_with = _runtimes_of(config)
        config = config.model_copy(
            update={"teacher": settings if begun_with is None else with_runtimes(settings, begun_with)}
        )
        teacher = open_config_teacher(
            config,
            loader.classes,
            plugins=plugins,
            trust_engines=trust_engines,
            split=split,
            source=loader.source,
            student_precision=student_precision(config),
        )
        if "logits" not in teacher.outputs:
            teacher.close()
            raise ConfigError(
                f"the config's teacher returns {', '.join(map(repr, teacher.outputs))}, and no logits to compare with"
            )
    except KDPipelineError as error:
        if is_required:
            raise
        _logger.warning("compared without the config's teacher: %s", error)
        return None
    assert isinstance(teacher, Teacher)  # and no recording
    members = members_of(settings)
    return OpenedModel(
        teacher, teacher.classes, tuple(file for each in members for file in _files(each)), teacher.close
    )


def _runtimes_of(config: Config) -> Sequence[str] | None:
    """Backend and precision of the teacher in the run of `config`, whose outputs are the ones to evaluate, if any."""
    if config.run_dir is None:
        return None
    checkpoint = RunFolder(stage_dir(config, "distill")).last_checkpoint
    try:
        return None if checkpoint is None else saved_runtimes(load_checkpoint(checkpoint)["run"])
    except (AttributeError, LookupError, StateError) as error:
        _logger.debug("the run in %s does not say how its teacher ran: %s", config.run_dir, error)
        return None


def _files(settings: TeacherSettings) -> list[Path]:
    """The files that a teacher is opened from."""
    checkpoint = None if settings.model is None else settings.model.checkpoint
    return [file for file in (settings.onnx, settings.engine, checkpoint) if file is not None]
