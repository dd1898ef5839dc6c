"""What a recording will hold: which outputs, how they are stored, how many bytes they take, and whether they fit."""

import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from kd_pipeline._core.settings import Settings
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.losses.ramp import max_value
from kd_pipeline.teachers.recorded.manifest import LOGITS, RecordedDtype, RecordedOutput, RecordingManifest, is_logits

__all__ = [
    "RecordSettings",
    "RecordingPlan",
    "existing_bytes",
    "format_bytes",
    "free_bytes",
    "loss_outputs",
    "stored_outputs",
    "with_outputs",
]

_logger = logging.getLogger("kd_pipeline")

_SMALL_TOP_K = 16
"""Suggested where a recording does not fit."""
_MAX_OPTIONS = 4
"""Of what is suggested."""
_RATE = 1000
"""Images per second for which the plan says how much training reads."""


class RecordSettings(Settings):
    """Which outputs to keep and how, for how many epochs, and where."""

    outputs: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the teacher's outputs to keep, such as `pooled spatial`. Defaults to those that the loss of the config
    compares, and to all of them for a config without a student."""
    dtype: RecordedDtype = "float32"
    """Of the outputs in the files. Training with float32 and whole outputs gives exactly the weights of a live teacher.
    `int8` stores each vector, token or position of a map with its own scale, and logits as float16."""
    grid: int | None = Field(default=None, ge=1)
    """Average maps and tokens over areas to maps of at most so many rows and columns, without the tokens' prefix."""
    top_k: int | None = Field(default=None, ge=1)
    """Keep only the largest logits of an image; the other classes share the rest of the probability."""
    epochs: int | None = Field(default=None, ge=1)
    """Epochs to record; defaults to `train.epochs`."""
    out: Path | None = None
    """The folder; defaults to `recording` in `run_dir`."""


