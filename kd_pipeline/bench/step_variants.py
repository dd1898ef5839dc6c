"""The variants of a distillation step that `bench step` compares: plain PyTorch, and this library."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import InstanceOf
from torch import Tensor, nn

from kd_pipeline._core.settings import Settings
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline._core.torch_compile import torch_compile
from kd_pipeline.batch import KDBatch
from kd_pipeline.bench.torchvision_loaders import LoadTask, Stream, torchvision_pil, torchvision_tensor
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.losses.settings import DistillSettings
from kd_pipeline.models.features import with_features
from kd_pipeline.models.modules import named_outputs
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.settings import TeacherSettings

__all__ = [
    "EAGER",
    "NEED_JPEG",
    "NEED_NETWORK",
    "NEED_ONNX",
    "ON_DALI",
    "ON_TORCH_LOADERS",
    "PARTS",
    "PHASES",
    "VARIANTS",
    "PhaseTimer",
    "Step",
    "StepTask",
    "Variant",
    "open_network",
]

PHASES = ("loader", "teacher", "student", "optimizer")
"""What the time of a step is split into. `student` is forward, loss and backward. On a GPU this library's teacher runs
concurrently with everything else, and the time that a step waits for it counts as `loader`."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NUM_CALIBRATED = 64
"""Images that an int8 teacher takes its ranges from."""


class StepTask(Settings):
    """One distillation step, the same for every variant; plain values that can be sent to another process."""

    root: Path
    """Images in class folders."""
    no_jpeg: Path | None = None
    """One of the images that is not JPEG; None if all are."""
    transform: TrainTransform
    batch_size: int
    teacher: ModelSettings | None
    """The network, for variants that run it in PyTorch; None if there is only the ONNX file."""
    features: tuple[str, ...] = ()
    """Layers of the network whose outputs the student learns from too."""
    outputs: dict[str, InstanceOf[TensorSpec]]
    """What the teacher returns."""
    onnx: Path | None
    """The teacher, for the compiled backends; None if no variant runs it."""
    teacher_alone: Literal["c", "e"] = "e"
    """The row whose teacher is measured alone: that of `torch.compile`, or the one that runs the ONNX file."""
    recording: Path
    """Its recorded outputs, for the variant that replays them."""
    student: ModelSettings
    """With its number of classes, or 0 without a head."""
    distill: DistillSettings
    """The loss, which needs no labels."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Of the student's forward and backward pass, by autocast."""
    teacher_precision: Literal["fp32", "bf16", "fp16", "int8"]
    """Of the teacher wherever it is compiled; PyTorch, which has no int8, runs it in bf16 then."""
    device: str
    """`cpu` or `cuda:<number>`."""
    num_threads: int
    """Of DALI, of a teacher on the CPU and of torch; also worker processes of torch's `DataLoader`."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(3, H, W)`."""
        return self.transform.image_shape

    @property
    def pytorch_precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """Of the teacher where PyTorch compiles it."""
        return "bf16" if self.teacher_precision == "int8" else self.teacher_precision


Step = Callable[["PhaseTimer"], int]
"""Does one step, marks the end of each phase, and returns the number of images."""


class Variant(NamedTuple):
    """One way to implement the step."""

    name: str
    open: Callable[[StepTask, ExitStack], Step]
    """Builds everything; puts on the stack what must be closed."""


