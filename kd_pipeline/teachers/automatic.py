"""Which backend and precision run a teacher whose settings leave that open: measured on a few images, then kept."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.cpu_features import cpu_name
from kd_pipeline._core.kept_files import kept_folder
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.version import __version__
from kd_pipeline.errors import EngineError, KDPipelineError, TeacherError
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.parity import ParityReference, check_parity, images_digest, measure_parity, summary
from kd_pipeline.teachers.settings import Runtime
from kd_pipeline.teachers.tensorrt.manifest import OutputParity, Precision

__all__ = ["Choice", "Comparison", "Contest", "choose"]

_logger = logging.getLogger("kd_pipeline")

_BATCH = 8
"""Images in a call. It is also the smallest number of images that are compared."""
_MAX_IMAGES = 64
_REFERENCE_S = 0.8
"""Time for the outputs in float32, most of what a comparison takes: about 2 s in all."""
_CLEARLY_FASTER = 1.1
"""A runtime is preferred to the one before it if it is faster by this factor, so noise does not decide."""
_COMPARISON = "comparison.json"


class Measured(Settings):
    """One runtime beside the reference, on the same images."""

    runtime: Runtime
    s_per_image: float
    """Of the fastest call; it includes the first one only if there was no other."""
    outputs: dict[str, OutputParity] = Field(default_factory=dict)
    """How close they are to those of float32; empty if they are too far off."""
    problem: str = ""
    """Why its outputs are too far from float32; empty if they are not."""


class Comparison(Settings):
    """What was measured, which is kept."""

    num_images: int
    measured: tuple[Measured, ...]
    """Those that could be opened."""


@dataclass(frozen=True, slots=True)
class Contest:
    """The runtimes that one teacher could have."""

    reference: Runtime
    """Whose outputs are the teacher's: a module, or an ONNX file, in float32."""
    candidates: tuple[Runtime, ...]
    """In the precision that is wanted, the preferred one first, and the reference's own backend last."""
    open: Callable[[Runtime], Teacher]
    """Opens the teacher."""
    key: str
    """Digest of the teacher, and of all that the outputs and their speed depend on besides CPU and images."""
    images: Callable[[], Tensor]
    """Returns images `[N, 3, H, W]` float32 on the CPU."""
    images_key: str | None
    """Digest of what the images depend on; None loads them to find out."""
    obeys: bool = False
    """Whether the precision is the user's, which is then taken even if no outputs are close to float32."""


@dataclass(slots=True)
class Choice:
    """The runtime of a teacher, and why."""

    runtime: Runtime
    teacher: Teacher
    comparison: Comparison
    problems: dict[Runtime, str] = field(default_factory=dict)
    """Why others were left out."""

    @property
    def agreement(self) -> str:
        """How close it is to float32, such as `cosine 0.99997 to float32 on 64 images`."""
        found = next((each for each in self.comparison.measured if each.runtime == self.runtime), None)
        return "" if found is None else found.problem or summary(found.outputs, self.comparison.num_images)

    def times_as_fast_as(self, backend: str) -> float | None:
        """Its speed relative to the same precision, or else float32, in another backend, if both were measured."""
        s_per_image = {each.runtime: each.s_per_image for each in self.comparison.measured}
        others = [Runtime(backend=backend, precision=precision) for precision in (self.runtime.precision, "fp32")]
        other = next((s_per_image[each] for each in others if each in s_per_image), None)
        own = s_per_image.get(self.runtime)
        return None if own is None or other is None or backend == self.runtime.backend else other / own


def choose(contest: Contest) -> Choice:
    """The fastest runtime whose outputs agree with the reference, open.

    Where a candidate is too far from float32, its backend is a candidate in float32 too. What is measured is kept by
    everything it depends on, so a second start opens the chosen runtime and nothing else, and chooses the same.

    Raises:
        TeacherError: the reference cannot be opened, or fails.
    """
    with ExitStack() as opened:
        race = _Race(contest, opened)
        comparison = race.kept()
        runtime = _fastest(contest, comparison)
        teacher = race.opened.pop(runtime, None) or contest.open(runtime)
        problems = {each.runtime: each.problem for each in comparison.measured if each.problem} | race.failed
        return Choice(runtime, teacher, comparison, problems)


def _fastest(contest: Contest, comparison: Comparison) -> Runtime:
    """The best of the runtimes that agree; the reference itself if none does."""
    agreeing = {each.runtime: each.s_per_image for each in comparison.measured if not each.problem}
    if contest.obeys and not {*agreeing} & {*contest.candidates}:
        return contest.candidates[-1]
    order = [*contest.candidates, *(_in_float32(each) for each in contest.candidates)]
    best = None
    for runtime in dict.fromkeys(order):
        if runtime in agreeing and (best is None or agreeing[best] > _CLEARLY_FASTER * agreeing[runtime]):
            best = runtime
    return best or contest.reference


def _in_float32(runtime: Runtime) -> Runtime:
    return Runtime(backend=runtime.backend, precision="fp32")


