"""The ways to do a distillation step that `bench step` compares: what people run today, and this library."""

import copy
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kd_pipeline import losses
from kd_pipeline._core.settings import Settings
from kd_pipeline.batch import KDBatch
from kd_pipeline.bench.loaders import LoadTask, torchvision_pil, torchvision_tensor
from kd_pipeline.data.sources.base import ImageFolder
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings

__all__ = ["PHASES", "WAYS", "Clock", "Step", "StepTask", "Way"]

PHASES = ("loader", "teacher", "student", "optimizer")
"""What a step's time is split into. `student` is forward, loss and backward. On a GPU the teacher of this library works
beside everything else, and what of it a step has to wait for is in `loader`."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TEMPERATURE = 4.0


class StepTask(Settings):
    """One distillation step, as every way does it; plain values, so that it goes to another process."""

    root: Path
    """JPEG files in class folders."""
    transform: TrainTransform
    batch_size: int
    teacher: ModelSettings | None
    """The network, for what runs in PyTorch; None where there is only the file."""
    onnx: Path
    """The teacher, for the compiled backends."""
    recording: Path
    """Its recorded answers, for the way that replays them."""
    student: ModelSettings
    """With its number of classes."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Of the student's forward and backward pass, by autocast."""
    teacher_precision: Literal["fp32", "bf16", "fp16"]
    """Of the teacher wherever it is compiled."""
    device: str
    """`cpu` or `cuda:<number>`."""
    num_threads: int
    """Of DALI, of a teacher on the CPU and of torch; also worker processes of torch's `DataLoader`."""


Step = Callable[["Clock"], int]
"""Does one step, telling a clock when each phase is over, and returns the number of images."""


class Way(NamedTuple):
    """One way to do the step."""

    name: str
    open: Callable[[StepTask, ExitStack], Step]
    """Builds everything; what is to be closed goes on the stack."""


class Clock:
    """Sums up the time of each phase: of the host on a CPU, and of the current stream on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self._moved_s = dict.fromkeys(PHASES, 0.0)

    def start(self) -> None:
        """Forget everything, and begin the first phase."""
        self._marks = [("", self._now())]
        self._moved_s = dict.fromkeys(PHASES, 0.0)

    def mark(self, phase: str) -> None:
        """What happened since the last mark was `phase`."""
        self._marks.append((phase, self._now()))

    def move(self, seconds: float, *, origin: str, to: str) -> None:
        """So many seconds of the host that look like `origin` were `to`; a GPU's own time stays where it is."""
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
    """What people run: PIL in workers, the teacher under `no_grad` in float32, all of it eager."""
    teacher = _network(task.teacher, task).eval()
    return _plain(task, opened, torchvision_pil, teacher, _Student(task, compiled=False))


def _best_torch(task: StepTask, opened: ExitStack) -> Step:
    """What PyTorch has to offer: tensors decoded by `decode_jpeg`, channels last, half precision, both compiled."""
    dtype = _DTYPES[task.teacher_precision]
    network = _network(task.teacher, task).eval().to(dtype).to(memory_format=torch.channels_last)
    compiled: Callable[[Tensor], Tensor] = torch.compile(network)

    def teacher(images: Tensor) -> Tensor:
        return compiled(images.to(dtype, memory_format=torch.channels_last))

    return _plain(task, opened, torchvision_tensor, teacher, _Student(task))


def _plain(
    task: StepTask,
    opened: ExitStack,
    open_stream: Callable[[LoadTask], Generator[Tensor, None, None]],
    teacher: Callable[[Tensor], Tensor],
    student: "_Student",
) -> Step:
    torch.set_num_threads(task.num_threads)
    loading = LoadTask(task.root, task.transform, task.batch_size, task.num_threads, torch.device(task.device))
    stream = opened.enter_context(closing(open_stream(loading)))

    def step(clock: Clock) -> int:
        images = next(stream)
        clock.mark("loader")
        with torch.no_grad():
            logits = teacher(images)
        clock.mark("teacher")
        student.learn(images, logits.float(), clock)
        return len(images)

    return step


def _torch_teacher(task: StepTask, opened: ExitStack) -> Step:
    settings = TeacherSettings(backend="pytorch", precision=task.teacher_precision, compile=True)
    teacher = opened.enter_context(closing(_open(task, settings, _network(task.teacher, task))))
    return _taught(task, opened, teacher, ahead=1)


def _compiled_teacher(task: StepTask, opened: ExitStack, *, ahead: int) -> Step:
    return _taught(task, opened, _open_compiled(task, opened), ahead=ahead)


def _recorded_teacher(task: StepTask, opened: ExitStack) -> Step:
    settings = TeacherSettings(backend="recorded", path=task.recording)
    return _taught(task, opened, opened.enter_context(closing(_open(task, settings))), ahead=1)


