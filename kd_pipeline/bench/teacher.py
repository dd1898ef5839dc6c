"""Measure one teacher on every backend and in every precision that this machine has, at several batch sizes."""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.progress import progress_bar
from kd_pipeline._core.secret_values import hide_in_settings
from kd_pipeline._core.settings import Settings
from kd_pipeline.bench.measure import environment, format_table, prepare_out, save_result, spread
from kd_pipeline.bench.photographs import photographs
from kd_pipeline.bench.teacher_backends import NUM_COMPARED, BackendComparison, ExportedModel, TeacherRow
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError, ExportError, MissingPackageError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.registry import ModelSettings, open_model, pretrained_input
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.report.plots import plot_scaling
from kd_pipeline.teachers.open import why_no_onnx
from kd_pipeline.teachers.tensorrt.manifest import Precision

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BenchTeacherSettings", "TeacherResult", "bench_teacher"]

_EXPORT_BATCH = 8
"""Largest batch with which the export is checked; opening and comparing check others."""
_SIZE, _BUILTIN_SIZE = 224, 32
"""Height and width of the images for a model that does not specify them."""


class BenchTeacherSettings(Settings):
    """Which teacher is measured, and how. Set exactly one of `onnx` and `model`."""

    onnx: Path | None = None
    """An exported teacher."""
    model: ModelSettings | None = None
    """A network by name; it is also exported, to run on all backends."""
    root: Path | None = None
    """Folder of images. Defaults to `data/photographs`, which is created if it does not exist."""
    size: int | None = Field(default=None, gt=0)
    """Height and width of the images; defaults to those of the model, or 224, or 32 for a builtin."""
    batch_sizes: tuple[PositiveInt, ...] = Field(default=(1, 8, 32, 64), min_length=1)
    """Images in a batch, one size after the other."""
    compile_at: tuple[PositiveInt, ...] | None = None
    """Those of `batch_sizes` for which PyTorch is also compiled, separately, and on a GPU captured as a CUDA graph, and
    for which TensorRT also builds an engine of that size only; defaults to the largest."""
    precisions: tuple[Precision, ...] = Field(default=("fp32", "bf16", "fp16", "fp8", "int8"), min_length=1)
    """Which precisions are measured; one backend in float32, the reference, is measured in any case."""
    num_images: int = Field(default=64, gt=0)
    """Timed images of each backend at each batch size in each repeat, rounded up to full batches; on a GPU at least 20
    batches."""
    repeats: int = Field(default=3, gt=0)
    """How often each row is measured."""
    num_threads: int | None = Field(default=None, gt=0)
    """Threads of every backend; defaults to the cores this process may use."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto` for a GPU if there is one."""
    out: Path | None = None
    """JSON file for the result; the plot is saved next to it as `.png`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.onnx is None) == (self.model is None):
            raise ValueError(f"give an ONNX file or name a model, got {'neither' if self.onnx is None else 'both'}")
        if others := set(self.compile_at or ()) - set(self.batch_sizes):
            raise ValueError(f"compile_at: {sorted(others)} are not among the batch_sizes {list(self.batch_sizes)}")
        return self


@dataclass(frozen=True, slots=True)
class TeacherResult:
    """All rows in the order in which backends were tried, the settings and the environment."""

    rows: tuple[TeacherRow, ...]
    left_out: Mapping[str, str]
    """Why a row, or one of its batch sizes, was not measured."""
    reference: str
    """The row that the others are compared with."""
    export_s: float | None
    """Seconds to export the model; None if an ONNX file was given, nothing would run the export, or it failed."""
    has_random_weights: bool
    """An untrained network has similar logits for all classes and images, so agreement with it means little."""
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    def table(self) -> str:
        """Plain text: a line for each row and batch size, and below them what was left out and what the numbers are."""
        header = ("", "batch", "images/s", "lowest", "highest", "ms/image", "open s", "top-1 as fp32", "cosine")
        cells = []
        for row in self.rows:
            top1 = "" if row.top1_agreement is None else f"{row.top1_agreement:.1%}"
            shown = [row.name, f"{row.open_s:.1f}", top1, f"{row.cosine:.5f}"]
            for batch_size, rates in sorted(row.images_per_s.items()):
                speeds = [f"{rate:,.1f}" for rate in (median(rates), min(rates), max(rates))]
                name, *about = shown
                cells.append([name, str(batch_size), *speeds, f"{1000 / median(rates):.2f}", *about])
                shown = [""] * len(shown)  # only in the first line of the row
        lines = format_table(header, cells)
        names_by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            names_by_reason.setdefault(reason, []).append(name)
        lines += [f"not measured: {', '.join(names)}: {reason}" for reason, names in names_by_reason.items()]
        if self.export_s is not None:
            lines.append(f"The ONNX file took {self.export_s:.1f} s to export and check.")
        if self.has_random_weights:
            lines.append("The weights are random, so top-1 and cosine mean little; give a checkpoint.")
        lines.append(
            f"Medians of {self.settings['repeats']} interleaved repeats with {self.settings['num_threads']} thread(s) "
            f"on {self.settings['device_name']}. Top-1 and cosine: compared with {self.reference}, cosine of the worst "
            "image. Open: until the first output."
        )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything, including every repeat."""
        rows = [
            asdict(row)
            | {
                "images_per_s": {str(size): spread(rates) for size, rates in row.images_per_s.items()},
                "ms_per_image": {str(size): 1000 / median(rates) for size, rates in row.images_per_s.items()},
            }
            for row in self.rows
        ]
        about = {name: getattr(self, name) for name in ("left_out", "reference", "export_s", "has_random_weights")}
        about |= {"settings": self.settings, "environment": self.environment}
        return json.dumps({"rows": rows, **about}, indent=2)

    def plot(self) -> "Figure":
        """Draw images per second over the batch size, a line for each row."""
        curves = {
            row.name: [(float(size), median(rates)) for size, rates in sorted(row.images_per_s.items())]
            for row in self.rows
        }
        title = f"{self.settings['name']} on {self.settings['device_name']}, {self.settings['num_threads']} thread(s)"
        return plot_scaling(curves, title=title, x="images in a batch", y="images/s")


