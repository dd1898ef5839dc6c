"""Measure the whole distillation step next to the usual PyTorch scripts."""

import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.optional import require
from kd_pipeline._core.progress import progress_bar
from kd_pipeline._core.secret_values import hide_in_settings
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.bench.measure import environment, prepare_out, rotated, round_up, save_result
from kd_pipeline.bench.photographs import link_again, link_images, photographs
from kd_pipeline.bench.step_result import StepResult, StepRow
from kd_pipeline.bench.step_variants import (
    EAGER,
    NEED_JPEG,
    NEED_NETWORK,
    NEED_ONNX,
    ON_DALI,
    ON_TORCH_LOADERS,
    PARTS,
    VARIANTS,
    StepTask,
    open_network,
)
from kd_pipeline.bench.step_worker import NUM_OPENING, NUM_PROFILED, StepSample, StepWorker
from kd_pipeline.bench.torchvision_loaders import PREFETCH
from kd_pipeline.config.config import Config
from kd_pipeline.data.reader import group_size
from kd_pipeline.data.settings import DataSettings, SplitSettings
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.sources.base import ImageFolderSettings
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.data.views import Views
from kd_pipeline.errors import ConfigError, DataError, KDPipelineError
from kd_pipeline.losses.settings import LOGITS, DistillSettings
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.teachers.open import why_no_onnx
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.workflows._record import RecordSettings, record
from kd_pipeline.workflows.stage import require_one_student

__all__ = ["BenchStepSettings", "bench_step", "step_settings"]

_ON_LOGITS = DistillSettings(loss="soft_target", task_weight=0.0)
"""Without labels, which not all variants read."""
_NUM_IMAGES = 2000
"""Of a larger folder so many are used, evenly spaced, to fit into the page cache."""
_MIN_EPOCH_ON_GPU = 50
"""Batches of an epoch there: the images are linked again and again until there are as many, as the teacher does not run
ahead into the next epoch, and in real ones few steps are the first."""
_NUM_WARM_UP, _NUM_WARM_UP_ON_GPU = 2, 10
"""Steps before the timed ones at least; see `_num_steps`. On a CPU a step takes far longer than loading a batch, so the
loader has prefetched as much at the beginning of the timed steps as at their end. A GPU has to raise its clocks."""
_LOADING_FACTOR = 4
"""Loading alone is timed over so many times as many batches, after more batches than a loader prefetches."""
_NUM_PREFETCHED = 8
"""More batches than a loader reads beyond those that it delivers."""


class BenchStepSettings(Settings):
    """What is compared, and on what."""

    root: Path | None = None
    """Images in class folders; row b is left out if some are not JPEG. Defaults to `data/photographs`, which is
    created if it does not exist."""
    transform: TrainTransform = TrainTransform(size=224)
    """Only its crop, flip and normalization are used: all variants have these."""
    teacher: ModelSettings | None = ModelSettings(torchvision="resnet50")
    onnx: Path | None = None
    """The exported teacher; defaults to an export of `teacher`, if a row runs it and a runtime is installed for it."""
    features: tuple[str, ...] = ()
    """Layers of `teacher` whose outputs the student learns from too."""
    student: ModelSettings = ModelSettings(torchvision="resnet18")
    """With `num_classes: 0`, without a head, it learns features instead of logits."""
    distill: DistillSettings | None = None
    """The loss in all rows, without labels. It defaults to `soft_target`, and without a head to that of a config."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the student in all rows, by autocast."""
    teacher_precision: Literal["fp32", "bf16", "fp16", "int8"] = "bf16"
    """Of the teacher in all rows except (a), where it is float32. PyTorch has no int8: (b) and (c) are in bf16 then."""
    batch_size: int = Field(default=32, gt=0)
    """Images in a step."""
    rows: tuple[str, ...] = tuple("abcdefg")
    """Letters of the variants, some of a b c d e f g h; defaults to all but h, which is (c) with no teacher ahead."""
    num_steps: int = Field(default=6, gt=0)
    """Timed steps of each row in each repeat. On a GPU, those of (a) and (b) are rounded up to as many batches as
    torch's workers prepare at once."""
    repeats: int = Field(default=5, gt=0)
    """How often each row is measured."""
    num_threads: int | None = Field(default=None, gt=0)
    """CPU threads of each row; defaults to the cores this process may use."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto` for a GPU if there is one."""
    out: Path | None = None
    """JSON file for the result; the plot is saved next to it as `.png`."""