def _taught(task: StepTask, opened: ExitStack, teacher: Teacher, *, ahead: int) -> Step:
    torch.set_num_threads(task.num_threads)
    batches = opened.enter_context(closing(_batches(task, teacher, ahead)))
    student = _Student(task)

    def step(clock: Clock) -> int:
        busy_s = teacher.busy_s
        batch = next(batches)
        clock.mark("loader")
        clock.move(teacher.busy_s - busy_s, origin="loader", to="teacher")
        student.learn(batch.images, batch.teacher["logits"], clock)
        return len(batch.images)

    return step


def _student_alone(task: StepTask, opened: ExitStack) -> Step:
    """Images and answers that are there already: no loader and no teacher can be faster."""
    torch.set_num_threads(task.num_threads)
    images = _resident_images(task)
    logits = torch.randn(len(images), task.student.num_classes or 0, device=images.device)
    student = _Student(task)

    def step(clock: Clock) -> int:
        student.learn(images, logits, clock)
        return len(images)

    return step


def _loading_alone(task: StepTask, opened: ExitStack) -> Step:
    batches = opened.enter_context(closing(_batches(task, None, ahead=1)))

    def step(clock: Clock) -> int:
        num_images = len(next(batches).images)
        clock.mark("loader")
        return num_images

    return step


def _teacher_alone(task: StepTask, opened: ExitStack) -> Step:
    images = _resident_images(task)
    teacher = _open_compiled(task, opened)

    def step(clock: Clock) -> int:
        teacher(images)
        clock.mark("teacher")
        return len(images)

    return step


WAYS: Mapping[str, Way] = {
    "a": Way("PIL, all eager", _eager),
    "b": Way("decode_jpeg, all torch.compile", _best_torch),
    "c": Way("KDDataLoader, torch.compile teacher", _torch_teacher),
    "d": Way("KDDataLoader, compiled teacher", lambda task, opened: _compiled_teacher(task, opened, ahead=0)),
    "e": Way("the same, teacher ahead", lambda task, opened: _compiled_teacher(task, opened, ahead=1)),
    "f": Way("student alone, data resident", _student_alone),
    "g": Way("KDDataLoader, recorded teacher", _recorded_teacher),
    "loader": Way("loading alone", _loading_alone),
    "teacher": Way("compiled teacher alone", _teacher_alone),
}
"""By the letter that the tables have; the last two are parts of the step, as `f` is."""


class _Student:
    """The network that learns, its loss and its optimizer."""

    def __init__(self, task: StepTask, *, compiled: bool = True) -> None:
        torch.manual_seed(0)
        network = open_model(task.student)
        self._format = torch.channels_last if compiled else torch.contiguous_format
        network = network.to(task.device).to(memory_format=self._format).train()
        self._optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        self._network: Callable[[Tensor], Tensor] = torch.compile(network) if compiled else network
        self._autocast = nullcontext() if task.precision == "fp32" else _autocast(task)

    def learn(self, images: Tensor, teacher_logits: Tensor, clock: Clock) -> None:
        """One step on `images` `[N, 3, H, W]` with the teacher's `[N, K]` answers."""
        with self._autocast:
            logits = self._network(images.contiguous(memory_format=self._format))
        loss = losses.soft_target(logits, teacher_logits, temperature=_TEMPERATURE)
        loss.backward()  # type: ignore[no-untyped-call]
        clock.mark("student")
        self._optimizer.step()
        self._optimizer.zero_grad()
        clock.mark("optimizer")


def _autocast(task: StepTask) -> torch.autocast:
    return torch.autocast(torch.device(task.device).type, dtype=_DTYPES[task.precision])


def _network(settings: ModelSettings | None, task: StepTask) -> nn.Module:
    assert settings is not None  # such ways are left out where there is no network
    torch.manual_seed(1)
    return copy.deepcopy(open_model(settings)).requires_grad_(False).to(task.device)


def _open_compiled(task: StepTask, opened: ExitStack) -> Teacher:
    on_cpu = torch.device(task.device).type == "cpu"
    settings = TeacherSettings(
        onnx=task.onnx, precision=task.teacher_precision, num_threads=task.num_threads if on_cpu else None
    )
    return opened.enter_context(closing(_open(task, settings)))


def _open(task: StepTask, settings: TeacherSettings, module: nn.Module | None = None) -> Teacher:
    size = task.transform.size
    return open_teacher(
        settings, module=module, image_shape=(3, size, size), device=task.device, batch_size=task.batch_size
    )


def _batches(task: StepTask, teacher: Teacher | None, ahead: int) -> Generator[KDBatch, None, None]:
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


def _resident_images(task: StepTask) -> Tensor:
    with closing(_batches(task, None, ahead=0)) as batches:
        return next(batches).images.clone()
