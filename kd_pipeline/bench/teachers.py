"""One teacher on every backend and in every precision that this machine has, at several batch sizes."""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.settings import Settings
from kd_pipeline.bench.measure import environment, prepare_out, spread
from kd_pipeline.bench.photographs import photographs
from kd_pipeline.bench.teacher_race import NUM_COMPARED, ExportedModel, Race, TeacherRow
from kd_pipeline.data.sources.base import ImageFolder
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ExportError, MissingPackageError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.registry import ModelSettings, default_input, open_model
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.report.scaling import save_scaling

__all__ = ["BenchTeacherSettings", "TeacherResult", "bench_teacher"]

_EXPORT_BATCH = 8
"""Largest batch that the export is tried on; opening and comparing try others."""
_SIZE, _BUILTIN_SIZE = 224, 32
"""Height and width of the images of a model that does not say."""


class BenchTeacherSettings(Settings):
    """Which teacher is measured, and how. Exactly one of the first two says which."""

    onnx: Path | None = None
    """An exported teacher."""
    model: ModelSettings | None = None
    """A network by name; it is exported too, so that all backends run it."""
    root: Path | None = None
    """Images below this folder; `data/photographs`, which is made where it is not there yet, where left out."""
    size: int | None = Field(default=None, gt=0)
    """Height and width of the images; what the model wants where left out, or 224, or 32 for a builtin."""
    batch_sizes: tuple[PositiveInt, ...] = Field(default=(1, 8, 32, 64), min_length=1)
    compile_at: tuple[PositiveInt, ...] | None = None
    """Those of `batch_sizes` at which PyTorch is compiled as well, anew for each; the largest where left out."""
    num_images: int = Field(default=64, gt=0)
    """Timed images of each contender at each batch size in every repeat, rounded up to whole batches."""
    repeats: int = Field(default=3, gt=0)
    num_threads: int | None = Field(default=None, gt=0)
    """Threads of every backend; the cores this process may use where left out."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto` for a GPU where there is one."""
    out: Path | None = None
    """JSON file for the result; the picture of it lies beside it, as a `.png` file."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.onnx is None) == (self.model is None):
            raise ValueError(f"give an ONNX file or name a model, got {'neither' if self.onnx is None else 'both'}")
        if others := set(self.compile_at or ()) - set(self.batch_sizes):
            raise ValueError(f"compile_at: {sorted(others)} are not among the batch_sizes {list(self.batch_sizes)}")
        return self


@dataclass(frozen=True, slots=True)
class TeacherResult:
    """All rows, in the order in which backends were tried, and the circumstances."""

    rows: tuple[TeacherRow, ...]
    left_out: Mapping[str, str]
    """Why a contender, or one of its batch sizes, was not measured."""
    reference: str
    """The contender whose answers count as the float32 ones."""
    export_s: float | None
    """What exporting the model took; None where an ONNX file was given, or nothing could be exported."""
    has_random_weights: bool
    """Whether nothing was learned; then logits differ little between classes and images, and agreement says little."""
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    def table(self) -> str:
        """Plain text: a line for each contender and batch size, and below what was left out and what figures are."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'':{width}}  batch  images/s  lowest  highest  ms/image  open s  top-1 as fp32    cosine"]
        for row in self.rows:
            about = f"{row.open_s:6.1f}  {row.top1_agreement:13.1%}  {row.cosine:8.5f}"
            for number, (batch_size, rates) in enumerate(sorted(row.images_per_s.items())):
                lines.append(
                    f"{'' if number else row.name:{width}}  {batch_size:5}  {median(rates):8,.1f}  {min(rates):6,.1f}  "
                    f"{max(rates):7,.1f}  {1000 / median(rates):8.2f}  {'' if number else about}".rstrip()
                )
        alike: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            alike.setdefault(reason, []).append(name)
        lines += [f"not measured: {', '.join(names)}: {reason}" for reason, names in alike.items()]
        if self.export_s is not None:
            lines.append(f"The ONNX file took {self.export_s:.1f} s to export and check.")
        if self.has_random_weights:
            lines.append("The weights are random, so top-1 and cosine say little; give a checkpoint.")
        lines.append(
            f"Medians of {self.settings['repeats']} interleaved repeats with {self.settings['num_threads']} thread(s) "
            f"on {self.settings['device_name']}. Top-1 and cosine: as {self.reference}, the worst image's cosine. "
            "Open: to the first answer."
        )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything, every repeat included."""
        rows = [
            {
                "name": row.name,
                "open_s": row.open_s,
                "first_batch": row.first_batch,
                "cosine": row.cosine,
                "top1_agreement": row.top1_agreement,
                "images_per_s": {str(size): spread(rates) for size, rates in row.images_per_s.items()},
                "ms_per_image": {str(size): 1000 / median(rates) for size, rates in row.images_per_s.items()},
            }
            for row in self.rows
        ]
        about = {name: getattr(self, name) for name in ("left_out", "reference", "export_s", "has_random_weights")}
        about |= {"settings": self.settings, "environment": self.environment}
        return json.dumps({"rows": rows, **about}, indent=2)

    def save_picture(self, path: Path) -> None:
        """Draw images per second over the batch size, a line for each contender, as a PNG."""
        curves = {
            row.name: [(float(size), median(rates)) for size, rates in sorted(row.images_per_s.items())]
            for row in self.rows
        }
        title = f"{self.settings['name']} on {self.settings['device_name']}, {self.settings['num_threads']} thread(s)"
        save_scaling(curves, path, title=title, x="images in a batch", y="images/s")


def bench_teacher(
    settings: BenchTeacherSettings, *, report: Callable[[str], object] = lambda line: None
) -> TeacherResult:
    """Measure one teacher on all that can run it: PyTorch eager and compiled, ONNX Runtime, OpenVINO and TensorRT.

    All get the same photographs, resized, cropped and normalized as for evaluation, and none has more threads than
    another. At each batch size they take turns: every repeat times each one once, after a batch that is not timed,
    while the others stand still. A figure is the wall clock time until the device has finished, copies of the images
    not counted, as they are there already.

    Answers are compared with those of the first contender in float32, as engines are when they are built: two classes
    that are as good as tied count as one. What cannot be opened or does not answer is in `left_out` with the reason.

    Raises:
        ConfigError: `out` is a folder, or the model cannot be opened.
        DataError: there are no images.
        TeacherError: nothing at all runs the teacher.
        MissingPackageError: scikit-learn is needed for the photographs and not installed.
    """
    prepare_out(settings.out)
    num_threads = settings.num_threads or num_cores()
    device = resolve_device(settings.device)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(num_threads)
        teacher = _prepare(settings, Path(stack.enter_context(tempfile.TemporaryDirectory())), report)
        images = _photographs(settings, teacher, num_threads, report).to(device)
        race = Race(teacher.model, images, batch_sizes=settings.batch_sizes, num_threads=num_threads, report=report)
        race.run(compile_at=settings.compile_at, num_images=settings.num_images, repeats=settings.repeats)
    shown = settings.model_dump(mode="json") | {
        "name": teacher.model.name,
        "size": images.shape[-1],
        "num_threads": num_threads,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
    }
    result = TeacherResult(
        rows=tuple(race.rows.values()),
        left_out=race.left_out,
        reference=race.reference,
        export_s=teacher.export_s,
        has_random_weights=teacher.has_random_weights,
        settings=shown,
        environment=environment(),
    )
    if settings.out is not None:
        settings.out.write_text(result.to_json() + "\n", encoding="utf-8")
        result.save_picture(settings.out.with_suffix(".png"))
    return result


@dataclass(frozen=True, slots=True)
class _Teacher:
    """What is measured, and on what."""

    model: ExportedModel
    transform: EvalTransform
    dtype: torch.dtype
    """Of the images."""
    export_s: float | None
    has_random_weights: bool


def _prepare(settings: BenchTeacherSettings, folder: Path, report: Callable[[str], object]) -> _Teacher:
    if settings.onnx is not None:
        images = read_onnx(settings.onnx).images
        transform = EvalTransform(size=settings.size or images.shape[2] or _SIZE)
        return _Teacher(ExportedModel(settings.onnx.name, None, settings.onnx), transform, images.dtype, None, False)
    model = settings.model
    assert model is not None
    torch.manual_seed(0)  # the same random weights at every call
    # Who writes a factory into settings that are his own allows it to run.
    module = open_model(model, plugins=[str(model.factory).partition(":")[0]]).eval()
    expected = default_input(module)
    size = settings.size or (expected.size[0] if expected else _BUILTIN_SIZE if model.builtin else _SIZE)
    statistics = {"mean": expected.mean, "std": expected.std} if expected else {}
    name = model.timm or model.torchvision or model.builtin or str(model.factory)
    report(f"exporting {name} for images of {size} x {size}")
    started_s = time.perf_counter()
    try:
        onnx = export_onnx(module, folder / "teacher.onnx", image_shape=(3, size, size), max_batch=_EXPORT_BATCH)
        exported, export_s = ExportedModel(name, module, onnx), time.perf_counter() - started_s
    except (ExportError, MissingPackageError) as exc:
        exported, export_s = ExportedModel(name, module, None, f"there is no ONNX file: {exc}"), None
    return _Teacher(
        model=exported,
        transform=EvalTransform.model_validate({"size": size} | statistics),
        dtype=torch.float32,
        export_s=export_s,
        has_random_weights=not (model.pretrained or model.checkpoint or model.factory),
    )


def _photographs(
    settings: BenchTeacherSettings, teacher: _Teacher, num_threads: int, report: Callable[[str], object]
) -> Tensor:
    """As many images as are compared or in a batch, `[N, 3, H, W]`; from the start again where there are fewer."""
    root = photographs(settings.root, report)
    largest = max(settings.batch_sizes)
    number = -(-NUM_COMPARED // largest) * largest
    source, found = ImageFolder(root, labeled=False), []
    with KDDataLoader(source, teacher.transform, batch_size=1, device="cpu", num_threads=num_threads) as loader:
        for batch in loader:
            found.append(batch.images.clone())
            if len(found) == number:
                break
    return torch.cat(found)[torch.arange(number) % len(found)].to(teacher.dtype)