@dataclass(frozen=True, slots=True)
class RecordingPlan:
    """What a recording takes, before it starts."""

    folder: Path
    settings: RecordSettings
    teacher_outputs: Mapping[str, TensorSpec]
    """Of the teacher, which may have more than are recorded."""
    manifest: RecordingManifest
    """With the number of images, of epochs, and the shape and dtype of each output."""
    existing_bytes: int
    """What an earlier recording in the folder has on the disk already."""
    free_bytes: int
    """Of the disk."""
    num_epochs_done: int | None
    """Complete epochs of the recording in the folder, which is resumed; None if there is none."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all epochs in the end."""
        return self.manifest.num_bytes

    @property
    def missing_bytes(self) -> int:
        """Bytes that the disk has to have free."""
        return max(0, self.num_bytes - self.existing_bytes)

    @property
    def bytes_per_s(self) -> float:
        """What training on the recording reads per second at 1,000 images per second."""
        return self.manifest.row_bytes * _RATE

    @property
    def lines(self) -> tuple[str, ...]:
        """The plan for people."""
        manifest = self.manifest
        per_epoch = manifest.row_bytes * manifest.num_rows
        exists = f", {format_bytes(self.existing_bytes)} of it exists" if self.num_epochs_done is not None else ""
        total = f"{format_bytes(self.num_bytes)} in all ({format_bytes(per_epoch)} per epoch{exists})"
        images = f"{manifest.num_rows:,} images x {manifest.epochs:,} epoch{'s' if manifest.epochs > 1 else ''}"
        rows = [
            f"{name} {list(stored.shape)} {stored.dtype}{_change(stored)}: {num_bytes:,} bytes per image"
            for (name, stored), num_bytes in zip(manifest.outputs.items(), manifest.output_bytes.values(), strict=True)
        ]
        left_out = [name for name in self.teacher_outputs if name not in manifest.outputs]
        return (
            f"recording {images} in {self.folder}: {total}; {format_bytes(self.free_bytes)} are free",
            *rows,
            *([f"not recorded: {', '.join(left_out)}"] if left_out else []),
            f"training reads {format_bytes(self.bytes_per_s)}/s at {_RATE:,} images/s",
        )

    def require_space(self) -> None:
        """Refuse a recording that does not fit on the disk.

        Raises:
            ConfigError: says how much it needs, how much is free and what would fit.
        """
        if self.missing_bytes <= self.free_bytes:
            return
        manifest = self.manifest
        raise ConfigError(
            f"the recording needs {format_bytes(self.missing_bytes)} more in {self.folder} ({manifest.num_rows} images "
            f"x {manifest.epochs} epochs x {manifest.row_bytes} bytes) and {format_bytes(self.free_bytes)} are free; "
            f"{self._advice()}. Or use a different disk with --out"
        )

    def _advice(self) -> str:
        available = self.free_bytes + self.existing_bytes
        options = list(self._smaller())
        fitting = [each for each in options if each[1] <= available][:_MAX_OPTIONS]
        if fitting:
            return "what fits: " + ", ".join(f"{option} ({format_bytes(size)})" for option, size in fitting)
        if not options:
            return "free some space"
        option, size = min(options, key=lambda each: each[1])
        return f"nothing smaller fits, and even {option} takes {format_bytes(size)}"

    def _smaller(self) -> list[tuple[str, int]]:
        """Options for smaller recordings with their bytes: those with the fewest changes first, large ones first."""
        manifest, epoch_bytes = self.manifest, self.manifest.row_bytes * self.manifest.num_rows
        epochs = min((self.free_bytes + self.existing_bytes) // epoch_bytes, manifest.epochs)
        shorter = [(f"--epochs {epochs}", epochs * epoch_bytes)] if (self.num_epochs_done or 0) < epochs else []
        if self.num_epochs_done is not None:
            return shorter  # anything else would be another recording
        base = self.settings.model_copy(update={"outputs": tuple(manifest.outputs)})
        found: dict[int, str] = {}
        for changes in sorted(self._changes(), key=len):
            outputs = stored_outputs(self.teacher_outputs, base.model_copy(update=changes))
            num_bytes = manifest.model_copy(update={"outputs": outputs}).num_bytes
            if num_bytes < self.num_bytes:
                found.setdefault(num_bytes, _options(changes))
        num_options = {size: option.count("--") for size, option in found.items()}
        smaller = sorted(found, key=lambda size: (num_options[size], -size))
        return [*((found[size], size) for size in smaller), *shorter]

    def _changes(self) -> list[dict[str, Any]]:
        """Changes of the settings, in all combinations; some have no effect."""
        stored = self.manifest.outputs
        dtypes = ["float16"] if all(map(is_logits, stored)) else ["float16", "int8"]
        has_many = any(is_logits(name) and each.shape[0] > _SMALL_TOP_K for name, each in stored.items())
        side = max(_side(each) or 0 for each in stored.values())
        largest = max(self.manifest.output_bytes.items(), key=lambda each: each[1])[0]
        kinds: list[list[dict[str, Any]]] = [
            [{}, *({"dtype": dtype} for dtype in dtypes)],
            [{}, *([{"top_k": _SMALL_TOP_K}] if has_many else [])],
            [{}, *([{"grid": side // 2}] if side > 1 else [])],
            [{}, *([{"outputs": tuple(name for name in stored if name != largest)}] if len(stored) > 1 else [])],
        ]
        combined = ({name: value for each in chosen for name, value in each.items()} for chosen in product(*kinds))
        return [each for each in combined if "top_k" not in each or any(map(is_logits, each.get("outputs", stored)))]


def loss_outputs(config: Config) -> tuple[str, ...] | None:
    """The teacher's outputs that the loss of `config` compares; None if that is unknown.

    It is for a loss of the user's own, and for a config that has neither a student nor a loss.
    """
    distill = config.distill
    compares_logits = max_value(distill.weights[0]) > 0
    if (config.student is None and "distill" not in config.model_fields_set) or (
        compares_logits and distill.has_custom_loss
    ):
        return None
    terms = [term.teacher for term in distill.features if max_value(term.weight)]
    return tuple(dict.fromkeys([LOGITS, *terms] if compares_logits else terms))


def with_outputs(settings: RecordSettings, config: Config, teacher_outputs: Mapping[str, TensorSpec]) -> RecordSettings:
    """`settings` that name the outputs to record: those that the loss of `config` compares, unless they are named."""
    needed = loss_outputs(config)
    if settings.outputs is None:
        is_known = bool(needed) and all(name in teacher_outputs for name in needed or ())
        return settings.model_copy(update={"outputs": needed if is_known else tuple(teacher_outputs)})
    missing = [name for name in needed or () if name not in settings.outputs]
    if missing and teacher_outputs.keys() >= set(settings.outputs):
        _logger.warning(
            "the loss of this config compares %s too, which --outputs leaves out: training with this recording needs "
            "another distill.features, or the output",
            " and ".join(missing),
        )
    return settings


def stored_outputs(teacher_outputs: Mapping[str, TensorSpec], settings: RecordSettings) -> dict[str, RecordedOutput]:
    """How `settings` store the outputs that they name, or all of them.

    Raises:
        ConfigError: there is no such output, or a setting does not fit it.
        TeacherError: the shape of an output is open, or unlike that of any output.
    """
    names = tuple(teacher_outputs) if settings.outputs is None else tuple(dict.fromkeys(settings.outputs))
    for name in names:
        if name not in teacher_outputs:
            raise ConfigError(
                f"--outputs: the teacher has no output called {name!r}; it returns {_described(teacher_outputs)}"
            )
    if settings.top_k is not None and not any(map(is_logits, names)):
        raise ConfigError(f"--top-k keeps the largest logits, and {', '.join(names)} are none; leave it out")
    return {name: _stored(name, teacher_outputs[name], settings) for name in names}


def format_bytes(num_bytes: float) -> str:
    """A size such as `2.5 GB`."""
    size, units = float(num_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def existing_bytes(folder: Path, manifest: RecordingManifest) -> int:
    """What the files of a recording take on the disk, without the holes of what is not written yet."""
    files = [folder / column.file for column in manifest.columns.values()]
    return sum(file.stat().st_blocks * 512 for file in files if file.exists())


def free_bytes(folder: Path) -> int:
    """Of the disk of `folder`, which need not exist."""
    parent = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(each))
    return shutil.disk_usage(parent).free


def _stored(name: str, spec: TensorSpec, settings: RecordSettings) -> RecordedOutput:
    sizes = spec.shape[1:]
    if None in sizes:
        raise TeacherError(f"the shape of the teacher's {name!r} is not fixed; export it with fixed sizes")
    shape = tuple(size for size in sizes if size is not None)
    if not 1 <= len(shape) <= 3:
        raise TeacherError(
            f"the teacher's {name!r} is {spec}, neither a vector, nor tokens or a map, and cannot be recorded; name "
            "the others with --outputs"
        )
    if is_logits(name):
        if settings.top_k is not None and settings.top_k >= shape[0]:
            raise ConfigError(
                f"--top-k must be below the number of classes, got {settings.top_k} of {shape[0]}; leave it out for all"
            )
        dtype: RecordedDtype = "float16" if settings.dtype == "int8" else settings.dtype
        return RecordedOutput(shape=shape, dtype=dtype, top_k=settings.top_k)
    prefix = spec.num_prefix_tokens if len(shape) == 2 else None
    stored = RecordedOutput(shape=shape, dtype=settings.dtype, num_prefix_tokens=prefix)
    return stored if settings.grid is None or len(shape) == 1 else _at_grid(name, stored, settings.grid)


def _at_grid(name: str, stored: RecordedOutput, grid: int) -> RecordedOutput:
    """`stored` as a map of at most `grid` rows and columns."""
    if len(stored.shape) == 3:
        channels, height, width = stored.shape
        if max(height, width) <= grid:
            return stored
    else:
        num_tokens, channels = stored.shape
        side = _side(stored)
        if side is None:
            known = "an unknown number of" if stored.num_prefix_tokens is None else str(stored.num_prefix_tokens)
            raise ConfigError(
                f"--grid: the teacher's {name!r} are {num_tokens} tokens with {known} prefix tokens, which are no "
                "square; leave --grid out"
            )
        height = width = side
    shape = (channels, min(height, grid), min(width, grid))
    return RecordedOutput(shape=shape, dtype=stored.dtype, teacher_grid=(height, width))


def _side(stored: RecordedOutput) -> int | None:
    """Rows or columns of a map or of square tokens; None for anything else."""
    match stored.shape:
        case (_, height, width):
            return max(height, width)
        case (num_tokens, _) if stored.num_prefix_tokens is not None:
            side = math.isqrt(num_tokens - stored.num_prefix_tokens)
            return side if side**2 == num_tokens - stored.num_prefix_tokens else None
    return None


def _change(stored: RecordedOutput) -> str:
    changes = [f"the {stored.top_k} largest"] if stored.top_k is not None else []
    if stored.teacher_grid is not None:
        changes.append("from {} x {}".format(*stored.teacher_grid))
    return "".join(f", {change}" for change in changes)


def _options(changes: Mapping[str, Any]) -> str:
    words: list[str] = []
    for name, value in changes.items():
        words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [str(value)])]
    return " ".join(words)


def _described(outputs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{name} {spec}" for name, spec in outputs.items())
