"""The whole distillation step, side by side with what people use now."""

import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.optional import require
from kd_pipeline._core.settings import Settings
from kd_pipeline.bench.isolated import Isolated, StepSample
from kd_pipeline.bench.measure import environment, prepare_out
from kd_pipeline.bench.photographs import photographs, read_jpeg
from kd_pipeline.bench.step_result import StepResult, StepRow
from kd_pipeline.bench.ways import WAYS, StepTask
from kd_pipeline.config.config import Config
from kd_pipeline.data.reader import group_size
from kd_pipeline.data.settings import DataSettings, SplitSettings
from kd_pipeline.data.sources.base import ImageFolder, ImageFolderSettings
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.errors import ConfigError, DataError, KDPipelineError
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.workflows._record import RecordSettings, record

__all__ = ["BenchStepSettings", "bench_step", "step_settings"]

_NUM_IMAGES = 2000
"""Of a larger folder so many are taken, evenly spaced, so that they fit into the page cache."""
_NUM_WARM_UP = 2
"""Steps before those that are timed. A step takes far longer than a batch takes to load, so that no more is ready at
the beginning of the timed ones than at their end."""
_TIMES_LOADING = 4
"""Where loading is all there is so many times as many batches are timed, after as many as a loader has ready."""
_NUM_READY = 8
"""More batches than a loader takes beyond those that it hands out."""
_PARTS = ("f", "loader", "teacher")
"""Measured in any case: what the whole is compared with."""
_NEED_A_NETWORK = ("a", "b", "c")


class BenchStepSettings(Settings):
    """What is compared, and on what."""

    root: Path | None = None
    """JPEG files in class folders; `data/photographs`, which is made where it is not there yet, where left out."""
    transform: TrainTransform = TrainTransform(size=224)
    """Crop, flip and normalize are taken from it; all ways do just these."""
    teacher: ModelSettings | None = ModelSettings(torchvision="resnet50")
    onnx: Path | None = None
    """The exported teacher; made of `teacher` where left out."""
    student: ModelSettings = ModelSettings(torchvision="resnet18")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the student in all rows, by autocast."""
    teacher_precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the teacher in all rows but (a), where it is float32."""
    batch_size: int = Field(default=32, gt=0)
    rows: tuple[str, ...] = tuple("abcdefg")
    num_steps: int = Field(default=6, gt=0)
    """Timed steps of every row in every repeat."""
    repeats: int = Field(default=5, gt=0)
    num_threads: int | None = Field(default=None, gt=0)
    """CPU threads that each row may use; the cores where left out."""
    device: str = "auto"
    out: Path | None = None
    """JSON file for the result; a picture of the same name with `.png` goes beside it."""


def step_settings(config: Config, settings: BenchStepSettings, given: Collection[str] = ()) -> BenchStepSettings:
    """`settings` with what a config says of images, teacher and student, but for those that were `given` by name.

    Raises:
        ConfigError: the config's training data is no folder of images, or there is no teacher or student.
    """
    train, teacher = config.data.train, config.teacher
    if train is None or not isinstance(train.source, ImageFolderSettings):
        raise ConfigError("bench step compares with torchvision's ImageFolder: data.train.source must be image_folder")
    if not isinstance(train.transform, TrainTransform):
        raise ConfigError("bench step measures training: data.train.transform must have preset: train")
    if not isinstance(teacher, TeacherSettings) or (teacher.onnx is None and teacher.model is None):
        raise ConfigError("bench step needs one teacher: set teacher.onnx or teacher.model")
    if config.student is None:
        raise ConfigError("bench step needs a student: set student")
    said = {
        "root": train.source.root,
        "transform": train.transform,
        "teacher": teacher.model,
        "onnx": teacher.onnx,
        "student": config.student,
        "batch_size": config.data.batch_size,
        "device": config.data.device,
    }
    if "teacher" in given:
        del said["onnx"]
    return settings.model_copy(update={name: value for name, value in said.items() if name not in given})


def bench_step(settings: BenchStepSettings, *, report: Callable[[str], object] = lambda line: None) -> StepResult:
    """Measure every way of doing the step, interleaved, each in a process of its own; `report` gets lines of progress.

    All read the same JPEG files from the page cache, crop, flip and normalize them alike, and train the same student
    with the same loss and optimizer. (a) runs it eagerly, as its teacher; all others compile it and keep it in
    channels last, so that they differ in loader and teacher alone.

    Raises:
        ConfigError: a setting cannot be meant, or nothing is left to measure.
        DataError: the folder holds other images than JPEG, or too few.
        MissingPackageError: a package of the extra `bench` is not installed.
    """
    require("torchvision", extra="bench")
    unknown = [row for row in settings.rows if row not in WAYS]
    if unknown:
        raise ConfigError(f"rows: there is no {unknown[0]!r}; take some of {', '.join('abcdefg')}")
    prepare_out(settings.out)
    with tempfile.TemporaryDirectory(prefix="bench_step-") as folder, ExitStack() as opened:
        task = _task(settings, Path(folder), report)
        samples = _measure(_open(task, settings, opened, report), settings, report)
    result = StepResult(
        rows=tuple(StepRow(letter, WAYS[letter].name, tuple(own)) for letter, own in samples.items()),
        settings=settings.model_dump(mode="json") | {"num_threads": task.num_threads, "device": task.device},
        environment=environment(),
    )
    if settings.out is not None:
        result.save(settings.out)
    return result


