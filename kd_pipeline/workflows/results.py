"""The results of a run: `result.json`, the plots and the exported student, and whether they are up to date."""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.files import read_regular
from kd_pipeline._core.progress import Report, timed
from kd_pipeline._core.text import printable
from kd_pipeline.config.config import Config
from kd_pipeline.data.ops import CenterCrop
from kd_pipeline.data.settings import DataSettings
from kd_pipeline.data.sources import Source
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.views import EvalView, FollowingView, Views
from kd_pipeline.errors import DataError, MissingPackageError, StateError
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.loader.config_teacher import sample_images
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.report.plots import plot_confusion, plot_curves, save_figure
from kd_pipeline.teachers.parity import CalibrationSet
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.workflows.exported import OwnNetwork, export_student
from kd_pipeline.workflows.stage import view_of

__all__ = [
    "eval_transform_of",
    "evaluation_split",
    "read_evaluations",
    "repeatable_transform",
    "results_digest",
    "transforms_for_evaluation",
    "write_results",
]

_logger = logging.getLogger("kd_pipeline")

_MAX_BYTES = 2**25
"""Confusion matrices take about 12 bytes for each number. Larger results are made again rather than read."""


def results_digest(config: Config, identity: Mapping[str, Any], step: int) -> str:
    """A digest of all that the results of a run depend on.

    Args:
        config: of the run.
        identity: what its checkpoints hold about it, without which the results are of a different run.
        step: of the last checkpoint.
    """
    train, splits = config.train, config.data.splits
    content = {
        "step": step,
        "identity": {
            name: identity[name] for name in ("teacher", "classes", "data", "num_classes", "validation", "objects")
        },
        "splits": {name: splits[name].model_dump(mode="json", exclude={"source"}) for name in splits},
        "train": train.model_dump(mode="json", include={"limit_val_batches", "metrics", "validate", "export"}),
        "feature_probe": None if config.feature_probe is None else config.feature_probe.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_results(
    folder: RunFolder,
    config: Config,
    student: nn.Module,
    model: ModelSettings | OwnNetwork,
    evaluations: Mapping[str, Evaluation],
    *,
    classes: Sequence[str] | None,
    transform: EvalTransform | None,
    training: Source | None,
    plugins: Collection[str] = (),
) -> None:
    """Write `result.json`, the plots and the exported student.

    Args:
        folder: where to.
        config: of the run.
        student: the network; it is moved to the CPU, in float32 and in contiguous memory.
        model: how it is built, or what it is if the user's own code builds it.
        evaluations: its metrics by split.
        classes: names of the classes.
        transform: preprocessing of the images, if it is known.
        training: the source of the split `train` of the config.
        plugins: modules that the source of the images for the export may come from.
    """
    folder.write_result({name: each.to_dict() for name, each in evaluations.items()})
    with timed("plots") as report:
        _plot(folder, evaluations, report)
    export_student(
        student.float().cpu().to(memory_format=torch.contiguous_format).eval(),
        model,
        folder.exported,
        classes=classes,
        transform=transform,
        calibration_set=partial(_calibration_set, config, training, plugins),
        export=config.train.export,
    )


def _calibration_set(config: Config, training: Source | None, plugins: Collection[str]) -> CalibrationSet:
    view = view_of(config, config.stage)
    split = evaluation_split(config.data, view)[0]
    images = sample_images(config, split, training=training, plugins=plugins, view=view)
    return CalibrationSet(images, f"the split {split} of the run")


def read_evaluations(path: Path) -> dict[str, Evaluation]:
    """The contents of `result.json`.

    Raises:
        StateError: it cannot be read, or does not hold the results of a run.
    """
    try:
        # Not validate_json, each of whose errors holds a copy of what it is about.
        content = json.loads(read_regular(path, max_bytes=_MAX_BYTES))
        return TypeAdapter(dict[str, Evaluation]).validate_python(content)
    except OSError as exc:
        reason = exc.strerror
    except ValidationError as exc:
        reason = f"it does not hold the results of a run ({printable(exc.errors()[0]['msg'])[:200]})"
    except (ValueError, RecursionError) as exc:
        reason = f"it does not hold the results of a run ({printable(exc)[:200]})"
    raise StateError(f"{path} cannot be read: {reason}")


def _plot(folder: RunFolder, evaluations: Mapping[str, Evaluation], report: Report) -> None:
    """Plot the curves of the run and the confusion matrix of each split, if matplotlib is installed."""
    plots: dict[str, Callable[[], Any]] = {"curves": lambda: plot_curves(folder.metrics)}
    for name, each in evaluations.items():
        if each.confusion is not None:
            plots[f"confusion_{name}"] = partial(plot_confusion, each.confusion, each.classes)
    try:
        for number, (name, plot) in enumerate(plots.items()):
            report(number, len(plots))
            save_figure(plot(), folder.path / f"{name}.png")
    except (MissingPackageError, DataError, OSError) as exc:
        _logger.warning("no plots were saved: %s", exc)


def evaluation_split(data: DataSettings, view: str = IMAGES) -> tuple[str, EvalTransform]:
    """The split whose images the export is for: `val`, else `test`, else `train` with the usual transform.

    The transform is that of a view, by which the images of the split are all that it is of.
    """
    for name, split in (("val", data.val), ("test", data.test)):
        has_view = split is not None and view in (IMAGES, *split.views)
        if has_view and (transform := repeatable_transform(data, name, view)) is not None:
            return name, transform
    train = data.split("train")
    return "train", eval_transform_of(train.transform, Views.of(train.transform, train.views), view)


def transforms_for_evaluation(data: DataSettings) -> dict[str, Any]:
    """`transform` and `views` for an evaluation on the training images: those of `evaluation_split`, none random."""
    name, transform = evaluation_split(data)
    split = data.split(name)
    if name != "train":
        return {"transform": transform, "views": split.views}
    made = Views.of(split.transform, split.views)
    views = {
        view: settings
        if isinstance(settings, FollowingView) and settings.follow == IMAGES
        else EvalView(**eval_transform_of(split.transform, made, view).model_dump(exclude={"orientation"}))
        for view, settings in split.views.items()
    }
    return {"transform": transform, "views": views}


def eval_transform_of(transform: TrainTransform | EvalTransform, views: Views, view: str) -> EvalTransform:
    """The transform for evaluation that makes images like those of a view: the same ones, unless it is random.

    Args:
        transform: of the split.
        views: of the split, which `transform` and its other views make.
        view: one of them.
    """
    if view == IMAGES:
        return _eval_transform_like(transform)
    made = views[view]
    leader = views[made.leader or view]
    resize = None
    if isinstance(leader.crop, CenterCrop):  # the same window at another size
        scale = min(made.height_width) / min(leader.height_width)
        resize = max(round(leader.crop.shorter * scale), min(made.height_width))
    return EvalTransform.model_validate(
        {
            "size": made.height_width,
            "resize": resize,
            "interpolation": made.crop.interpolation,
            "mean": made.normalize.mean,
            "std": made.normalize.std,
            "dtype": made.normalize.dtype,
            "orientation": transform.orientation,
        }
    )


def repeatable_transform(data: DataSettings, split: str, view: str) -> EvalTransform | None:
    """The transform that makes a view of a split; None if it is random.

    Raises:
        ConfigError: there is no such split, or it has no such view.
    """
    made, settings = data.view(split, view), data.split(split)
    views = Views.of(settings.transform, settings.views)
    if not isinstance(views[made.leader or view].crop, CenterCrop):
        return None
    return eval_transform_of(settings.transform, views, view)


def _eval_transform_like(transform: TrainTransform | EvalTransform) -> EvalTransform:
    """The usual transform for evaluation that makes images of the same size and pixel values."""
    if isinstance(transform, EvalTransform):
        return transform
    return EvalTransform(
        size=transform.at_size().size,
        interpolation=transform.interpolation,
        mean=transform.mean,
        std=transform.std,
        dtype=transform.dtype,
        orientation=transform.orientation,
    )
