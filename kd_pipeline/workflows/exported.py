"""Models where they lie on a disk: what a run has exported, ONNX files and engines, opened as what they are."""

import hashlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from kd_pipeline._core.atomic_write import write_whole
from kd_pipeline._core.optional import require
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import some
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError, ExportError
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import matched
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.teachers.tensorrt.build import build_engine
from kd_pipeline.teachers.tensorrt.parity import Samples
from kd_pipeline.teachers.tensorrt.settings import BuildSettings
from kd_pipeline.training.settings import ExportSettings

__all__ = ["ABOUT", "ENGINE", "ONNX", "WEIGHTS", "Exported", "OpenedModel", "open_model_file", "read_exported"]

ABOUT, WEIGHTS, ONNX, ENGINE = "model.json", "model.safetensors", "model.onnx", "model.engine"
"""What a run leaves in its folder `exported`."""

_BACKENDS = {".onnx": "onnx", ".engine": "engine", ".plan": "engine", ".trt": "engine"}
"""The setting of a teacher that opens a file of this ending."""


class Exported(Settings):
    """What `model.json` says of the model beside it: all that is needed to ask it about an image."""

    format: Literal[1] = 1
    """Of this description."""
    model: ModelSettings
    """The network, without its weights."""
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of `model.safetensors`."""
    classes: tuple[str, ...] | None
    """Names of the classes in logit order, where the training data had some."""
    transform: EvalTransform
    """What is to be done to an image first."""


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that answers, and what is known of it."""

    model: nn.Module | Teacher
    """A network in eval mode, or what runs a file; both take images `[N, 3, H, W]`."""
    classes: tuple[str, ...] | None
    """Names of its classes in logit order, where it knows them."""
    files: tuple[Path, ...]
    """What it was opened from."""
    close: Callable[[], None]
    """Frees what runs it."""


def read_exported(path: Path) -> tuple[Path, Exported] | None:
    """The folder `exported` that `path` is, holds or lies in, and what is said there; None for a lone file.

    Raises:
        ConfigError: there is no such model, or its `model.json` is damaged or of another release.
    """
    folder = path.parent
    if path.is_dir():
        folder = path if (path / ABOUT).is_file() else path / "exported"
        if not (folder / ABOUT).is_file():
            raise ConfigError(f"{path} is not the folder of a finished run: it has no exported/{ABOUT}")
    elif path.suffix not in _BACKENDS:
        raise ConfigError(f"{path} is neither the folder of a run nor an .onnx or .engine file")
    about = folder / ABOUT
    if not about.is_file():
        return None
    try:
        return folder, Exported.model_validate_json(about.read_bytes())
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise ConfigError(
            f"{about} does not describe a model that this release opens: {where}: {error.errors()[0]['msg']}; start "
            "the command of the run again, which exports its model anew"
        ) from None


def open_model_file(
    path: Path,
    *,
    size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    classes: Sequence[str] | None = None,
    plugins: Collection[str] = (),
) -> OpenedModel:
    """Open the model at `path` for images `[N, 3, size, size]` of `dtype` on `device`.

    Args:
        path: the folder of a finished run, whose weights are taken, or an `.onnx` or `.engine` file.
        size: height and width of the images.
        device: where they will be.
        dtype: float32 or float16.
        classes: names in the order that the logits are wanted in; the model's own order unless given.
        plugins: modules that the network's factory may come from.

    Raises:
        ConfigError: there is no model, it is damaged, or its network cannot be built.
        TeacherError: the file cannot be run, or its classes are not those wanted.
    """
    exported = read_exported(path)
    if path.is_dir():
        assert exported is not None
        return _open_network(*exported, device, dtype, classes, plugins)
    settings = TeacherSettings.model_validate({_BACKENDS[path.suffix]: path})
    teacher = matched(open_teacher(settings, image_shape=(3, size, size), device=device, dtype=dtype), classes)
    return OpenedModel(teacher, teacher.classes, (path,), teacher.close)


def _open_network(
    folder: Path,
    exported: Exported,
    device: torch.device,
    dtype: torch.dtype,
    classes: Sequence[str] | None,
    plugins: Collection[str],
) -> OpenedModel:
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ConfigError(
            f"{folder} has no {WEIGHTS}; start the command of the run again, which exports its model anew"
        )
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != exported.weights_sha256:
        raise ConfigError(
            f"{weights} is not what {ABOUT} beside it describes (sha256 {found[:12]}…, there "
            f"{exported.weights_sha256[:12]}…); put back the file, or start the command of the run again"
        )
    network = open_model(exported.model.model_copy(update={"checkpoint": weights}), plugins=plugins)
    if classes is not None and exported.classes not in (None, tuple(classes)):
        assert exported.classes is not None
        network = nn.Sequential(network, _InOrder(_positions(folder, exported.classes, classes)))
    known = exported.classes if classes is None else tuple(classes)
    return OpenedModel(network.to(device, dtype).eval(), known, (weights,), lambda: None)


class _InOrder(nn.Module):
    """Logits `[N, K]` in another order."""

    positions_K: Tensor

    def __init__(self, positions: list[int]) -> None:
        super().__init__()
        self.register_buffer("positions_K", torch.tensor(positions), persistent=False)

    def forward(self, logits_NK: Tensor) -> Tensor:
        return logits_NK.index_select(1, self.positions_K)


def _positions(folder: Path, ours: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where among the model's classes each wanted one is."""
    if unknown := [repr(name) for name in wanted if name not in set(ours)]:
        raise ConfigError(
            f"the model in {folder} has {len(ours)} classes and does not know {some(unknown)}; evaluate it on data of "
            "its own classes"
        )
    position_of = {name: position for position, name in enumerate(ours)}
    return [position_of[name] for name in wanted]


_logger = logging.getLogger("kd_pipeline")


def export_student(
    student: nn.Module,
    model: ModelSettings,
    folder: Path,
    *,
    classes: Sequence[str] | None,
    transform: EvalTransform,
    samples: Callable[[], Samples],
    wanted: ExportSettings,
) -> None:
    """Write `model.safetensors` and `model.json` into `folder`, and `model.onnx` and `model.engine` where wanted.

    `model_files.open_model_file` opens what is there. A student that makes no ONNX file is a warning.

    Args:
        student: the network, in float32 on the CPU and in eval mode.
        model: how it is built.
        folder: made if it is not there.
        classes: names of the classes in logit order.
        transform: the evaluation transform, which says what images the network wants.
        samples: gives images as the network will see them, for the engine.
        wanted: what to write.

    Raises:
        ExportError, EngineError: there is no engine, and one is wanted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    content: bytes = require("safetensors.torch", extra="train").save(weights)
    about = Exported(
        model=model.model_copy(update={"pretrained": False, "checkpoint": None, "reset": ()}),
        weights_sha256=hashlib.sha256(content).hexdigest(),
        classes=None if classes is None else tuple(classes),
        transform=transform,
    )
    write_whole(folder / WEIGHTS, content)
    write_whole(folder / ABOUT, about.model_dump_json(indent=2) + "\n")
    if not wanted.onnx:
        return
    onnx, size = folder / ONNX, transform.size
    try:
        export_onnx(student, onnx, image_shape=(3, size, size), classes=classes)
    except ExportError as error:
        if wanted.engine is not None:
            raise
        _logger.warning("no ONNX file of the student: %s", error)
        return
    if (engine := wanted.engine) is not None:
        settings = BuildSettings(onnx=onnx, **engine.model_dump())
        build_engine(settings, save_engine=folder / ENGINE, samples=samples, report=_logger.info)
