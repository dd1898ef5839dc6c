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

from kd_pipeline._core.files import read_regular
from kd_pipeline._core.progress import Report, timed
from kd_pipeline._core.text import printable
from kd_pipeline.config.config import Config
from kd_pipeline.data.settings import DataSettings
from kd_pipeline.data.sources import Source
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.errors import DataError, MissingPackageError, StateError
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.loader.config_teacher import sample_images
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.report.plots import plot_confusion, plot_curves, save_figure
from kd_pipeline.teachers.parity import CalibrationSet
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.workflows.exported import OwnNetwork, export_student

__all__ = ["eval_transform_like", "evaluation_split", "read_evaluations", "results_digest", "write_results"]

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
    split = evaluation_split(config.data)[0]
    images = sample_images(config, split, training=training, plugins=plugins)
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


def evaluation_split(data: DataSettings) -> tuple[str, EvalTransform]:
    """The split whose images the export is for: `val`, else `test`, else `train` with the usual transform."""
    for name, split in (("val", data.val), ("test", data.test)):
        if split is not None and isinstance(split.transform, EvalTransform):
            return name, split.transform
    return "train", eval_transform_like(data.split("train").transform)


def eval_transform_like(transform: TrainTransform | EvalTransform) -> EvalTransform:
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
