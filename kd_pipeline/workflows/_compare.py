"""Compare saved models on a split of a config: runs, ONNX files and engines."""

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from kd_pipeline.config.config import Config
from kd_pipeline.evaluation._compare import Comparison, compare
from kd_pipeline.evaluation._evaluate import MetricSettings, open_metrics
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.workflows.exported import OpenedModel, open_model_file

__all__ = ["compare_files"]


def compare_files(
    config: Config,
    models: Sequence[str | os.PathLike[str]],
    *,
    split: str = "val",
    teacher: str | os.PathLike[str] | None = None,
    metrics: Sequence[MetricSettings] = (),
    plugins: Collection[str] = (),
    report: Callable[[str], object] = lambda line: None,
) -> Comparison:
    """Open the models, match their classes to those of the data, and compare them on a split of `config`.

    Args:
        config: describes the data; its own teacher is not opened.
        models: folders of finished runs, ONNX files and engines; the rows are named as these are written.
        split: the split.
        teacher: the model to measure agreement with; defaults to none.
        metrics: further metrics.
        plugins: modules that factories and custom metrics may come from.
        report: called with a line of progress for each model.

    Raises:
        ConfigError: there is no such model or split, or a metric is unknown.
        DataError, TeacherError: the data or a model cannot be read, or they do not fit together.
    """
    opened_metrics = open_metrics(metrics, plugins=plugins)
    with ExitStack() as stack:
        loader = stack.enter_context(KDDataLoader.from_config(config, split, teacher=None, run_dir=None))
        transform = loader.transform

        def open_one(path: str | os.PathLike[str]) -> OpenedModel:
            model = open_model_file(
                Path(path),
                size=transform.size,
                device=loader.device,
                dtype=getattr(torch, transform.dtype),
                classes=loader.classes,
                plugins=plugins,
            )
            stack.callback(model.close)
            return model

        reference = None if teacher is None else open_one(teacher).model
        opened = {os.fspath(path): open_one(path) for path in models}
        return compare(
            {name: each.model for name, each in opened.items()},
            loader,
            reference=reference,
            metrics=opened_metrics,
            files={name: each.files for name, each in opened.items()},
            report=report,
        )
