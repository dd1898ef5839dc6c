"""Open what is compared: runs, ONNX files, engines, checkpoints, backbones by name, and the config's own teacher."""

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
from kd_pipeline.config.config import Config
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.errors import ConfigError, KDPipelineError, StateError, TeacherError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.input_adapter import ExpectedInput, InputAdapter, InputAdapterLayer, Normalization
from kd_pipeline.models.registry import ModelSettings, open_model, pretrained_input
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.settings import AnyTeacherSettings, TeacherSettings, is_recording, members_of, with_runtimes
from kd_pipeline.teachers.sized import SizedTeacher
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.workflows.exported import OpenedModel, open_model_file
from kd_pipeline.workflows.open_checkpoint import is_checkpoint, open_checkpoint
from kd_pipeline.workflows.stage import stage_dir, view_of
from kd_pipeline.workflows.teacher import open_split_teacher, saved_runtimes, with_trained_weights

__all__ = ["ModelOpener", "open_logits_teacher"]

_logger = logging.getLogger("kd_pipeline")

_BY_NAME = re.compile(r"(timm|torchvision):([^=]+)(?:=(.+))?")
"""A backbone by name, and possibly a file with its weights."""


class ModelOpener:
    """Opens models for the images of a loader, at each of their sizes."""

    def __init__(
        self,
        configs: Mapping[tuple[int, int], Config],
        split: str,
        loader: KDDataLoader,
        stack: ExitStack,
        *,
        is_pretrained: bool,
        plugins: Collection[str],
        trust_engines: Collection[str],
    ) -> None:
        """Prepare to open models.

        Args:
            configs: the config for each height and width of the images.
            split: the split to evaluate on.
            loader: of the split.
            stack: closes the models.
            is_pretrained: whether backbones by name without a checkpoint have their pretrained weights.
            plugins: modules that factories may come from.
            trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        """
        self._configs, self._split, self._loader, self._stack = configs, split, loader, stack
        self._is_pretrained, self._plugins, self._trust_engines = is_pretrained, plugins, trust_engines
        self.views: dict[str, str] = {}
        """What networks see, by their names."""

    def open(self, path: str | os.PathLike[str], wanted: Literal["teacher", "student"] = "student") -> OpenedModel:
        """The model at a path, or a backbone by name.

        Args:
            path: as of `compare_files`.
            wanted: which network of the config to try a checkpoint with first.

        Raises:
            ConfigError, TeacherError: there is none, or it cannot be opened for these images.
        """
        if (named := _BY_NAME.fullmatch(os.fspath(path))) is not None:
            return _open_backbone(self._loader, *named.groups(), is_pretrained=self._is_pretrained)
        file = argument_path(path)
        allowed = {"plugins": self._plugins, "trust_engines": self._trust_engines}

        def open_for(config: Config) -> OpenedModel:
            view = view_of(config, "distill")
            if is_checkpoint(file):
                model = open_checkpoint(file, config, self._loader, self._split, wanted=wanted, **allowed)
            else:
                model, view = _open_file(file, config, self._split, self._loader, **allowed)
            self.views[os.fspath(path)] = view
            return model

        model = self._open_for_each(open_for)
        assert model is not None
        return model

    def open_teacher_of_config(self, *, is_required: bool) -> OpenedModel | None:
        """The teacher of the config; None if it has none that can run.

        Raises:
            ConfigError, TeacherError: that, if it is required.
        """
        return self._open_for_each(
            lambda config: open_logits_teacher(
                config, self._split, self._loader, self._plugins, self._trust_engines, is_required=is_required
            )
        )

    def _open_for_each(self, open_for: Callable[[Config], OpenedModel | None]) -> OpenedModel | None:
        """A model, opened for images of each height and width; a network takes them all as it is.

        Raises:
            TeacherError: it cannot be opened for one of several sizes; names this.
        """
        opened: dict[tuple[int, int], OpenedModel] = {}
        for (height, width), config in self._configs.items():
            try:
                model = open_for(config)
            except TeacherError as exc:
                if len(self._configs) == 1:
                    raise
                raise type(exc)(f"for images of {height} x {width}: {exc}; or leave out this size") from exc
            if model is None:
                return None
            self._stack.callback(model.close)
            if isinstance(model.model, nn.Module) or len(self._configs) == 1:
                return model
            opened[height, width] = model
        first = next(iter(opened.values()))
        teachers = {size: each.model for size, each in opened.items() if isinstance(each.model, Teacher)}
        return replace(first, model=SizedTeacher(teachers))


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
        settings = _teacher_settings(config)
        config = config.model_copy(update={"teacher": settings})
        teacher = open_split_teacher(config, split, loader, plugins=plugins, trust_engines=trust_engines)
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
    files = tuple(file for each in members_of(settings) for file in _files(each))
    return OpenedModel(teacher, teacher.classes, files, teacher.close)


def _teacher_settings(config: Config) -> AnyTeacherSettings:
    """The teacher of `config` with the weights of its run, and run as it was there.

    Raises:
        ConfigError: there is none, or it is a recording.
    """
    if config.teacher is None:
        raise ConfigError(
            "there is nothing to compare: name a run, an ONNX file or an engine, or set teacher in the config"
        )
    if is_recording(config.teacher):
        raise ConfigError(
            f"the config's teacher is the recording {config.teacher.path}, which has outputs for training images only; "
            "name the teacher that was recorded with --teacher"
        )
    settings = config.teacher
    if isinstance(settings, TeacherSettings):
        settings = with_trained_weights(config, settings)
    begun_with = _runtimes_of(config)
    return settings if begun_with is None else with_runtimes(settings, begun_with)


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