def step_settings(config: Config, settings: BenchStepSettings, given: Collection[str] = ()) -> BenchStepSettings:
    """Take images, teacher and student from a config, except for settings that are `given` by name.

    The loss is that of the config for a student without a head only: the others may need labels.

    Raises:
        ConfigError: the config's training data is not a folder of images, or there is no teacher or student.
    """
    train, teacher = config.data.train, config.teacher
    if train is None or not isinstance(train.source, ImageFolderSettings):
        raise ConfigError("bench step compares with torchvision's ImageFolder: data.train.source must be image_folder")
    if not isinstance(train.source.root, Path):
        url = train.source.root
        raise ConfigError(
            f"bench step reads a folder on a disk, and data.train.source.root is {url!r}; download it and set its path"
        )
    if not isinstance(train.transform, TrainTransform):
        raise ConfigError("bench step measures training: data.train.transform must have preset: train")
    if not isinstance(teacher, TeacherSettings) or (teacher.onnx is None and teacher.model is None):
        raise ConfigError("bench step needs one teacher: set teacher.onnx or teacher.model")
    require_one_student(config, "bench step")
    if config.student is None:
        raise ConfigError("bench step needs a student: set student")
    values = {
        "root": train.source.root,
        "transform": train.transform,
        "teacher": teacher.model,
        "features": teacher.features,
        "onnx": teacher.onnx,
        "student": config.student,
        "batch_size": config.data.batch_size,
        "device": config.data.device,
    }
    if config.student.is_headless:
        values["distill"] = config.distill
    if "teacher" in given:
        del values["onnx"], values["features"]
    if "student" in given:
        values.pop("distill", None)
    return settings.model_copy(update={name: value for name, value in values.items() if name not in given})


def bench_step(settings: BenchStepSettings, *, report: Callable[[str], object] = lambda line: None) -> StepResult:
    """Measure all variants of the step, interleaved, each in its own process; `report` receives lines of progress.

    All read the same files from the page cache, crop, flip and normalize them alike, and train the same student with
    the same loss, projectors and optimizer. (a) runs student and teacher eagerly; all others compile the student and
    keep it in channels last, so they differ in loader and teacher only. (b), which reads only JPEG files, is left out
    if there are others. The result is saved after each repeat, so those that are complete are kept.

    Raises:
        ConfigError: a setting makes no sense, or no variant can be measured here.
        DataError: the folder has too few images.
        MissingPackageError: a package of the extra `bench` is not installed.
    """
    require("torchvision", extra="bench")
    unknown = [row for row in settings.rows if row not in VARIANTS]
    if unknown:
        raise ConfigError(f"rows: there is no {unknown[0]!r}; choose from {', '.join('abcdefgh')}")
    prepare_out(settings.out)
    with tempfile.TemporaryDirectory(prefix="bench_step-") as folder, ExitStack() as opened:
        task = _task(settings, Path(folder), report)
        workers, compared = _open(task, settings, opened, report)
        samples: dict[str, list[StepSample]] = {worker.letter: [] for worker in workers}

        def save() -> None:
            save_result(settings.out, _result(samples, task, settings, compared).to_json, report)

        try:
            _measure(workers, task, settings, samples, report, save)
        except KeyboardInterrupt:
            num_complete = min(map(len, samples.values()))
            if num_complete and settings.out is not None:
                report(f"stopped after {num_complete} of {settings.repeats} repeats, which are in {settings.out}")
            raise
    result = _result(samples, task, settings, compared)
    save_result(settings.out, result.to_json, report, result.plot)
    return result


def _result(
    samples: Mapping[str, Sequence[StepSample]], task: StepTask, settings: BenchStepSettings, compared: str
) -> StepResult:
    return StepResult(
        rows=tuple(StepRow(letter, VARIANTS[letter].name, tuple(own)) for letter, own in samples.items()),
        settings=hide_in_settings(settings.model_dump(mode="json"))
        | {"num_threads": task.num_threads, "device": task.device, "compared": compared}
        | {"distill": task.distill.model_dump(mode="json")},
        environment=environment(),
    )


