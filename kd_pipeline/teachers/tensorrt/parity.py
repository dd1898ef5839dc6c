"""Whether a converted teacher still gives the float32 file's answers, on the same images."""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_pipeline.errors import EngineError
from kd_pipeline.teachers.tensorrt.manifest import Parity, Precision

__all__ = [
    "NUM_IMAGES",
    "TEMPERATURE",
    "Exam",
    "Samples",
    "compare",
    "exam_path",
    "generated_samples",
    "likeness",
    "load_exam",
    "set_exam",
]

NUM_IMAGES = 64
"""Images that a comparison wants at least."""
TEMPERATURE = 4.0
"""Of the softmax in the KL divergence; a usual one in distillation."""
_TIE = 0.05
"""Classes whose logits differ by less than this part of the logits' standard deviation count as tied.

An untrained network leads by so little on many images that any rounding changes its first class, with a cosine of
0.9999998; a trained one hardly ever does.
"""


@dataclass(frozen=True, slots=True)
class _Bounds:
    cosine: float
    top1_agreement: float
    kl: float


_HALF = _Bounds(cosine=0.999, top1_agreement=0.99, kl=0.001)
_EIGHT_BITS = _Bounds(cosine=0.99, top1_agreement=0.95, kl=0.01)


@dataclass(frozen=True, slots=True)
class Samples:
    """Images that a teacher is tried on."""

    images: Tensor
    """`[N, 3, H, W]` float32 on the CPU, normalized as the teacher gets them."""
    source: str
    """Where they came from, for the manifest."""
    config: Path | None = None
    """The config file that describes them, where one does."""


@dataclass(frozen=True, slots=True)
class Exam:
    """Images, and the float32 file's answers to them."""

    images: Tensor
    """`[N, 3, H, W]` float32, every value of which float16 can hold."""
    answers: Mapping[str, Tensor]
    """Float32, by the teacher's name for the output."""
    source: str

    def to_bytes(self) -> bytes:
        """As an `.npz` file: float16 images, float32 answers."""
        stream = io.BytesIO()
        arrays: dict[str, Any] = {name: answer.numpy() for name, answer in self.answers.items()}
        np.savez(stream, images=self.images.half().numpy(), **arrays)
        return stream.getvalue()


def generated_samples(image_shape: tuple[int, int, int], num_images: int = NUM_IMAGES) -> Samples:
    """Smooth noise of many sizes `[num_images, *image_shape]`, for whoever has no images at hand."""
    generator = torch.Generator().manual_seed(0)
    channels, height, width = image_shape
    images = torch.zeros(num_images, channels, height, width)
    for cells in (2, 4, 8, 16, 32):
        noise = torch.randn(num_images, channels, cells, cells, generator=generator)
        images += F.interpolate(noise, size=(height, width), mode="bilinear", align_corners=False)
    return Samples(images / images.std(), "generated")


def set_exam(reference: Callable[[Tensor], Mapping[str, Tensor]], samples: Samples) -> Exam:
    """Ask the float32 teacher `reference` for its answers to `samples`, rounded to what float16 holds.

    Raises:
        EngineError: there are no images, or the reference itself has no finite answer.
    """
    if not len(samples.images):
        raise EngineError(f"there are no images to compare the teacher on in {samples.source}")
    images = samples.images.half().float()
    if not images.isfinite().all():
        raise EngineError(f"the images of {samples.source} leave the range of float16; normalize them")
    answers = _ask(reference, images, NUM_IMAGES)
    for name, answer in answers.items():
        if not answer.isfinite().all():
            raise EngineError(
                f"the float32 teacher itself answers {name!r} with NaN or inf for {_num_bad(answer)} of {len(images)} "
                f"images ({samples.source}); its weights or the images' normalization are wrong"
            )
    return Exam(images, answers, samples.source)


def exam_path(engine: Path) -> Path:
    """Where the exam of an engine lies: `<engine>.parity.npz`."""
    return engine.with_name(f"{engine.name}.parity.npz")


def load_exam(engine: Path, parity: Parity) -> Exam:
    """The exam that lies beside `engine`, as `parity` remembers it.

    Raises:
        EngineError: it is not there, or is another one.
    """
    path = exam_path(engine)
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise EngineError(f"{path} cannot be read: {exc.strerror}; build the engine again") from None
    found = hashlib.sha256(content).hexdigest()
    if found != parity.tensors_sha256:
        raise EngineError(f"{path} has the sha256 {found}, wanted {parity.tensors_sha256}; build the engine again")
    arrays = np.load(io.BytesIO(content), allow_pickle=False)
    answers = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "images"}
    return Exam(torch.from_numpy(arrays["images"]).float(), answers, parity.images)