class _Race:
    """Measures the runtimes of a contest, unless that was done before."""

    def __init__(self, contest: Contest, stack: ExitStack) -> None:
        self._contest = contest
        self.opened: dict[Runtime, Teacher] = {}
        """Runtimes that were measured now. What nobody takes is closed with the stack."""
        self.failed: dict[Runtime, str] = {}
        """Why runtimes could not be opened now."""
        stack.callback(self._close)

    def kept(self) -> Comparison:
        """The comparison of an earlier start, or of this one."""
        images = None
        key = self._contest.images_key
        if key is None:
            images = self._contest.images()
            key = images_digest(images)
        facts = (
            f"comparison 2 {__version__} {torch.__version__} {cpu_name()} {torch.get_num_threads()} {key} "
            f"{self._contest.key} {self._contest.reference} {', '.join(map(str, self._contest.candidates))}"
        )
        compared: list[Comparison] = []

        def make(folder: Path) -> None:
            compared.append(self._compare(self._contest.images() if images is None else images))
            if self.failed:
                raise _NotKeptError
            write_atomic(folder / _COMPARISON, compared[0].model_dump_json(indent=2) + "\n")

        try:
            folder = kept_folder("comparisons", hashlib.sha256(facts.encode()).hexdigest(), make)
        except _NotKeptError:
            return compared[0]
        try:
            return compared[0] if compared else _read(folder / _COMPARISON)
        except (OSError, ValueError) as exc:
            raise TeacherError(f"{folder} is damaged ({exc}); remove it, and what it holds is measured again") from None

    def _compare(self, images: Tensor) -> Comparison:
        contest = self._contest
        teacher = contest.open(contest.reference)
        self.opened[contest.reference] = teacher
        reference, s_per_image = _run_reference(teacher, images)
        itself = measure_parity(reference.outputs, reference.outputs)
        found = {contest.reference: Measured(runtime=contest.reference, s_per_image=s_per_image, outputs=itself)}
        for runtime in contest.candidates:
            self._measure(runtime, reference, found)
        for runtime in contest.candidates:
            # Without a word of the user, what is too far from float32 runs in float32.
            if not contest.obeys and (runtime not in found or found[runtime].problem):
                self._measure(_in_float32(runtime), reference, found)
        return Comparison(num_images=len(reference.images), measured=tuple(found.values()))

    def _measure(self, runtime: Runtime, reference: ParityReference, found: dict[Runtime, Measured]) -> None:
        """Add `runtime` to what was `found`, or to those that failed."""
        if runtime in found or runtime in self.failed:
            return
        try:
            self.opened[runtime] = self._contest.open(runtime)
            found[runtime] = _measure(runtime, self.opened[runtime], reference)
        except KDPipelineError as exc:
            self.failed[runtime] = str(exc)

    def _close(self) -> None:
        for teacher in self.opened.values():
            teacher.close()


class _NotKeptError(Exception):
    """What was found may be different the next time, as with a full disk."""


class _Timed:
    """A teacher, with the time of each call."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._s_per_image: list[float] = []

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]:
        started = time.perf_counter()
        outputs = self._teacher(images.to(self._teacher.images.dtype))
        self._s_per_image.append((time.perf_counter() - started) / len(images))
        return outputs

    @property
    def s_per_image(self) -> float:
        """Of the fastest call but the first, in which runtimes choose their kernels."""
        return min(self._s_per_image[1:] or self._s_per_image)


def _run_reference(teacher: Teacher, images: Tensor) -> tuple[ParityReference, float]:
    """Outputs for as many images as there is time for, and the time for one."""
    timed = _Timed(teacher)
    batch = min(_BATCH, teacher.max_batch, len(images))
    images = images[:_MAX_IMAGES]
    images = images[: len(images) // batch * batch]
    outputs: list[Mapping[str, Tensor]] = []
    started = time.perf_counter()
    for part in torch.split(images, batch):
        outputs.append(timed(part))
        if len(outputs) * batch >= _BATCH and time.perf_counter() - started > _REFERENCE_S:
            break
    joined = {name: torch.cat([each[name] for each in outputs]) for name in outputs[0]}
    return ParityReference(images[: len(outputs) * batch], joined, "training images"), timed.s_per_image


def _measure(runtime: Runtime, teacher: Teacher, reference: ParityReference) -> Measured:
    timed = _Timed(teacher)
    batch = min(_BATCH, teacher.max_batch, len(reference.images))
    precision: Precision = runtime.precision  # type: ignore[assignment]  # a runtime may have one of its own
    try:
        outputs = check_parity(reference, timed, batch_sizes=(batch,), precision=precision)
    except EngineError as exc:
        return Measured(runtime=runtime, s_per_image=timed.s_per_image, problem=str(exc))
    return Measured(runtime=runtime, s_per_image=timed.s_per_image, outputs=outputs)


def _read(path: Path) -> Comparison:
    """A comparison in the user's own cache.

    Raises:
        OSError, ValueError: it is damaged.
    """
    return Comparison.model_validate(json.loads(path.read_text(encoding="utf-8")))