def _task(settings: BenchStepSettings, folder: Path, report: Callable[[str], object]) -> StepTask:
    root = folder / "images"
    with progress_bar("reading the images"):
        no_jpeg = _link(photographs(settings.root, report), root, settings.batch_size, report)
    transform = _comparable(settings.transform, report)
    device = resolve_device(settings.device)
    if device.type == "cuda":
        link_again(root, num_files=_MIN_EPOCH_ON_GPU * settings.batch_size)
    onnx, wanted = settings.onnx, [row for row in settings.rows if row in NEED_ONNX]
    network = None if settings.teacher is None else open_network(settings.teacher, settings.features)
    shape = transform.image_shape
    if onnx is not None or network is None:
        assert onnx is not None  # the command always sets it or `teacher`
        outputs = read_onnx(onnx).outputs
    else:
        with closing(PyTorchTeacher(network, image_shape=shape)) as teacher:
            outputs = teacher.outputs
    student = _sized(settings.student, outputs)
    if onnx is None and network is not None and wanted:  # an export takes tens of seconds
        onnx, reason = _export(network, folder / "teacher.onnx", shape, device, report)
        if onnx is None:
            report(f"({') ('.join(wanted)}) skipped: {reason}")
    return StepTask(
        root=root,
        no_jpeg=no_jpeg,
        transform=transform,
        batch_size=settings.batch_size,
        teacher=settings.teacher,
        features=settings.features,
        outputs=dict(outputs),
        onnx=onnx,
        recording=folder / "recording",
        student=student,
        distill=settings.distill or _default_loss(settings),
        precision=settings.precision,
        teacher_precision=settings.teacher_precision,
        device=str(device),
        num_threads=settings.num_threads or num_cores(),
    )


def _export(
    network: nn.Module, path: Path, shape: tuple[int, int, int], device: torch.device, report: Callable[[str], object]
) -> tuple[Path | None, str]:
    """The ONNX file, or None and the reason why there is none."""
    if reason := why_no_onnx(device):
        return None, reason
    report("exporting the teacher to ONNX")
    try:
        return export_onnx(network, path, image_shape=shape), ""
    except KDPipelineError as exc:
        return None, str(exc)


def _sized(student: ModelSettings, outputs: Mapping[str, TensorSpec]) -> ModelSettings:
    """The student with as many classes as the teacher, unless it has no head."""
    if student.is_headless:
        return student
    if LOGITS not in outputs:
        raise ConfigError(
            f"the teacher returns {' and '.join(map(repr, outputs))} and no logits, which the student has: leave out "
            "the head of both (--headless, or num_classes: 0 of the student too)"
        )
    return student.model_copy(update={"num_classes": outputs[LOGITS].shape[1]})


def _default_loss(settings: BenchStepSettings) -> DistillSettings:
    if not settings.student.is_headless:
        return _ON_LOGITS
    teacher = TeacherSettings(model=settings.teacher, onnx=None if settings.teacher else settings.onnx)
    data = DataSettings(batch_size=settings.batch_size)
    return Config(data=data, teacher=teacher, student=settings.student).distill


def _comparable(transform: TrainTransform, report: Callable[[str], object]) -> TrainTransform:
    """Keep what torchvision's transforms do as well: crop, flip, normalize."""
    kept = {name: getattr(transform.at_size(), name) for name in ("size", "area", "ratio", "flip", "mean", "std")}
    plain = TrainTransform(**kept)
    ignored = [name for name in TrainTransform.model_fields if getattr(plain, name) != getattr(transform, name)]
    if ignored:
        report(f"ignored in every row, as not all variants have it: transform.{', transform.'.join(ignored)}")
    return plain


def _link(root: Path, folder: Path, batch_size: int, report: Callable[[str], object]) -> Path | None:
    """Make `folder` with links to as many images of `root` as fit into the page cache; returns one that is not JPEG."""
    other = link_images(root, folder, num_images=_NUM_IMAGES, report=report)
    if (number := sum(path.is_file() for path in folder.rglob("*"))) < batch_size:
        raise DataError(f"{root} has {number} images, fewer than one batch of {batch_size}; lower batch_size")
    return other