def compare(
    exam: Exam, teacher: Callable[[Tensor], Mapping[str, Tensor]], *, batch_sizes: Sequence[int], precision: Precision
) -> dict[str, float]:
    """Give the exam to `teacher` in batches of each size; the worst figures over all sizes, if they pass.

    Returns:
        `cosine`, `top1_agreement` and `kl`, as `Parity` describes them.

    Raises:
        EngineError: an answer has NaN or inf, another shape, or is too far off; names the worst outputs.
    """
    bounds = _HALF if precision in ("fp32", "fp16", "bf16") else _EIGHT_BITS
    worst = {"cosine": 1.0, "top1_agreement": 1.0, "kl": 0.0}
    for batch_size in sorted(set(batch_sizes)):
        answers = _ask(teacher, exam.images, batch_size)
        figures = likeness(answers, exam.answers)
        failed = [
            f"{name} {figures[name]:.4g} (allowed {word} {bound:g})"
            for name, word, bound, is_good in (
                ("cosine", "from", bounds.cosine, figures["cosine"] >= bounds.cosine),
                ("top1_agreement", "from", bounds.top1_agreement, figures["top1_agreement"] >= bounds.top1_agreement),
                ("kl", "up to", bounds.kl, figures["kl"] <= bounds.kl),
            )
            if not is_good
        ]
        if failed:
            cosines = {name: _cosine(name, wanted, answers) for name, wanted in exam.answers.items()}
            outputs = ", ".join(
                f"{name!r} {cosine:.4g}" for name, cosine in sorted(cosines.items(), key=lambda x: x[1])
            )
            raise EngineError(
                f"the {precision} teacher's answers in batches of {batch_size} are too far from float32 on "
                f"{len(exam.images)} images ({exam.source}): {', '.join(failed)}; cosine of each output, worst first: "
                f"{outputs}. {_advice(precision)}"
            )
        worst = {
            "cosine": min(worst["cosine"], figures["cosine"]),
            "top1_agreement": min(worst["top1_agreement"], figures["top1_agreement"]),
            "kl": max(worst["kl"], figures["kl"]),
        }
    return worst


def likeness(answers: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """How like the float32 answers `wanted` others are: `cosine`, `top1_agreement` and `kl`, as `Parity` has them.

    Raises:
        EngineError: an answer has NaN or inf, another shape, or is not there.
    """
    cosine = min(_cosine(name, answer, answers) for name, answer in wanted.items())
    log_found = F.log_softmax(answers["logits"].double() / TEMPERATURE, dim=1)
    log_wanted = F.log_softmax(wanted["logits"].double() / TEMPERATURE, dim=1)
    return {
        "cosine": cosine,
        "top1_agreement": _top1_agreement(answers["logits"], wanted["logits"]),
        "kl": F.kl_div(log_found, log_wanted, reduction="batchmean", log_target=True).clamp(min=0).item(),
    }


def _ask(teacher: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Answers to all images, in whole batches: the last one is filled up with images from the start."""
    num_images = len(images)
    num_rows = -(-num_images // batch_size) * batch_size
    rows = torch.arange(num_rows) % num_images
    batches = [teacher(images[chosen]) for chosen in torch.split(rows, batch_size)]
    return {name: torch.cat([batch[name].cpu() for batch in batches])[:num_images] for name in batches[0]}


def _cosine(name: str, wanted: Tensor, answers: Mapping[str, Tensor]) -> float:
    found = answers.get(name)
    if found is None or found.shape != wanted.shape:
        shape = None if found is None else list(found.shape)
        raise EngineError(f"the converted teacher gives {name!r} as {shape}, the float32 one as {list(wanted.shape)}")
    if not found.isfinite().all():
        raise EngineError(
            f"the converted teacher answers {name!r} with NaN or inf for {_num_bad(found)} of {len(found)} images, and "
            "float32 does not: values leave the range of the precision; take bf16, which has the range of float32"
        )
    found, wanted = found.double().flatten(1), wanted.double().flatten(1)
    norms = found.norm(dim=1) * wanted.norm(dim=1)
    cosines = torch.where(
        norms > 0, (found * wanted).sum(1) / norms.clamp(min=1e-300), (found == wanted).all(1).double()
    )
    return cosines.min().item()


def _num_bad(answer: Tensor) -> int:
    return int((~answer.isfinite()).flatten(1).any(1).sum())


def _top1_agreement(found: Tensor, wanted: Tensor) -> float:
    """Part of the rows whose first class in `found` is the first in `wanted`, or as good as tied with it there."""
    chosen = wanted.gather(1, found.argmax(1, keepdim=True)).squeeze(1)
    tied = wanted.amax(1) - _TIE * wanted.std(1, correction=0)
    return (chosen >= tied).double().mean().item()


def _advice(precision: Precision) -> str:
    match precision:
        case "fp16":
            return "Take bf16, which has the range of float32, or fp32"
        case "bf16":
            return "Take fp16, which has more digits, or fp32"
        case "int8" | "fp8":
            return "Take fp16 or bf16, or find the ranges on other images, those that the teacher was trained on"
        case _:
            return "The file does not give the same answers in batches of every size; export it again"
