"""The config of a backbone distillation without a config file: networks by name, and defaults for all the rest."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_pipeline._core.cpu_features import trains_faster_in_bf16
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.paths import argument_path
from kd_pipeline._core.ranks import world_size
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.config.config import Config
from kd_pipeline.config.reader import read_values
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.registry import known_input
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.teachers.settings import TeacherSettings

__all__ = ["Images", "distill_config", "parse_student", "parse_teacher", "run_name"]

_LIBRARIES = ("timm", "torchvision", "builtin", "factory")
_ONNX = "onnx"

_BATCH_SIZE = 128
"""Of all processes together; that of lightly-train."""
_MIN_STEPS = 4
"""Of an epoch: smaller datasets have smaller batches, as one batch of all images would be one step in each epoch."""
_LR, _LR_BATCH_SIZE = 1e-3, 128
"""AdamW's usual learning rate at that batch size; it grows with the square root of the batch, as DINOv2's."""
_WEIGHT_DECAY, _CLIP, _FINAL_FACTOR = 0.04, 3.0, 1e-3
_WARMUP_EPOCHS, _MAX_WARMUP_SHARE = 10, 0.1
"""These are DINOv2's, whose runs have 100 epochs; a shorter run warms up for a tenth of it."""
_MAX_PROBES = 20
"""Times that labeled images are classified during a run, which runs the student on all of them."""
_USUAL_SIZE = 224
_TRAIN_TRANSFORM = {
    "preset": "train",
    "area": [0.14, 1.0],
    "flip": 0.5,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grayscale": 0.2,
}
"""Crop, jitter and grayscale of lightly-train's distillation, whose jitter leaves out every fifth image."""


@dataclass(frozen=True, slots=True)
class Images:
    """The images of a run, each as `source` in a config."""

    train: Mapping[str, Any]
    """Source of the unlabeled training images."""
    val: Mapping[str, Any]
    """Source of unlabeled images that are held out."""
    bank: Mapping[str, Any] | None = None
    """Source of labeled images whose features are the k-NN's neighbors and the linear probe's training set."""
    queries: Mapping[str, Any] | None = None
    """Source of labeled images that are classified; None for every fifth one of the bank."""


def parse_teacher(name: str, weights: Path | None = None) -> dict[str, Any]:
    """The settings `teacher` of a config.

    Args:
        name: `timm:NAME`, `torchvision:NAME`, `builtin:NAME`, `factory:package.module:function` or `onnx:FILE`.
        weights: a checkpoint for a network; defaults to the pretrained weights of its library.

    Raises:
        ConfigError: not a name of this kind, or the weights are not there or do not go with it.
    """
    library, rest = _split("teacher", name, (*_LIBRARIES, _ONNX))
    if weights is not None and not weights.is_file():
        raise ConfigError(f"the teacher's weights {weights}: there is no such file; check the path")
    if library == _ONNX:
        path = argument_path(rest)
        if weights is not None:
            raise ConfigError(f"the teacher {name} has its own weights, and {weights} was given too; remove that")
        if not path.is_file():
            raise ConfigError(f"the teacher {name}: there is no such file; check the path")
        return {"onnx": str(path)}
    model: dict[str, Any] = {library: rest, "num_classes": 0}
    if weights is not None:
        model["checkpoint"] = str(weights)
    elif library == "factory":
        model["pretrained"] = False  # its weights are the function's business
    elif library != "builtin":  # which has none
        model["pretrained"] = True
    return {"model": model, **({"input_adapter": "auto"} if library == "timm" else {})}


def parse_student(name: str) -> dict[str, Any]:
    """The settings `student` of a config, without a head and with random weights.

    Args:
        name: `timm:NAME`, `torchvision:NAME`, `builtin:NAME` or `factory:package.module:function`.

    Raises:
        ConfigError: not a name of this kind.
    """
    if name.startswith(f"{_ONNX}:"):
        raise ConfigError(f"the student {name}: an ONNX file cannot be trained; name a network, such as timm:resnet18")
    library, rest = _split("student", name, _LIBRARIES)
    return {library: rest, "num_classes": 0}


