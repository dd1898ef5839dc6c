"""Distill a backbone by one call: hold out images, settle the config, and train."""

import json
import os
import shlex
from collections.abc import Callable, Collection, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.paths import argument_path
from kd_pipeline._core.ranks import is_rank_zero
from kd_pipeline._core.suggestions import first_few
from kd_pipeline._core.terminal_log import log_line, log_to_terminal
from kd_pipeline._core.text import printable
from kd_pipeline.config.config import Config
from kd_pipeline.data.sources.files.image_folder import ImageFolder
from kd_pipeline.errors import DataError
from kd_pipeline.training.distributed import init_distributed, is_restart, on_rank_zero
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.workflows._train import TrainResult, train
from kd_pipeline.workflows.distill_config import Images, distill_config, parse_student, parse_teacher, run_name

__all__ = ["distill"]

_TRAIN_LIST, _VAL_LIST = "train.jsonl", "val.jsonl"
_MAX_HELD_OUT, _MAX_HELD_OUT_SHARE = 2000, 0.05
"""Of the images, for validation."""
_BANKS = ("train", "training")
_QUERIES = ("val", "valid", "validation", "test")
"""Names of folders with the two halves of a labeled dataset."""


@log_to_terminal()
def distill(
    teacher: str,
    student: str,
    data: str | PathLike[str],
    *,
    labeled: str | PathLike[str] | None = None,
    epochs: int = 100,
    out: str | PathLike[str] | None = None,
    teacher_weights: str | PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    fresh: bool = False,
    report: Callable[[str], object] | None = None,
) -> TrainResult:
    """Train a backbone to have the features of a pretrained one, on images without labels, with sensible defaults.

    At most 2,000 of the images, or every twentieth, are held out for validation; which ones is in `lists/` of the run
    folder. The config is in its `config.yaml`, and `train` resumes the run with it.

    Args:
        teacher: `timm:NAME`, `torchvision:NAME`, `builtin:NAME`, `factory:package.module:function` or `onnx:FILE`.
        student: the same, but for ONNX; it starts from random weights, unless `student.pretrained=true` is an override.
        data: a folder with images at any depth.
        labeled: a folder of class folders, or with such folders `train` and `val`, for a k-NN and a linear probe on the
            features, which also choose the best student. Without `val` every fifth image is classified.
        epochs: length of the run.
        out: the run folder; defaults to one in `runs/` named after teacher and student.
        teacher_weights: a checkpoint for the teacher; defaults to the pretrained weights of its library.
        overrides: settings of the config, each `key.path=value`.
        plugins: modules that factories in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        fresh: start from the beginning, and move the files of an earlier run away, as in `train`.
        report: called on rank zero with lines about the run, as in `train`; without it they are logged.

    Raises:
        ConfigError: there is no such network or file, or a setting is wrong.
        DataError: a folder lacks images or classes, or the student would be evaluated on its training images.
        StateError: the folder holds a run that this one would not continue.
        SystemExit: a signal stopped the run, which was saved, as in `train`.
    """
    folder = argument_path(f"runs/{run_name(teacher, student)}" if out is None else out)
    weights = None if teacher_weights is None else argument_path(teacher_weights)
    models = parse_teacher(teacher, weights), parse_student(student)
    root = argument_path(data)
    classified = {} if labeled is None else _labeled_sources(argument_path(labeled), root)
    images = Images(**_list_sources(folder, root), **classified)

    def config_for(num_train: int | None) -> Config:
        return distill_config(
            *models, images, run_dir=folder, epochs=epochs, num_train=num_train, overrides=overrides, plugins=plugins
        )

    config = config_for(None)  # a typo should not wait for a million images
    init_distributed(config.data.device)
    source = ImageFolder(root, labeled=False)
    is_held_out = _held_out(source)
    lists = {_TRAIN_LIST: _list(source, root, ~is_held_out), _VAL_LIST: _list(source, root, is_held_out)}
    on_rank_zero(lambda: RunFolder(folder).write_lists(lists, fresh=fresh and not is_restart()))
    if is_rank_zero():
        again = f"kd-pipeline train -c {shlex.quote(str(folder / 'config.yaml'))}"
        (report or log_line)(f"run folder: {folder}; to resume, run the same again, or {again}")
    config = config_for(int((~is_held_out).sum()))
    return train(config, plugins=plugins, trust_engines=trust_engines, fresh=fresh, report=report)


