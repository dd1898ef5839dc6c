"""Parity of a converted teacher with its float32 ONNX file: how close their outputs are on the same images."""

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
from kd_pipeline.teachers.tensorrt.manifest import Precision

__all__ = [
    "CalibrationSet",
    "ParityReference",
    "check_parity",
    "generate_calibration_set",
    "images_digest",
    "make_reference",
    "measure_parity",
]

_NUM_IMAGES = 64
"""Smallest number of images for a check."""
_TEMPERATURE = 4.0
"""Of the softmax in the KL divergence; a usual one in distillation."""
_TIE = 0.05
"""Logits that are closer than this part of the logits' standard deviation count as tied.

The top class of an untrained network leads by so little on many images that any rounding changes it, at a cosine of
0.9999998. A trained network's hardly ever does.
"""
_WORSE: dict[str, Callable[[float, float], float]] = {"cosine": min, "top1_agreement": min, "kl": max}
"""The metrics of `Parity`, and how to take the worse one of two values."""
_HALF_BOUNDS = {"cosine": 0.999, "top1_agreement": 0.99, "kl": 0.001}
_EIGHT_BIT_BOUNDS = {"cosine": 0.99, "top1_agreement": 0.95, "kl": 0.01}


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Images that an engine is checked on, and that give int8 and fp8 their ranges."""

    images: Tensor
    """`[N, 3, H, W]` float32 on the CPU, normalized for the teacher."""
    source: str
    """Where they came from, for the manifest."""
    config: Path | None = None
    """The config file that describes them, if there is one."""


@dataclass(frozen=True, slots=True)
class ParityReference:
    """Images, and the outputs of the float32 file for them."""

    images: Tensor
    """`[N, 3, H, W]` float32, rounded to values of float16."""
    outputs: Mapping[str, Tensor]
    """Float32, by the teacher's name for the output."""
    source: str
    """Where the images came from."""

    def to_bytes(self) -> bytes:
        """An `.npz` file with float16 images and float32 outputs."""
        stream = io.BytesIO()
        arrays: dict[str, Any] = {name: output.numpy() for name, output in self.outputs.items()}
        np.savez(stream, images=self.images.half().numpy(), **arrays)
        return stream.getvalue()


def generate_calibration_set(image_shape: tuple[int, int, int], num_images: int = _NUM_IMAGES) -> CalibrationSet:
    """Smooth noise at several scales `[num_images, *image_shape]`, for a check without real images."""
    generator = torch.Generator().manual_seed(0)
    channels, height, width = image_shape
    images = torch.zeros(num_images, channels, height, width)
    for cells in (2, 4, 8, 16, 32):
        noise = torch.randn(num_images, channels, cells, cells, generator=generator)
        images += F.interpolate(noise, size=(height, width), mode="bilinear", align_corners=False)
    return CalibrationSet(images / images.std(), "generated")


def images_digest(images: Tensor) -> str:
    """Hex digest of the values of `images` on the CPU."""
    return hashlib.sha256(images.contiguous().numpy().data).hexdigest()


def make_reference(
    teacher: Callable[[Tensor], Mapping[str, Tensor]], calibration_set: CalibrationSet
) -> ParityReference:
    """Run the float32 `teacher` on the images of `calibration_set`, rounded to float16.

    Raises:
        EngineError: there are no images, float16 cannot hold them, or an output is not finite.
    """
    source = calibration_set.source
    if not len(calibration_set.images):
        raise EngineError(f"there are no images to check the teacher on in {source}")
    images = calibration_set.images.half().float()
    if not images.isfinite().all():
        raise EngineError(f"the images of {source} exceed the range of float16; normalize them")
    outputs = _run(teacher, images, _NUM_IMAGES)
    for name, output in outputs.items():
        if not output.isfinite().all():
            raise EngineError(
                f"the float32 teacher itself returns {name!r} with NaN or inf for {_num_bad(output)} of {len(images)} "
                f"images ({source}); its weights or the images' normalization are wrong"
            )
    return ParityReference(images, outputs, source)