class PhaseTimer:
    """Adds up the time of each phase: of the host on a CPU, and of the current stream on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self._moved_s = dict.fromkeys(PHASES, 0.0)

    def start(self) -> None:
        """Reset, and begin the first phase."""
        self._marks = [("", self._now())]
        self._moved_s = dict.fromkeys(PHASES, 0.0)

    def mark(self, phase: str) -> None:
        """Count the time since the last mark as `phase`."""
        self._marks.append((phase, self._now()))

    def move(self, seconds: float, *, origin: str, to: str) -> None:
        """Count so many seconds of the host as `to` instead of `origin`; does not change a GPU's own time."""
        if self._device.type == "cpu":
            self._moved_s[origin] -= seconds
            self._moved_s[to] += seconds

    def totals_s(self) -> dict[str, float]:
        """Seconds of each phase; waits for a GPU."""
        totals_s = dict(self._moved_s)
        for (_, before), (phase, now) in zip(self._marks, self._marks[1:], strict=False):
            totals_s[phase] += self._between_s(before, now)
        return totals_s

    def elapsed_s(self) -> float:
        """Seconds from the start to the last mark; waits for a GPU."""
        return self._between_s(self._marks[0][1], self._marks[-1][1])

    def _between_s(self, before: Any, now: Any) -> float:
        if self._device.type == "cpu":
            return float(now - before)
        now.synchronize()
        return float(before.elapsed_time(now)) / 1000

    def _now(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _eager(task: StepTask, opened: ExitStack) -> Step:
    """The usual script: PIL in worker processes, a float32 teacher under `no_grad`, everything eager."""
    teacher = _network(task)
    return _plain(task, opened, torchvision_pil, teacher, _Student(task, compiled=False))


def _best_torch(task: StepTask, opened: ExitStack) -> Step:
    """The best of PyTorch: `decode_jpeg` to tensors, channels last, half precision, both networks compiled."""
    dtype = _DTYPES[task.pytorch_precision]
    network = _network(task).to(dtype).to(memory_format=torch.channels_last)
    compiled = torch_compile(network)

    def teacher(images: Tensor) -> object:
        return compiled(images.to(dtype, memory_format=torch.channels_last))

    return _plain(task, opened, torchvision_tensor, teacher, _Student(task))


def _plain(
    task: StepTask,
    opened: ExitStack,
    open_stream: Callable[[LoadTask], Stream],
    teacher: Callable[[Tensor], object],
    student: "_Student",
) -> Step:
    """A step without this library."""
    torch.set_num_threads(task.num_threads)
    loading = LoadTask(task.root, task.transform, task.batch_size, task.num_threads, torch.device(task.device))
    stream = opened.enter_context(closing(open_stream(loading)))
    rows = _rows(task)

    def step(timer: PhaseTimer) -> int:
        images = next(stream)
        timer.mark("loader")
        with torch.no_grad():
            outputs = {name: output.float() for name, output in named_outputs(teacher(images)).items()}
        timer.mark("teacher")
        student.learn(KDBatch(images=images, teacher=outputs, **rows), timer)
        return len(images)

    return step


def _torch_teacher(task: StepTask, opened: ExitStack, *, ahead: int) -> Step:
    return _distill(task, opened, _open_torch_compiled(task, opened), ahead=ahead)


def _compiled_teacher(task: StepTask, opened: ExitStack, *, ahead: int) -> Step:
    return _distill(task, opened, _open_compiled(task, opened), ahead=ahead)


def _recorded_teacher(task: StepTask, opened: ExitStack) -> Step:
    return _distill(task, opened, opened.enter_context(closing(Recording(task.recording))), ahead=1)


def _distill(task: StepTask, opened: ExitStack, teacher: Teacher | Recording, *, ahead: int) -> Step:
    """A step with `KDDataLoader`."""
    torch.set_num_threads(task.num_threads)
    batches = opened.enter_context(closing(_batches(task, teacher, ahead)))
    student = _Student(task)

    def step(timer: PhaseTimer) -> int:
        busy_s = teacher.busy_s
        batch = next(batches)
        timer.mark("loader")
        timer.move(teacher.busy_s - busy_s, origin="loader", to="teacher")
        student.learn(batch, timer)
        return len(batch.images)

    return step


def _student_only(task: StepTask, opened: ExitStack) -> Step:
    """Images and teacher outputs that are already there: the limit of any loader and teacher."""
    torch.set_num_threads(task.num_threads)
    images = _resident_images(task)
    outputs = {name: _random(name, spec, images) for name, spec in task.outputs.items()}
    batch = KDBatch(images=images, teacher=outputs, **_rows(task))
    student = _Student(task)

    def step(timer: PhaseTimer) -> int:
        student.learn(batch, timer)
        return len(images)

    return step


def _loader_only(task: StepTask, opened: ExitStack) -> Step:
    batches = opened.enter_context(closing(_batches(task, None, ahead=1)))

    def step(timer: PhaseTimer) -> int:
        num_images = len(next(batches).images)
        timer.mark("loader")
        return num_images

    return step


def _teacher_only(task: StepTask, opened: ExitStack) -> Step:
    images = _resident_images(task)
    teacher = (_open_torch_compiled if task.teacher_alone == "c" else _open_compiled)(task, opened)

    def step(timer: PhaseTimer) -> int:
        teacher(images)
        timer.mark("teacher")
        return len(images)

    return step


VARIANTS: Mapping[str, Variant] = {
    "a": Variant("PIL, all eager", _eager),
    "b": Variant("decode_jpeg, all torch.compile", _best_torch),
    "c": Variant("KDDataLoader, torch.compile teacher", lambda task, opened: _torch_teacher(task, opened, ahead=1)),
    "d": Variant("KDDataLoader, compiled teacher", lambda task, opened: _compiled_teacher(task, opened, ahead=0)),
    "e": Variant("the same, teacher ahead", lambda task, opened: _compiled_teacher(task, opened, ahead=1)),
    "f": Variant("student alone, data resident", _student_only),
    "g": Variant("KDDataLoader, recorded teacher", _recorded_teacher),
    "h": Variant("(c) with no teacher ahead", lambda task, opened: _torch_teacher(task, opened, ahead=0)),
    "loader": Variant("loading alone", _loader_only),
    "teacher": Variant("compiled teacher alone", _teacher_only),
}
"""By the letter of the row in the table."""
PARTS = ("f", "loader", "teacher")
"""Parts of the step, which are always measured."""
NEED_NETWORK = ("a", "b", "c", "h")
"""Variants that run the teacher in PyTorch."""
NEED_ONNX = ("d", "e", "g")
"""Variants that run its ONNX file, or replay what that returned."""
NEED_JPEG = ("b",)
"""Variants that decode with `decode_jpeg`."""
EAGER = ("a", "loader")
"""Variants in which nothing is compiled."""
ON_DALI = ("c", "d", "e", "g", "h", "loader")
"""Variants that load with `KDDataLoader`."""
ON_TORCH_LOADERS = ("a", "b")
"""Variants that load with worker processes of torch's `DataLoader`."""


class _Student:
    """The network that is trained, with its loss and optimizer."""

    def __init__(self, task: StepTask, *, compiled: bool = True) -> None:
        torch.manual_seed(0)
        network = open_model(task.student)
        self._format = torch.channels_last if compiled else torch.contiguous_format
        self._network = network.to(task.device).to(memory_format=self._format).train()
        self._distillation = Distillation(
            task.distill,
            student=self._network,
            teacher_outputs=task.outputs,
            image_shape=task.image_shape,
            num_classes=task.student.num_classes or None,
        )
        parameters = [*self._network.parameters(), *self._distillation.parameters()]
        self._optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
        self._run: Callable[[Tensor], Any] = torch_compile(self._network) if compiled else self._network
        self._autocast = (
            nullcontext()
            if task.precision == "fp32"
            else torch.autocast(torch.device(task.device).type, dtype=_DTYPES[task.precision])
        )

    def learn(self, batch: KDBatch, timer: PhaseTimer) -> None:
        """Do one step on a batch with the teacher's outputs, as a training does."""
        with self._autocast:
            with self._distillation.student_features(self._network) as features:
                outputs = self._run(batch.images.contiguous(memory_format=self._format))
            loss = self._distillation(outputs, features, batch, epoch=0, epochs=1).total
        loss.backward()
        timer.mark("student")
        self._optimizer.step()
        self._optimizer.zero_grad()
        timer.mark("optimizer")


def open_network(settings: ModelSettings, features: Sequence[str]) -> nn.Module:
    """The teacher in PyTorch, in eval mode, whose outputs include those layers."""
    torch.manual_seed(1)  # the same in every process
    network = open_model(settings)
    return (with_features(network, features) if features else network).eval().requires_grad_(False)


def _network(task: StepTask) -> nn.Module:
    assert task.teacher is not None  # variants that need the network are skipped without one
    return open_network(task.teacher, task.features).to(task.device)


def _rows(task: StepTask) -> dict[str, Any]:
    """What a batch without labels has besides images and the teacher's outputs."""
    index = torch.arange(task.batch_size, device=task.device)
    return {"labels": None, "index": index, "valid": torch.ones_like(index, dtype=torch.bool)}


def _random(name: str, spec: TensorSpec, images: Tensor) -> Tensor:
    """In place of an output of the teacher for `images`."""
    sizes = [size for size in spec.shape[1:] if size is not None]
    if len(sizes) < len(spec.shape) - 1:
        raise ConfigError(f"the student alone needs the size of the teacher's output {name!r}, which is open: {spec}")
    return torch.randn(len(images), *sizes, device=images.device)


def _open_torch_compiled(task: StepTask, opened: ExitStack) -> Teacher:
    settings = TeacherSettings(backend="pytorch", precision=task.pytorch_precision, compile=True)
    return _open_teacher(task, opened, settings, _network(task))


def _open_compiled(task: StepTask, opened: ExitStack) -> Teacher:
    num_threads = task.num_threads if torch.device(task.device).type == "cpu" else None
    settings = TeacherSettings(onnx=task.onnx, precision=task.teacher_precision, num_threads=num_threads)
    return _open_teacher(task, opened, settings)


def _open_teacher(
    task: StepTask, opened: ExitStack, settings: TeacherSettings, module: nn.Module | None = None
) -> Teacher:
    teacher = open_teacher(
        settings,
        module=module,
        image_shape=task.image_shape,
        device=task.device,
        batch_size=task.batch_size,
        calibration_images=lambda: _calibration_images(task),
    )
    return opened.enter_context(closing(teacher))


def _batches(task: StepTask, teacher: Teacher | Recording | None, ahead: int) -> Generator[KDBatch, None, None]:
    with KDDataLoader(
        ImageFolder(task.root, labeled=False),
        task.transform,
        teacher,
        batch_size=task.batch_size,
        last_batch="drop",
        device=task.device,
        num_threads=task.num_threads,
        ahead=ahead,
    ) as loader:
        while True:
            yield from loader


def _calibration_images(task: StepTask) -> Tensor:
    """The first training images `[N, 3, H, W]` float32 on the CPU."""
    num_batches = -(-_NUM_CALIBRATED // task.batch_size)
    with closing(_batches(task, None, ahead=0)) as batches:
        images = [batch.images.float().cpu() for batch in islice(batches, num_batches)]
    return torch.cat(images)[:_NUM_CALIBRATED]


def _resident_images(task: StepTask) -> Tensor:
    with closing(_batches(task, None, ahead=0)) as batches:
        return next(batches).images.clone()
