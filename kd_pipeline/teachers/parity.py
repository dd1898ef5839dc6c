"""Parity of a converted teacher with its float32 ONNX file: how close their outputs are on the same images."""

import hashlib
import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_pipeline.errors import EngineError
from kd_pipeline.teachers.tensorrt.manifest import OutputParity, Precision

__all__ = [
    "CalibrationSet",
    "ParityReference",
    "check_parity",
    "generate_calibration_set",
    "images_digest",
    "make_reference",
    "measure_parity",
    "read_reference",
    "summary",
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
_NEGLIGIBLE = 0.01
"""Vectors shorter than this part of the usual length in an output, in both, count as equal: their direction is noise.
"""
_OUTPUT_PREFIX = "output."
"""Before the names of outputs in a file, where images are too."""


@dataclass(frozen=True, slots=True)
class _Metric:
    """A field of `OutputParity`, and what is allowed."""

    field: str
    label: str
    half: float
    """Bound for fp32, fp16 and bf16."""
    eight_bits: float
    """Bound for int8 and fp8."""
    error: Callable[[float], float]
    """How far a value is from that of equal outputs; larger is worse."""

    def bound(self, precision: Precision) -> float:
        return self.half if precision in ("fp32", "fp16", "bf16") else self.eight_bits

    def excess(self, value: float, precision: Precision) -> float:
        """The error as a multiple of what is allowed."""
        return self.error(value) / self.error(self.bound(precision))


def _lack(share: float) -> float:
    return 1 - share


def _stretch(ratio: float) -> float:
    return max(ratio, 1 / ratio) - 1 if ratio > 0 else float("inf")


_METRICS = (
    _Metric("cosine", "cosine", 0.999, 0.99, _lack),
    _Metric("position_cosine", "cosine of a position", 0.995, 0.95, _lack),
    _Metric("pooled_cosine", "cosine of the mean over positions", 0.999, 0.99, _lack),
    _Metric("norm_ratio", "ratio of norms", 1.05, 1.15, _stretch),
    _Metric("top1_agreement", "top-1 agreement", 0.99, 0.95, _lack),
    _Metric("kl", "KL divergence", 0.001, 0.01, float),
)


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
        arrays: dict[str, Any] = {f"{_OUTPUT_PREFIX}{name}": output.numpy() for name, output in self.outputs.items()}
        np.savez(stream, images=self.images.half().numpy(), **arrays)
        return stream.getvalue()


def read_reference(content: bytes) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and outputs, in float32, of what `ParityReference.to_bytes` returned.

    Raises:
        Exception: it is something else; zipfile and NumPy raise of many kinds.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        num_bytes = sum(member.file_size for member in archive.infolist())
    if num_bytes > len(content):  # it would be compressed, and nothing is
        raise ValueError(f"it would unpack to {num_bytes} bytes")
    arrays = np.load(io.BytesIO(content), allow_pickle=False)
    tensors = {name: torch.from_numpy(arrays[name]).float() for name in arrays.files}
    images = tensors.pop("images")
    return images, {name.removeprefix(_OUTPUT_PREFIX): output for name, output in tensors.items()}


def generate_calibration_set(image_shape: tuple[int, ...], num_images: int = _NUM_IMAGES) -> CalibrationSet:
    """Smooth noise at several scales `[num_images, *image_shape]`, for a check without real images.

    Rows of another shape than `(C, H, W)` are normal numbers.
    """
    generator = torch.Generator().manual_seed(0)
    if len(image_shape) != 3:
        return CalibrationSet(torch.randn(num_images, *image_shape, generator=generator), "generated")
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
) -> dict[str, OutputParity]:
    """Run `teacher` on the images of `reference` in batches of each size, and compare the outputs.

    Returns:
        By output, the worst value of each metric over all batch sizes.

    Raises:
        EngineError: an output has NaN or inf or the wrong shape, or a metric is out of bounds for `precision`; names
            the outputs, the worst first.
    """
    worst: dict[str, OutputParity] = {}
    for batch_size in sorted(set(batch_sizes)):
        found = measure_parity(_run(teacher, reference.images, batch_size), reference.outputs)
        if reasons := _out_of_bounds(found, precision):
            raise EngineError(
                f"the {precision} teacher's outputs in batches of {batch_size} are too far from float32 on "
                f"{len(reference.images)} images ({reference.source}), worst first: {'; '.join(reasons)}. "
                f"{_advice(precision)}"
            )
        worst = {name: _worse(worst[name], parity) if worst else parity for name, parity in found.items()}
    return worst


def measure_parity(outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, OutputParity]:
    """Compare outputs `[N, ...]` with the float32 outputs `wanted`, by name.

    Raises:
        EngineError: an output is missing, has NaN or inf, or has a different shape.
    """
    return {name: _measure(name, _checked(name, output, outputs), output) for name, output in wanted.items()}


def summary(parities: Mapping[str, OutputParity], num_images: int) -> str:
    """The worst over all outputs, such as `top-1 as in float32 on 100.0 % of 64 images (cosine 0.99997)`.

    Without logits it is `cosine 0.99997 to float32 on 64 images`; empty if nothing was compared.
    """
    if not parities:
        return ""
    cosine = f"cosine {min(each.cosine for each in parities.values()):.5f}"
    for each in parities.values():
        if each.top1_agreement is not None:
            return f"top-1 as in float32 on {100 * each.top1_agreement:.1f} % of {num_images} images ({cosine})"
    return f"{cosine} to float32 on {num_images} images"