def bench_teacher(
    settings: BenchTeacherSettings, *, report: Callable[[str], object] = lambda line: None
) -> TeacherResult:
    """Measure one teacher on every backend: PyTorch eager and compiled, ONNX Runtime, OpenVINO and TensorRT.

    All get the same photographs, with the transform for evaluation, and equally many threads. At each batch size they
    take turns: every repeat times each one once, after an untimed batch, while the others are idle. Times are wall
    clock times until the device has finished, without copying the images, which are already there. On a GPU, PyTorch
    also replays CUDA graphs, and TensorRT also runs engines for a single batch size.

    Logits are compared with those of the first backend in float32, in the same way as those of a built engine: two
    practically tied classes count as one. What cannot be opened or fails is in `left_out` with the reason.

    The result is saved after each repeat.

    Raises:
        ConfigError: `out` is a folder, or the model cannot be opened.
        DataError: there are no images.
        TeacherError: nothing runs the teacher.
        MissingPackageError: scikit-learn is needed for the photographs and not installed.
    """
    prepare_out(settings.out)
    num_threads = settings.num_threads or num_cores()
    device = resolve_device(settings.device)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(num_threads)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        teacher = _prepare(settings, folder, report, no_export=why_no_onnx(device))
        images = _photographs(settings, teacher, num_threads, report).to(device)
        used = {
            "name": teacher.model.name,
            "size": images.shape[-1],
            "num_threads": num_threads,
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        }

        def result_so_far() -> TeacherResult:
            return TeacherResult(
                rows=tuple(comparison.rows.values()),
                left_out=comparison.left_out,
                reference=comparison.reference,
                export_s=teacher.export_s,
                has_random_weights=teacher.has_random_weights,
                settings=hide_in_settings(settings.model_dump(mode="json")) | used,
                environment=environment(),
            )

        comparison = BackendComparison(
            teacher.model,
            images,
            batch_sizes=settings.batch_sizes,
            num_threads=num_threads,
            report=report,
            save=lambda: save_result(settings.out, lambda: result_so_far().to_json(), report),
        )
        comparison.run(
            compile_at=settings.compile_at,
            num_images=settings.num_images,
            repeats=settings.repeats,
            precisions=settings.precisions,
        )
    result = result_so_far()
    save_result(settings.out, result.to_json, report, result.plot)
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


def _prepare(
    settings: BenchTeacherSettings, folder: Path, report: Callable[[str], object], *, no_export: str | None
) -> _Teacher:
    """Open or export the teacher; `no_export` says why nothing would run the export, which takes tens of seconds."""
    if settings.onnx is not None:
        images = read_onnx(settings.onnx).images
        if len(images.shape) != 4:
            raise ConfigError(f"{settings.onnx} takes {images}, and images [N, 3, H, W] are measured; give such a file")
        height, width = images.shape[2:]
        size = settings.size or ((height, width) if height and width else height or width or _SIZE)
        transform = EvalTransform(size=size)
        return _Teacher(ExportedModel(settings.onnx.name, None, settings.onnx), transform, images.dtype, None, False)
    model = settings.model
    assert model is not None
    torch.manual_seed(0)  # the same random weights in every call
    # A factory in the caller's own settings is trusted to run.
    module = open_model(model, plugins=[str(model.factory).partition(":")[0]]).eval()
    expected = pretrained_input(module)
    size = settings.size or (expected.size[0] if expected else _BUILTIN_SIZE if model.builtin else _SIZE)
    statistics = {"mean": expected.mean, "std": expected.std} if expected else {}
    name = model.timm or model.torchvision or model.builtin or str(model.factory)
    exported, export_s = ExportedModel(name, module, None, no_export or ""), None
    if no_export is None:
        report(f"exporting {name} for images of {size} x {size}")
        started_s = time.perf_counter()
        try:
            with progress_bar("exporting to ONNX"):
                onnx = export_onnx(
                    module, folder / "teacher.onnx", image_shape=(3, size, size), max_batch=_EXPORT_BATCH
                )
            exported, export_s = ExportedModel(name, module, onnx), time.perf_counter() - started_s
        except (ExportError, MissingPackageError) as exc:
            exported = ExportedModel(name, module, None, f"no ONNX file: {exc}")
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
    """As many images as are compared or in a batch, `[N, 3, H, W]`; repeated from the start if there are fewer."""
    root = photographs(settings.root, report)
    largest = max(settings.batch_sizes)
    number = -(-NUM_COMPARED // largest) * largest
    source, found = ImageFolder(root, labeled=False), []
    with KDDataLoader(
        source,
        teacher.transform,
        batch_size=1,
        device="cpu",
        num_threads=num_threads,
        on_bad_sample="substitute",  # any images will do
        max_bad_fraction=1.0,
    ) as loader:
        for batch in loader:
            found.append(batch.images.clone())
            if len(found) == number:
                break
    return torch.cat(found)[torch.arange(number) % len(found)].to(teacher.dtype)