def _task(settings: BenchStepSettings, folder: Path, report: Callable[[str], object]) -> StepTask:
    root = photographs(settings.root, report)
    transform = _comparable(settings.transform, report)
    onnx = settings.onnx
    if onnx is None:
        assert settings.teacher is not None  # the settings have seen to it
        report("the teacher is exported to ONNX")
        shape = (3, transform.size, transform.size)
        onnx = export_onnx(open_model(settings.teacher), folder / "teacher.onnx", image_shape=shape)
    num_classes = read_onnx(onnx).outputs["logits"].shape[1]
    assert num_classes is not None
    return StepTask(
        root=_part_of(root, folder / "images", settings.batch_size),
        transform=transform,
        batch_size=settings.batch_size,
        teacher=settings.teacher,
        onnx=onnx,
        recording=folder / "recording",
        student=settings.student.model_copy(update={"num_classes": num_classes}),
        precision=settings.precision,
        teacher_precision=settings.teacher_precision,
        device=str(resolve_device(settings.device)),
        num_threads=settings.num_threads or num_cores(),
    )


def _comparable(transform: TrainTransform, report: Callable[[str], object]) -> TrainTransform:
    """What torchvision's way does as well: crop, flip, normalize."""
    kept = {name: getattr(transform, name) for name in ("size", "area", "ratio", "flip", "mean", "std")}
    plain = TrainTransform(**kept)
    left_out = [name for name in TrainTransform.model_fields if getattr(plain, name) != getattr(transform, name)]
    if left_out:
        report(f"left out in every row, as not all ways have it: transform.{', transform.'.join(left_out)}")
    return plain


def _part_of(root: Path, folder: Path, batch_size: int) -> Path:
    """A folder of links to so many images of `root` as fit into the page cache, all read once."""
    source = ImageFolder(root)
    if len(source) < batch_size:
        raise DataError(f"{root} has {len(source)} images, less than one batch of {batch_size}; lower batch_size")
    for index in np.linspace(0, len(source) - 1, min(len(source), _NUM_IMAGES)).astype(int).tolist():
        path = Path(source.name(index))
        read_jpeg(path)
        link = folder / str(path.parent.name) / f"{index:09}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return folder


def _record(task: StepTask, settings: BenchStepSettings) -> None:
    """The compiled teacher's answers to as many epochs as row (g) will see."""
    num_batches = _NUM_READY + settings.repeats * (_NUM_WARM_UP + settings.num_steps)
    batches_in_epoch = len(ImageFolder(task.root)) // task.batch_size
    train = SplitSettings(source=ImageFolderSettings(root=task.root, labeled=False), transform=task.transform)
    config = Config(
        data=DataSettings(batch_size=task.batch_size, train=train, device=task.device),
        teacher=TeacherSettings(onnx=task.onnx, precision=task.teacher_precision),
    )
    record(config, RecordSettings(epochs=-(-num_batches // batches_in_epoch), out=task.recording))


def _open(
    task: StepTask, settings: BenchStepSettings, opened: ExitStack, report: Callable[[str], object]
) -> list[Isolated]:
    """The rows that can be measured here, then the parts; what cannot be opened is told and left out."""
    ways = []
    for letter in dict.fromkeys([*settings.rows, *_PARTS]):
        if task.teacher is None and letter in _NEED_A_NETWORK:
            report(f"({letter}) is left out: the teacher is an ONNX file, and this way runs a network in PyTorch")
            continue
        report(f"({letter}) {WAYS[letter].name}: opened")
        try:
            if letter == "g":
                _record(task, settings)
            ways.append(opened.enter_context(closing(Isolated(letter, task))))
        except KDPipelineError as exc:
            report(f"({letter}) is left out: {exc}")
    if not ways:
        raise ConfigError("no way of doing the step can be opened here; the lines above say why")
    return ways


def _measure(
    ways: Sequence[Isolated], settings: BenchStepSettings, report: Callable[[str], object]
) -> dict[str, list[StepSample]]:
    """Every way in every repeat, in an order that rotates from repeat to repeat."""
    samples: dict[str, list[StepSample]] = {way.letter: [] for way in ways}
    for repeat in range(settings.repeats):
        for place in range(len(ways)):
            way = ways[(place + repeat) % len(ways)]
            num_steps, num_warm_up = settings.num_steps, _NUM_WARM_UP
            if way.letter == "loader":  # which gives several small batches at once
                at_once = group_size(settings.batch_size, settings.transform)
                num_steps = -(-_TIMES_LOADING * num_steps // at_once) * at_once
                num_warm_up = _TIMES_LOADING * at_once
            samples[way.letter].append(way.time(num_steps, num_warm_up=num_warm_up))
        rates = ", ".join(f"({letter}) {own[-1].images_per_s:,.1f}" for letter, own in samples.items())
        report(f"repeat {repeat + 1} of {settings.repeats}, images/s: {rates}")
    return samples