def _record(task: StepTask, settings: BenchStepSettings) -> None:
    """Record the compiled teacher's outputs for as many epochs as row (g) needs."""
    steps = NUM_OPENING + settings.repeats * sum(_num_steps("g", task, settings)) + NUM_PROFILED
    num_batches = _NUM_PREFETCHED + steps
    batches_in_epoch = len(ImageFolder(task.root)) // task.batch_size
    train = SplitSettings(source=ImageFolderSettings(root=task.root, labeled=False), transform=task.transform)
    config = Config(
        data=DataSettings(batch_size=task.batch_size, train=train, device=task.device),
        teacher=TeacherSettings(onnx=task.onnx, precision=task.teacher_precision),
    )
    record(config, RecordSettings(epochs=-(-num_batches // batches_in_epoch), out=task.recording))


def _open(
    task: StepTask, settings: BenchStepSettings, opened: ExitStack, report: Callable[[str], object]
) -> tuple[list[StepWorker], Literal["c", "e"]]:
    """Open the rows that work here, then the parts; the others are reported and skipped.

    Also returns the row whose teacher is measured alone.
    """
    workers: list[StepWorker] = []
    letters = [letter for letter in dict.fromkeys([*settings.rows, *PARTS]) if _can_run(letter, task, report)]
    for number, letter in enumerate(letters, start=1):
        if letter == "teacher":
            task = task.model_copy(update={"teacher_alone": _compared(task, workers)})
        name = f"({letter}) {VARIANTS[letter].name}"
        compiles = "" if letter in EAGER else "; compiling, which can take a few minutes"
        report(f"{name}: opening, {number} of {len(letters)}{compiles}")
        started_s = time.monotonic()
        try:
            with progress_bar(name) as report_row:
                if letter == "g":
                    _record(task, settings)
                wait = partial(report_row, number - 1, len(letters))
                workers.append(opened.enter_context(closing(StepWorker(letter, task, wait=wait))))
        except KDPipelineError as exc:
            report(f"({letter}) skipped: {exc}")
            continue
        decoding = f", decode {workers[-1].decode}" if letter in ON_DALI else ""
        report(f"({letter}) open after {time.monotonic() - started_s:.1f} s{decoding}")
    if not workers:
        raise ConfigError("no variant of the step works here; the lines above say why")
    return workers, task.teacher_alone


def _can_run(letter: str, task: StepTask, report: Callable[[str], object]) -> bool:
    """Whether files and teacher are of the kind that the row needs; if not, a line says why."""
    if letter in NEED_ONNX and task.onnx is None:
        return False  # the report has the reason
    if letter in NEED_NETWORK and task.teacher is None:
        report(f"({letter}) skipped: the teacher is an ONNX file, and this variant runs a network in PyTorch")
        return False
    if letter in NEED_JPEG and task.no_jpeg is not None:
        report(f"({letter}) skipped: {task.no_jpeg} is not JPEG, and torchvision's decode_jpeg reads nothing else")
        return False
    return True


def _compared(task: StepTask, workers: Sequence[StepWorker]) -> Literal["c", "e"]:
    """The row that is compared with its parts: (e), or (c) where (e) is not open."""
    letters = {worker.letter for worker in workers}
    return "c" if task.onnx is None or ("c" in letters and "e" not in letters) else "e"


def _num_steps(letter: str, task: StepTask, settings: BenchStepSettings) -> tuple[int, int]:
    """Timed steps in a repeat, and those before them, in which what a loader prefetched while it was idle is used up.

    Small batches of `KDDataLoader` become ready in groups, and those of torch's workers all at once.
    """
    on_gpu = task.device != "cpu"
    at_once = group_size(task.batch_size, Views.of(task.transform), num_threads=task.num_threads, on_gpu=on_gpu)
    if letter == "loader":
        num_prefetched, least = _LOADING_FACTOR * at_once, _NUM_WARM_UP_ON_GPU if on_gpu else _NUM_WARM_UP
        return round_up(_LOADING_FACTOR * settings.num_steps, at_once), max(num_prefetched, round_up(least, at_once))
    if not on_gpu:
        return settings.num_steps, _NUM_WARM_UP
    if letter in ("f", "teacher"):
        return settings.num_steps, _NUM_WARM_UP_ON_GPU
    if letter in ON_TORCH_LOADERS:
        return round_up(settings.num_steps, task.num_threads), PREFETCH * task.num_threads + _NUM_WARM_UP_ON_GPU
    num_prefetched = (_LOADING_FACTOR + 1) * at_once  # one more is with the teacher
    return round_up(settings.num_steps, at_once), max(num_prefetched, round_up(_NUM_WARM_UP_ON_GPU, at_once))


def _measure(
    workers: Sequence[StepWorker],
    task: StepTask,
    settings: BenchStepSettings,
    samples: Mapping[str, list[StepSample]],
    report: Callable[[str], object],
    save: Callable[[], None],
) -> None:
    """Time every variant in every repeat, in an order that rotates from repeat to repeat; add to `samples`, and save
    them."""
    for repeat in range(settings.repeats):
        started_s, title = time.monotonic(), f"repeat {repeat + 1} of {settings.repeats}"
        for number, worker in enumerate(rotated(workers, repeat)):
            num_steps, num_warm_up = _num_steps(worker.letter, task, settings)
            count_copies = repeat == settings.repeats - 1  # it would slow down what is timed later
            with progress_bar(f"{title}: ({worker.letter})") as report_row:
                report_row(number, len(workers))
                wait = partial(report_row, number, len(workers))
                found = worker.time(num_steps, num_warm_up=num_warm_up, count_copies=count_copies, wait=wait)
            samples[worker.letter].append(found)
        save()
        rates = ", ".join(f"({letter}) {own[-1].images_per_s:,.1f}" for letter, own in samples.items())
        report(f"{title}, {time.monotonic() - started_s:.1f} s, images/s: {rates}")
