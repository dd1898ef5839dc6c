"""What a recording will hold: which outputs, how they are stored, how many bytes they take, and whether they fit."""

import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from kd_pipeline._core.settings import Settings
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline._core.text import counted
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.losses.meeting import guess_prefix_tokens, is_nhwc
from kd_pipeline.losses.outputs import find_output
from kd_pipeline.losses.ramp import max_value
from kd_pipeline.storage import Location
from kd_pipeline.teachers.base import is_logits
from kd_pipeline.teachers.recorded.card import LICENSE_PATTERN
from kd_pipeline.teachers.recorded.manifest import LOGITS, RecordedDtype, RecordedOutput, RecordingManifest
from kd_pipeline.teachers.recorded.parts import Parts
from kd_pipeline.workflows.record_share import Share

__all__ = [
    "RecordSettings",
    "RecordingPlan",
    "format_bytes",
    "free_bytes",
    "loss_outputs",
    "recording_path",
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
    compares, with the logits for a student that has some, and to all for a config without a student."""
    dtype: RecordedDtype = "float32"
    """Of the outputs in the files. Training with float32 and whole outputs gives exactly the weights of a live teacher.
    `int8` stores each vector, token or position of a map with its own scale, and logits as float16."""
    grid: Annotated[int, Field(ge=1)] | Literal["student"] | None = None
    """Average maps and tokens over areas to maps of at most so many rows and columns, without the tokens' prefix;
    `student` for the size of the student's features that they are compared with, as `grid: student` of a term does."""
    top_k: int | None = Field(default=None, ge=1)
    """Keep only the largest logits of an image; the other classes share the rest of the probability."""
    epochs: int | None = Field(default=None, ge=1)
    """Epochs to record; defaults to `train.epochs`."""
    out: Location | None = None
    """The folder, or its URL in an object store (`s3://`); defaults to `recording` in `run_dir`."""
    part: str | None = None
    """Record one of n parts, such as `2/4`, in each of n processes on any machines that write to the same folder.
    Defaults to the task of a SLURM array, or else to everything; the processes of `torchrun`, `srun` or `mpirun` share
    it among themselves."""
    license: str | None = Field(default=None, pattern=f"^{LICENSE_PATTERN}$")
    """The license under which you publish the recording, such as `CC-BY-4.0`, for its card. Those of the teacher and of
    the images may say which ones are possible."""


@dataclass(frozen=True, slots=True)
class RecordingPlan:
    """What a recording takes, before it starts."""

    folder: Path | str
    """Or its URL, without credentials."""
    settings: RecordSettings
    teacher_outputs: Mapping[str, TensorSpec]
    """Of the teacher, which may have more than are recorded."""
    student_grids: Mapping[str, tuple[int, int]]
    """See `Distillation.student_grids`; empty where they are not needed."""
    manifest: RecordingManifest
    """With the number of images, and the shape and dtype of each output."""
    epochs: int
    share: Share
    """Which parts this process records."""
    existing: Parts | None
    """The parts in the folder, of a recording that is resumed; None if there is none."""
    free_bytes: int | None
    """Of the disk; None for an object store."""

    @property
    def own_parts(self) -> list[tuple[int, int]]:
        """Epoch and first position of each part that this process records, or has recorded."""
        return self.share.select(self.manifest, self.epochs)

    @property
    def num_epochs_done(self) -> int | None:
        """Complete epochs of the recording in the folder, which is resumed; None if there is none."""
        return None if self.existing is None else self.existing.num_epochs

    @property
    def num_bytes(self) -> int:
        """Bytes of all epochs in the end."""
        return self.manifest.epoch_bytes * self.epochs

    @property
    def existing_bytes(self) -> int:
        """What an earlier recording in the folder has on the disk already, of all parts."""
        if self.existing is None:
            return 0
        return sum(self._part_bytes(part.start) for part in self.existing.in_order if part.epoch < self.epochs)

    @property
    def missing_bytes(self) -> int:
        """Bytes of the parts of this process that are missing, which the disk has to have free."""
        if self.share.is_everything:
            return self.num_bytes - self.existing_bytes
        existing = self.existing
        own = (start for epoch, start in self.own_parts if existing is None or not existing.find(epoch, start))
        return sum(map(self._part_bytes, own))

    def _part_bytes(self, start: int) -> int:
        return self.manifest.row_bytes * (self.manifest.part_stop(start) - start)

    @property
    def bytes_per_s(self) -> float:
        """What training on the recording reads per second at 1,000 images per second."""
        return self.manifest.row_bytes * _RATE

    @property
    def lines(self) -> tuple[str, ...]:
        """The plan for people."""
        manifest = self.manifest
        exists = f", {format_bytes(self.existing_bytes)} of it exists" if self.num_epochs_done is not None else ""
        total = f"{format_bytes(self.num_bytes)} in all ({format_bytes(manifest.epoch_bytes)} per epoch{exists})"
        images = f"{manifest.num_rows:,} images x {counted(self.epochs, 'epoch')}"
        free = "" if self.free_bytes is None else f"; {format_bytes(self.free_bytes)} are free"
        rows = [
            f"{name} {list(stored.shape)} {stored.dtype}{_change(stored)}: {num_bytes:,} bytes per image"
            for (name, stored), num_bytes in zip(manifest.outputs.items(), manifest.output_bytes.values(), strict=True)
        ]
        left_out = [name for name in self.teacher_outputs if name not in manifest.outputs]
        return (
            f"recording {images} in {self.folder}: {total}{free}",
            *([] if self.share.is_everything else [f"this process records {self.share} ({self.share.reason})"]),
            *rows,
            *([f"not recorded: {', '.join(left_out)}"] if left_out else []),
            f"training reads {format_bytes(self.bytes_per_s)}/s at {_RATE:,} images/s",
        )

    def require_space(self) -> None:
        """Refuse a recording that does not fit on the disk.

        Raises:
            ConfigError: says how much it needs, how much is free and what would fit.
        """
        if self.free_bytes is None or self.missing_bytes <= self.free_bytes:
            return
        manifest = self.manifest
        raise ConfigError(
            f"the recording needs {format_bytes(self.missing_bytes)} more in {self.folder} ({manifest.num_rows} images "
            f"x {self.epochs} epochs x {manifest.row_bytes} bytes{self.share.fraction}) and "
            f"{format_bytes(self.free_bytes)} are free; {self._advice()}. Or use a different disk with --out"
        )

    def _advice(self) -> str:
        available = self._available_bytes
        options = self._smaller()
        fitting = [each for each in options if each[1] <= available][:_MAX_OPTIONS]
        if fitting:
            return "what fits: " + ", ".join(f"{option} ({format_bytes(size)})" for option, size in fitting)
        if not options:
            return "free some space"
        option, size = min(options, key=lambda each: each[1])
        return f"nothing smaller fits, and even {option} takes {format_bytes(size)}"

    @property
    def _available_bytes(self) -> int:
        """For the whole recording, if all processes have such a disk."""
        assert self.free_bytes is not None
        return self.free_bytes * self.share.num_processes + self.existing_bytes

    def _smaller(self) -> list[tuple[str, int]]:
        """Options for smaller recordings with their bytes: those with the fewest changes first, large ones first."""
        manifest, epoch_bytes = self.manifest, self.manifest.epoch_bytes
        epochs = min(self._available_bytes // epoch_bytes, self.epochs)
        shorter = [(f"--epochs {epochs}", epochs * epoch_bytes)] if (self.num_epochs_done or 0) < epochs else []
        if self.num_epochs_done is not None:
            return shorter  # anything else would be another recording
        base = self.settings.model_copy(update={"outputs": tuple(manifest.outputs)})
        found: dict[int, str] = {}
        for changes in sorted(self._changes(), key=len):
            outputs = stored_outputs(self.teacher_outputs, base.model_copy(update=changes), self.student_grids)
            num_bytes = manifest.model_copy(update={"outputs": outputs}).epoch_bytes * self.epochs
            if num_bytes < self.num_bytes:
                found.setdefault(num_bytes, _options(changes))
        num_options = {size: option.count("--") for size, option in found.items()}
        smaller = sorted(found, key=lambda size: (num_options[size], -size))
        return [*((found[size], size) for size in smaller), *shorter]

    def _changes(self) -> list[dict[str, Any]]:
        """Changes of the settings, in all combinations; some have no effect."""
        stored = self.manifest.outputs
        dtypes = ["float16"] if all(map(is_logits, stored)) else ["float16", "int8"]
        of_images = {name: each for name, each in stored.items() if is_logits(name) and len(each.shape) == 1}
        are_all = len(of_images) == sum(map(is_logits, stored))  # those of pixels are kept whole
        has_many = are_all and any(each.shape[0] > _SMALL_TOP_K for each in of_images.values())
        grids = [_grid(each) for each in stored.values() if len(each.shape) > 1]
        side = max((max(grid) for grid in grids if grid is not None), default=0)
        largest = max(self.manifest.output_bytes.items(), key=lambda each: each[1])[0]
        kinds: list[list[dict[str, Any]]] = [
            [{}, *({"dtype": dtype} for dtype in dtypes)],
            [{}, *([{"top_k": _SMALL_TOP_K}] if has_many else [])],
            [{}, *([{"grid": side // 2}] if side > 1 and None not in grids else [])],
            [{}, *([{"outputs": tuple(name for name in stored if name != largest)}] if len(stored) > 1 else [])],
        ]
        combined = ({name: value for each in chosen for name, value in each.items()} for chosen in product(*kinds))
        return [each for each in combined if "top_k" not in each or any(map(is_logits, each.get("outputs", stored)))]


def loss_outputs(config: Config) -> tuple[str, ...] | None:
    """The teacher's outputs that the loss of `config` compares; None if that is unknown.

    It is for a loss of the user's own, and for a config that has neither a student nor a loss. Of several students it
    is what they compare together.
    """
    if config.students:
        found = [loss_outputs(each) for each in config.single_runs.values()]
        known = [each for each in found if each is not None]
        return tuple(dict.fromkeys(chain(*known))) if len(known) == len(found) else None
    distill = config.distill
    if (config.student is None and "distill" not in config.model_fields_set) or distill.may_read_all:
        return None
    compares_logits = max_value(distill.weights[0]) > 0
    terms = [term.teacher for term in distill.features if max_value(term.weight)]
    return tuple(dict.fromkeys([LOGITS, *terms] if compares_logits else terms))


def with_outputs(settings: RecordSettings, config: Config, teacher_outputs: Mapping[str, TensorSpec]) -> RecordSettings:
    """`settings` with the names of the outputs to record, where they are left open or are aliases.

    Raises:
        ConfigError: there is no such output.
    """

    def find(names: Sequence[str], place: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(find_output(name, teacher_outputs, place=place, owner="teacher") for name in names))

    if settings.outputs is not None:
        outputs = find(settings.outputs, "--outputs")
        _warn_about_missing(config, outputs, teacher_outputs)
    elif needed := loss_outputs(config):
        outputs = find(needed, "the loss of this config (--outputs names others to record)")
        students = [each.student for each in config.single_runs.values()]
        has_head = any(student is None or not student.is_headless for student in students)
        if has_head and LOGITS in teacher_outputs and LOGITS not in outputs:
            outputs = (LOGITS, *outputs)
    else:
        outputs = tuple(teacher_outputs)
    return settings.model_copy(update={"outputs": outputs})


def _warn_about_missing(config: Config, outputs: Sequence[str], teacher_outputs: Mapping[str, TensorSpec]) -> None:
    specs = {name: teacher_outputs[name] for name in outputs}
    for name in loss_outputs(config) or ():
        try:
            find_output(name, specs, place="", owner="teacher")
        except ConfigError:
            _logger.warning(
                "the loss of this config compares %s too, which --outputs leaves out: training with this recording "
                "needs another distill.features, or the output",
                name,
            )


def warn_about_resize(config: Config, stored: Mapping[str, RecordedOutput]) -> None:
    """Say which terms interpolate maps that are averaged here, so that they learn otherwise than from the teacher."""
    specs = {name: output.spec for name, output in stored.items()}
    terms = (enumerate(each.distill.features) for each in config.single_runs.values())
    for number, term in chain.from_iterable(terms):
        if term.resize != "bilinear" or not max_value(term.weight):
            continue
        try:
            name = find_output(term.teacher, specs, place="", owner="teacher")
        except ConfigError:
            continue  # not recorded, which has its own line
        if stored[name].teacher_grid not in (None, stored[name].shape[1:]):
            _logger.warning(
                "distill.features[%d].resize is bilinear, and --grid stores means of areas of %s: training with this "
                "recording differs from the teacher's; set resize: auto, or leave --grid out",
                *(number, name),
            )


def stored_outputs(
    teacher_outputs: Mapping[str, TensorSpec],
    settings: RecordSettings,
    student_grids: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, RecordedOutput]:
    """How `settings` store the outputs that they name, or all of them.

    Args:
        teacher_outputs: of the teacher.
        settings: whose `outputs` exist.
        student_grids: for `grid: student`, the largest height and width of outputs by name; others keep their own.

    Raises:
        ConfigError: a setting does not fit an output.
        TeacherError: the shape of an output is open, or unlike that of any output.
    """
    names = tuple(teacher_outputs) if settings.outputs is None else settings.outputs
    if settings.top_k is not None and not any(map(is_logits, names)):
        raise ConfigError(f"--top-k keeps the largest logits, and {', '.join(names)} are none; leave it out")
    found = {}
    for name in names:
        match settings.grid:
            case "student":
                limit = (student_grids or {}).get(name)
            case None:
                limit = None
            case side:
                limit = side, side
        stored = _stored(name, teacher_outputs[name], settings)
        found[name] = stored if limit is None or len(stored.shape) == 1 else _at_grid(name, stored, limit)
    return found


def format_bytes(num_bytes: float) -> str:
    """A size such as `2.5 GB`."""
    size, units = float(num_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def recording_path(config: Config, settings: RecordSettings) -> Path | str:
    """The folder of the recording.

    Raises:
        ConfigError: neither `settings` nor `config` says.
    """
    if settings.out is not None:
        return settings.out
    if config.run_dir is None:
        raise ConfigError("a recording needs a folder: set run_dir, such as run_dir: runs/mine, or pass --out")
    return config.run_dir / "recording"


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
        if settings.top_k is not None and len(shape) > 1:
            raise ConfigError(
                f"--top-k keeps the largest logits of an image, and {name!r} are those of its pixels, {spec}; leave it "
                "out"
            )
        if settings.top_k is not None and settings.top_k >= shape[0]:
            raise ConfigError(
                f"--top-k must be below the number of classes, got {settings.top_k} of {shape[0]}; leave it out for all"
            )
        dtype: RecordedDtype = "float16" if settings.dtype == "int8" else settings.dtype
        return RecordedOutput(shape=shape, dtype=dtype, top_k=settings.top_k)
    prefix = spec.num_prefix_tokens if len(shape) == 2 else None
    if len(shape) == 3 and settings.dtype == "int8" and is_nhwc(spec.shape):  # one scale for each position
        return RecordedOutput(shape=(shape[2], *shape[:2]), dtype="int8", teacher_grid=(shape[0], shape[1]))
    return RecordedOutput(shape=shape, dtype=settings.dtype, num_prefix_tokens=prefix)


def _at_grid(name: str, stored: RecordedOutput, limit: tuple[int, int]) -> RecordedOutput:
    """`stored` as a map of at most this height and width."""
    grid = _grid(stored)
    if grid is None:
        raise ConfigError(
            f"--grid: the teacher's {name!r} are {stored.spec} tokens, which are no square grid after "
            f"{stored.num_prefix_tokens or 0} prefix tokens; leave --grid out, or name other outputs with --outputs"
        )
    height, width = (min(sizes) for sizes in zip(grid, limit, strict=True))
    is_channels_first = len(stored.shape) == 3 and not is_nhwc((None, *stored.shape))
    if is_channels_first and grid == (height, width):
        return stored
    channels = stored.shape[0 if is_channels_first else -1]
    return RecordedOutput(shape=(channels, height, width), dtype=stored.dtype, teacher_grid=grid)


def _grid(stored: RecordedOutput) -> tuple[int, int] | None:
    """Height and width of a map, or of the square that tokens are of; None for anything else."""
    match stored.shape:
        case (first, second, third):
            return (first, second) if is_nhwc((None, *stored.shape)) else (second, third)
        case (num_tokens, _):
            prefix = stored.num_prefix_tokens
            num_patches = num_tokens - ((guess_prefix_tokens(num_tokens) or 0) if prefix is None else prefix)
            side = math.isqrt(num_patches)
            return (side, side) if side**2 == num_patches else None
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
