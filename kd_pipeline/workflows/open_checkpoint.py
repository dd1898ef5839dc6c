"""Open a file with weights alone as the teacher or the student of a config, whichever network it fits."""

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import torch

from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.workflows.exported import CHECKPOINTS, OpenedModel, no_model
from kd_pipeline.workflows.stage import normalization_of, view_of
from kd_pipeline.workflows.teacher import open_split_teacher

__all__ = ["is_checkpoint", "open_checkpoint"]

_Role = Literal["teacher", "student"]
_KEYS: dict[_Role, str] = {"teacher": "teacher.model", "student": "student"}


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a file that by its suffix holds weights without a network."""
    return path.suffix in CHECKPOINTS and path.is_file()


def open_checkpoint(
    path: Path,
    config: Config,
    loader: KDDataLoader,
    split: str,
    *,
    wanted: _Role = "student",
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
) -> OpenedModel:
    """Load the checkpoint into `teacher.model` of the config, or into its student, for the images of `loader`.

    A teacher gets its input adapter, and runs as it would in a training. Of two networks of one kind, both of which the
    weights fit, `wanted` is taken.

    Args:
        path: the file.
        config: names the networks.
        loader: the split to evaluate on.
        split: its name.
        wanted: which network to try first.
        plugins: modules that factories in the config may come from.
        trust_engines: as in `open_teacher`.

    Raises:
        ConfigError: the config names no network, or the weights fit none of them.
        TeacherError: the teacher cannot be run on these images.
    """
    networks = _networks(config, path)
    if not networks:
        raise ConfigError(no_model(path))
    reasons = []
    for role in sorted(networks, key=lambda role: role != wanted):
        try:
            view = view_of(config, "distill")
            images = normalization_of(loader, view)
            network = open_model(networks[role], plugins=plugins, is_deployed=role == "student", images=images)
        except ConfigError as error:
            reasons.append(f"{_KEYS[role]}: {error}")
            continue
        if role == "teacher":
            return _open_teacher(networks[role], path, config, loader, split, plugins, trust_engines)
        dtype = getattr(torch, config.data.view(split, view).normalize.dtype)
        network = network.to(loader.device, dtype).eval()
        return OpenedModel(network, loader.classes, (path,), lambda: None)
    if len(reasons) == 1:
        raise ConfigError(reasons[0])
    raise ConfigError(f"{path} fits neither network of the config. {'. '.join(reasons)}")


def _networks(config: Config, path: Path) -> dict[_Role, ModelSettings]:
    """The networks of `config` with the weights of `path`."""
    found: dict[_Role, ModelSettings] = {}
    weights = {"checkpoint": path, "checkpoint_key": None, "pretrained": None, "reset": (), "checkpoint_match": "all"}
    if isinstance(config.teacher, TeacherSettings) and config.teacher.model is not None:
        model = config.teacher.model
        # How to find the weights in a file may be said of this one.
        how = ("checkpoint_key", "checkpoint_match") if model.checkpoint == path else ()
        found["teacher"] = model.model_copy(update=weights | {name: getattr(model, name) for name in how})
    if config.student is not None:
        found["student"] = config.student.model_copy(update=weights)
    return found


def _open_teacher(
    model: ModelSettings,
    path: Path,
    config: Config,
    loader: KDDataLoader,
    split: str,
    plugins: Collection[str],
    trust_engines: Collection[str],
) -> OpenedModel:
    assert isinstance(config.teacher, TeacherSettings)
    settings = config.teacher.model_copy(update={"model": model})
    config = config.model_copy(update={"teacher": settings})
    teacher = open_split_teacher(config, split, loader, plugins=plugins, trust_engines=trust_engines)
    return OpenedModel(teacher, teacher.classes, (path,), teacher.close)