def check_parity(
    reference: ParityReference,
    teacher: Callable[[Tensor], Mapping[str, Tensor]],
    *,
    batch_sizes: Sequence[int],
    precision: Precision,
) -> dict[str, float]:
    """Run `teacher` on the images of `reference` in batches of each size, and compare the outputs.

    Returns:
        The worst `cosine`, `top1_agreement` and `kl` over all batch sizes, as `Parity` describes them.

    Raises:
        EngineError: an output has NaN or inf or the wrong shape, or a metric is out of bounds for `precision`.
    """
    bounds = _HALF_BOUNDS if precision in ("fp32", "fp16", "bf16") else _EIGHT_BIT_BOUNDS
    worst = {"cosine": 1.0, "top1_agreement": 1.0, "kl": 0.0}
    for batch_size in sorted(set(batch_sizes)):
        outputs = _run(teacher, reference.images, batch_size)
        metrics = measure_parity(outputs, reference.outputs)
        failed = [
            f"{name} {metrics[name]:.4g} (allowed {'up to' if name == 'kl' else 'from'} {bound:g})"
            for name, bound in bounds.items()
            if _WORSE[name](metrics[name], bound) != bound
        ]
        if failed:
            cosines = sorted((_cosine(name, wanted, outputs), name) for name, wanted in reference.outputs.items())
            raise EngineError(
                f"the {precision} teacher's outputs in batches of {batch_size} are too far from float32 on "
                f"{len(reference.images)} images ({reference.source}): {', '.join(failed)}; cosine of each output, "
                f"worst first: {', '.join(f'{name!r} {cosine:.4g}' for cosine, name in cosines)}. {_advice(precision)}"
            )
        worst = {name: worse(worst[name], metrics[name]) for name, worse in _WORSE.items()}
    return worst


def measure_parity(outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Compare outputs with the float32 outputs `wanted`: `cosine`, `top1_agreement` and `kl`, as in `Parity`.

    Raises:
        EngineError: an output is missing, has NaN or inf, or has a different shape.
    """
    cosine = min(_cosine(name, output, outputs) for name, output in wanted.items())
    if "logits" not in wanted:
        return {"cosine": cosine, "top1_agreement": 1.0, "kl": 0.0}
    logits_NK, wanted_NK = outputs["logits"], wanted["logits"]
    log_found_NK = F.log_softmax(logits_NK.double() / _TEMPERATURE, dim=1)
    log_wanted_NK = F.log_softmax(wanted_NK.double() / _TEMPERATURE, dim=1)
    return {
        "cosine": cosine,
        "top1_agreement": _top1_agreement(logits_NK, wanted_NK),
        "kl": F.kl_div(log_found_NK, log_wanted_NK, reduction="batchmean", log_target=True).clamp(min=0).item(),
    }


def _run(teacher: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Outputs for all images, in full batches: the last one is filled up with images from the start."""
    num_images = len(images)
    num_rows = -(-num_images // batch_size) * batch_size
    rows = torch.arange(num_rows) % num_images
    batches = [teacher(images[batch]) for batch in torch.split(rows, batch_size)]
    return {name: torch.cat([batch[name].cpu() for batch in batches])[:num_images] for name in batches[0]}


def _cosine(name: str, wanted: Tensor, outputs: Mapping[str, Tensor]) -> float:
    """Smallest cosine of an output with `wanted` over the images."""
    found = outputs.get(name)
    if found is None or found.shape != wanted.shape:
        shape = "nothing" if found is None else list(found.shape)
        raise EngineError(f"output {name!r}: float32 returns {list(wanted.shape)}, the converted teacher {shape}")
    if not found.isfinite().all():
        raise EngineError(
            f"the converted teacher returns {name!r} with NaN or inf for {_num_bad(found)} of {len(found)} images, and "
            "float32 does not: values exceed the range of the precision; use bf16, which has the range of float32"
        )
    found, wanted = found.double().flatten(1), wanted.double().flatten(1)
    norms = found.norm(dim=1) * wanted.norm(dim=1)
    cosines = (found * wanted).sum(1) / norms.clamp(min=1e-300)
    return torch.where(norms > 0, cosines, (found == wanted).all(1).double()).min().item()


def _num_bad(output: Tensor) -> int:
    return int((~output.isfinite()).flatten(1).any(1).sum())


def _top1_agreement(logits_NK: Tensor, wanted_NK: Tensor) -> float:
    """Part of the rows whose top class in `logits_NK` is also the top class in `wanted_NK`, or tied with it there."""
    chosen_N = wanted_NK.gather(1, logits_NK.argmax(1, keepdim=True)).squeeze(1)
    tied_N = wanted_NK.amax(1) - _TIE * wanted_NK.std(1, correction=0)
    return (chosen_N >= tied_N).double().mean().item()


def _advice(precision: Precision) -> str:
    match precision:
        case "fp16":
            return "Use bf16, which has the range of float32, or fp32"
        case "bf16":
            return "Use fp16, which has more digits, or fp32"
        case "int8" | "fp8":
            return "Use fp16 or bf16, or calibrate on images that the teacher was trained on"
        case _:
            return "The file returns different outputs at different batch sizes; export it again"