def run_name(teacher: str, student: str) -> str:
    """The name of the default run folder, such as `vit_small_patch16_dinov3_to_resnet18`."""
    parts = (Path(name.partition(":")[2].replace(":", ".")) for name in (teacher, student))
    teacher, student = (re.sub(r"[^\w.-]+", "_", part.stem if part.suffix == ".onnx" else part.name) for part in parts)
    return f"{teacher}_to_{student}"


def distill_config(
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
    images: Images,
    *,
    run_dir: Path,
    epochs: int,
    num_train: int | None = None,
    overrides: Sequence[str] = (),
    plugins: Collection[str] = (),
) -> Config:
    """The whole config of a run; what nobody has set has the defaults that `docs/backbone.md` lists.

    The images have the student's size if it takes no other, else the teacher's, else 224. Learning rate, warm-up and
    the transforms of evaluation follow what `overrides` set of the others.

    Args:
        teacher: as `parse_teacher` returns it.
        student: as `parse_student` returns it.
        images: the images.
        run_dir: folder of the run.
        epochs: length of the run.
        num_train: number of training images, of which a batch has no more than a quarter; defaults to many.
        overrides: settings by name, each `key.path=value`, which come last.
        plugins: modules that a `factory` may come from.

    Raises:
        ConfigError: an override is wrong, there is no such network, or the student has a head.
        TeacherError: an ONNX file cannot be read.
    """
    values = _fixed_values(teacher, student, images, run_dir)
    values["train"]["epochs"] = epochs
    values["data"]["batch_size"] = max(1, _whole_batch(num_train) // world_size())
    config = read_values(Config, values, overrides, name="distill")
    _check_headless(config)
    _check_weights(config)
    values["data"]["train"]["transform"]["size"] = _image_size(config, plugins)
    # Read again each time: an override may have set what others follow.
    _complete(values, read_values(Config, values, overrides, name="distill"))
    return read_values(Config, values, overrides, name="distill")


def _whole_batch(num_train: int | None) -> int:
    """Images in a batch of all processes together: the usual number, halved until an epoch has several steps."""
    batch_size = _BATCH_SIZE
    while num_train is not None and batch_size > max(1, num_train // _MIN_STEPS):
        batch_size //= 2
    return batch_size


def _fixed_values(
    teacher: Mapping[str, Any], student: Mapping[str, Any], images: Images, run_dir: Path
) -> dict[str, Any]:
    """What depends on no other setting, and placeholders for the sizes."""
    splits = {"val": images.val} | ({} if images.bank is None else {"bank": images.bank})
    splits |= {} if images.queries is None else {"labeled": images.queries}
    evaluated = {
        name: {"source": dict(source), "transform": {"preset": "eval", "size": 1}} for name, source in splits.items()
    }
    data: dict[str, Any] = {
        "train": {"source": dict(images.train), "transform": {**_TRAIN_TRANSFORM, "size": _USUAL_SIZE}},
        "val": evaluated.pop("val"),
    }
    train: dict[str, Any] = {
        "optimizer": {},
        "schedule": {},
        "clip": _CLIP,
        "select_by": "val/loss",
        "select_mode": "min",
    }
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "data": data | ({"more": evaluated} if evaluated else {}),
        "teacher": dict(teacher),
        "student": dict(student),
        "train": train,
    }
    if images.bank is not None:
        queries = "bank" if images.queries is None else "labeled"
        values["feature_probe"] = {"bank": "bank", "sets": [queries]}
        train |= {"select_by": f"{queries}/knn_top1", "select_mode": "max"}
    return values


def _complete(values: dict[str, Any], config: Config) -> None:
    """Add to `values` what follows from other settings, as `config` has them."""
    train, settings = config.train, values["train"]
    batch_size = config.data.batch_size * world_size() * train.accumulate
    settings["optimizer"]["lr"] = float(f"{_LR * math.sqrt(batch_size / _LR_BATCH_SIZE):.3g}")
    if train.optimizer.name == "adamw":
        settings["optimizer"]["weight_decay"] = _WEIGHT_DECAY
    settings["schedule"]["warmup_epochs"] = min(_WARMUP_EPOCHS, train.epochs * _MAX_WARMUP_SHARE)
    if train.schedule.kind == "cosine":
        settings["schedule"]["final_factor"] = _FINAL_FACTOR
    settings["precision"] = _precision(config.data.device)
    if "feature_probe" in values:
        values["feature_probe"]["every"] = max(1, train.epochs // _MAX_PROBES)
    transform = config.data.split("train").transform.at_size()
    for split in (values["data"]["val"], *values["data"].get("more", {}).values()):
        for field in ("size", "interpolation", "mean", "std", "dtype", "orientation"):
            value = getattr(transform, field)
            if value == "random":  # evaluation is not
                value = "bilinear"
            split["transform"][field] = list(value) if isinstance(value, tuple) else value


def _precision(device: str) -> str:
    """bf16 where it is faster; else float32."""
    resolved = resolve_device(device)
    if resolved.type == "cuda":
        is_faster = torch.cuda.get_device_capability(resolved) >= (8, 0)
    else:
        is_faster = trains_faster_in_bf16()
    return "bf16-mixed" if is_faster else "32-true"


def _check_headless(config: Config) -> None:
    if config.student is None or not config.student.is_headless:
        given = None if config.student is None else config.student.num_classes
        raise ConfigError(
            f"student.num_classes is {given}, and distill trains a backbone without a head; remove it, and train a "
            "head on the result with kd-pipeline train, as docs/backbone.md shows"
        )


def _check_weights(config: Config) -> None:
    """Refuse a network of this package as teacher, which has random weights, where nobody asked for them."""
    model = config.teacher.model if isinstance(config.teacher, TeacherSettings) else None
    if model is not None and model.builtin and model.checkpoint is None and model.pretrained is None:
        raise ConfigError(
            f"the teacher builtin:{model.builtin} has no pretrained weights; give a file with --teacher-weights FILE "
            "(in Python teacher_weights=FILE), or ask for random ones with teacher.model.pretrained=false"
        )


def _image_size(config: Config, plugins: Collection[str]) -> int:
    assert config.student is not None
    student = known_input(config.student, plugins=plugins)
    teacher = _teacher_size(config, plugins)
    if student is not None and student.fixed_input_size:
        return max(student.size)
    return _USUAL_SIZE if teacher is None else teacher


def _teacher_size(config: Config, plugins: Collection[str]) -> int | None:
    if not isinstance(config.teacher, TeacherSettings):
        return None
    if config.teacher.model is not None:
        known = known_input(config.teacher.model, plugins=plugins)
        return None if known is None else max(known.size)
    if config.teacher.onnx is not None:
        shape = read_onnx(config.teacher.onnx).images.shape
        return shape[2] if len(shape) == 4 else None
    return None


def _split(role: str, name: str, libraries: Sequence[str]) -> tuple[str, str]:
    """Library and name of a network."""
    library, colon, rest = name.partition(":")
    forms = ", ".join(f"{each}:{'FILE' if each == _ONNX else 'NAME'}" for each in libraries)
    if not colon:
        raise ConfigError(f"the {role} {name!r} does not say where it is from; write timm:{name}, or one of {forms}")
    if library not in libraries:
        advice = suggest(library, libraries, otherwise=f"write one of {forms}")
        raise ConfigError(f"the {role} {name!r}: there is no {library!r} to take it from{advice}")
    if not rest:
        raise ConfigError(f"the {role} {name!r} lacks a name; write one of {forms}")
    return library, rest