def _run(teacher: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Outputs for all images, in full batches: the last one is filled up with images from the start."""
    num_images = len(images)
    num_rows = -(-num_images // batch_size) * batch_size
    rows = torch.arange(num_rows) % num_images
    batches = [teacher(images[batch]) for batch in torch.split(rows, batch_size)]
    return {name: torch.cat([batch[name].cpu() for batch in batches])[:num_images] for name in batches[0]}


def _checked(name: str, wanted: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
    found = outputs.get(name)
    if found is None or found.shape != wanted.shape:
        shape = "nothing" if found is None else list(found.shape)
        raise EngineError(f"output {name!r}: float32 returns {list(wanted.shape)}, the converted teacher {shape}")
    if not found.isfinite().all():
        raise EngineError(
            f"the converted teacher returns {name!r} with NaN or inf for {_num_bad(found)} of {len(found)} images, and "
            "float32 does not: values exceed the range of the precision; use bf16, which has the range of float32"
        )
    return found


def _measure(name: str, found: Tensor, wanted: Tensor) -> OutputParity:
    found, wanted = found.double(), wanted.double()
    rows_found, rows_wanted = (each.reshape(len(each), -1) for each in (found, wanted))
    parity: dict[str, float] = {
        "cosine": _smallest_cosine(rows_found, rows_wanted),
        "norm_ratio": _norm_ratio(rows_found, rows_wanted),
    }
    if wanted.ndim > 2:
        found_NLD, wanted_NLD = _positions(found), _positions(wanted)
        usual = wanted_NLD.square().sum(2).mean().sqrt().item()
        at_positions = [each.transpose(0, 1).flatten(1) for each in (found_NLD, wanted_NLD)]
        parity["position_cosine"] = _smallest_cosine(*at_positions, negligible=_NEGLIGIBLE * usual * len(wanted) ** 0.5)
        parity["pooled_cosine"] = _smallest_cosine(
            found_NLD.mean(1), wanted_NLD.mean(1), negligible=_NEGLIGIBLE * usual
        )
    if name == "logits":
        found, wanted = _rows(found), _rows(wanted)
        parity |= {"top1_agreement": _top1_agreement(found, wanted), "kl": _kl(found, wanted)}
    return OutputParity(**parity)


def _rows(logits: Tensor) -> Tensor:
    """Logits `[N, K]`, and those of pixels `[N, K, h, w]` as `[N · h · w, K]`."""
    return logits if logits.ndim == 2 else _positions(logits).flatten(0, 1)


def _positions(output: Tensor) -> Tensor:
    """`[N, L, D]`: tokens as they are, and the vectors at the positions of a map `[N, C, h, w]`."""
    return output if output.ndim == 3 else output.flatten(2).transpose(1, 2)


def _smallest_cosine(found: Tensor, wanted: Tensor, *, negligible: float = 0.0) -> float:
    """Over the rows, of which those no longer than `negligible` in both count as equal."""
    lengths_found, lengths_wanted = found.norm(dim=1), wanted.norm(dim=1)
    products = lengths_found * lengths_wanted
    cosines = (found * wanted).sum(1) / products.clamp(min=1e-300)
    is_short = (lengths_found <= negligible) & (lengths_wanted <= negligible)
    return float(torch.where(is_short, 1.0, torch.where(products > 0, cosines, 0.0)).min())


def _norm_ratio(found: Tensor, wanted: Tensor) -> float:
    """The ratio of the rows' norms that is farthest from 1; rows of zeros in both count as equal."""
    norms_found, norms_wanted = found.norm(dim=1), wanted.norm(dim=1)
    ratios = torch.where(norms_found == norms_wanted, 1.0, norms_found / norms_wanted.clamp(min=1e-300))
    return float(max(ratios.tolist(), key=_stretch))


def _kl(logits_NK: Tensor, wanted_NK: Tensor) -> float:
    log_found_NK = F.log_softmax(logits_NK / _TEMPERATURE, dim=1)
    log_wanted_NK = F.log_softmax(wanted_NK / _TEMPERATURE, dim=1)
    return F.kl_div(log_found_NK, log_wanted_NK, reduction="batchmean", log_target=True).clamp(min=0).item()


def _out_of_bounds(parities: Mapping[str, OutputParity], precision: Precision) -> list[str]:
    """What is too far off, a text for each output, the worst one first."""
    reasons: list[tuple[float, str]] = []
    for name, parity in parities.items():
        metrics = [(metric, getattr(parity, metric.field)) for metric in _METRICS]
        failed = [
            (metric.excess(value, precision), f"{metric.label} {value:.4g} (allowed {_allowed(metric, precision)})")
            for metric, value in metrics
            if value is not None and metric.excess(value, precision) > 1
        ]
        if failed:
            failed.sort(key=lambda reason: -reason[0])
            reasons.append((failed[0][0], f"{name!r} {', '.join(text for _, text in failed)}"))
    return [text for _, text in sorted(reasons, key=lambda reason: -reason[0])]


def _allowed(metric: _Metric, precision: Precision) -> str:
    bound = metric.bound(precision)
    if metric.field == "norm_ratio":
        return f"{1 / bound:.2f} to {bound:.2f}"
    return f"{'up to' if metric.field == 'kl' else 'from'} {bound:g}"


def _worse(first: OutputParity, second: OutputParity) -> OutputParity:
    """The worse value of each metric."""
    pairs = {
        metric: (getattr(first, metric.field), getattr(second, metric.field))
        for metric in _METRICS
        if getattr(first, metric.field) is not None
    }
    return OutputParity(**{metric.field: max(pair, key=metric.error) for metric, pair in pairs.items()})


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