def _list_sources(folder: Path, root: Path) -> dict[str, Any]:
    """The sources `train` and `val` of the lists in a run's folder."""
    lists = RunFolder(folder).lists
    return {
        name: {"kind": "file_list", "path": str(lists / file), "root": str(root)}
        for name, file in (("train", _TRAIN_LIST), ("val", _VAL_LIST))
    }


def _held_out(source: ImageFolder) -> NDArray[np.bool_]:
    """`[N]`: which images are for validation: evenly spaced ones, so every folder gives its share.

    Raises:
        DataError: there is only one.
    """
    if len(source) < 2:
        raise DataError(f"{source.name(0)} is the only image, and one is held out for validation; add more")
    count = max(1, min(_MAX_HELD_OUT, int(len(source) * _MAX_HELD_OUT_SHARE)))
    is_held_out = np.zeros(len(source), dtype=bool)
    is_held_out[(2 * np.arange(count) + 1) * len(source) // (2 * count)] = True
    return is_held_out


def _list(source: ImageFolder, root: Path, is_listed: NDArray[np.bool_]) -> str:
    """The lines of a JSONL list of these images, relative to the root.

    Raises:
        DataError: a name is not UTF-8, as the names in a list are.
    """
    start = len(os.path.join(os.path.abspath(root), ""))
    names = [source.name(row)[start:] for row in np.flatnonzero(is_listed).tolist()]
    text = "".join(f"{json.dumps({'path': name}, ensure_ascii=False)}\n" for name in names)
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        number = text.count("\n", 0, exc.start)
        raise DataError(f"{root}: the name of {printable(names[number])} is not UTF-8; rename the file") from None
    return text


def _labeled_sources(root: Path, data: Path) -> dict[str, Any]:
    """The sources `bank` and `queries` of a folder of class folders, or of two such folders.

    Raises:
        DataError: there are no class folders, or the student would learn from images that are classified.
    """
    halves = _halves(root)
    bank, queries = (root, root) if halves is None else halves
    _check_apart(queries, data)
    names = [_class_folders(folder) for folder in (bank, queries)]
    if unknown := sorted(set(names[1]) - set(names[0])):
        raise DataError(f"{queries}: classes that {bank} does not have: {first_few(unknown)}; add images of them there")
    source: dict[str, Any] = {"kind": "image_folder", "root": str(bank)}
    if halves is None:
        return {"bank": source}
    # A class without queries would shift the labels of those after it.
    classes = {} if names[0] == names[1] else {"classes": names[0]}
    return {"bank": source | classes, "queries": source | classes | {"root": str(queries)}}


def _halves(root: Path) -> tuple[Path, Path] | None:
    """The folders of the bank and of the queries, if `root` has such."""
    for bank in _BANKS:
        for queries in _QUERIES:
            if (root / bank).is_dir() and (root / queries).is_dir():
                return root / bank, root / queries
    return None


def _class_folders(root: Path) -> list[str]:
    """The names of the class folders, in order."""
    classes = ImageFolder(root).classes
    assert classes is not None
    return list(classes)


def _check_apart(queries: Path, data: Path) -> None:
    """Refuse to classify images from which the student learns."""
    inner, outer = queries.resolve(), data.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise DataError(
            f"the labeled images in {queries} are also among those in {data} that the student learns from, and say "
            "nothing about new ones; keep them in a folder of their own, such as train and val below one folder, with "
            "the data train and the labeled folder the one above"
        )
