"""The exported model of a run: write its folder `exported/`, and open it, or a lone ONNX file or engine, again."""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.files import read_regular
from kd_pipeline._core.finite import first_nonfinite
from kd_pipeline._core.optional import require
from kd_pipeline._core.progress import timed
from kd_pipeline._core.secret_values import hide_in_settings, refuse_hidden
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import first_few
from kd_pipeline._core.text import printable
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError, ExportError
from kd_pipeline.losses.settings import LOGITS
from kd_pipeline.models.backbone import trunk_of
from kd_pipeline.models.checkpoints import open_weights
from kd_pipeline.models.input_adapter import AdaptedNetwork, Normalization
from kd_pipeline.models.modules import named_outputs
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import match_classes
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.parity import CalibrationSet
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.teachers.tensorrt.build import build_engine
from kd_pipeline.teachers.tensorrt.output import make_folders
from kd_pipeline.teachers.tensorrt.settings import BuildSettings
from kd_pipeline.training.settings import ExportSettings

__all__ = [
    "CHECKPOINTS",
    "DESCRIPTION",
    "ENGINE",
    "ONNX",
    "WEIGHTS",
    "Exported",
    "OpenedModel",
    "OwnNetwork",
    "export_student",
    "no_model",
    "no_network",
    "open_model_file",
    "read_exported",
]

DESCRIPTION, WEIGHTS, ONNX, ENGINE = "model.json", "model.safetensors", "model.onnx", "model.engine"
"""The files in the folder `exported` of a run."""

_BACKENDS = {".onnx": "onnx", ".engine": "engine", ".plan": "engine", ".trt": "engine"}
"""The teacher setting that opens a file with this suffix."""
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".tar")
"""Suffixes of files with weights alone."""
_MAX_BYTES = 2**24
"""Of a description, which has a name for each class."""
_MAX_SHOWN = 300
"""Characters of what is wrong with it."""
_AGAIN = "run the command of the run again, which exports its model again"

_WITHOUT_WEIGHTS = {
    **{"pretrained": False, "reset": ()},
    **{"checkpoint": None, "checkpoint_key": None, "checkpoint_match": "all"},
}
"""What a description says about weights: nothing, as they are in the file beside it."""

_logger = logging.getLogger("kd_pipeline")


class OwnNetwork(Settings):
    """A network that the user's own code builds, which this library does not run."""

    network: str
    """Its class, with its module."""
    inputs: dict[str, tuple[int | None, ...]]
    """Shapes of what it takes, by name; None is the number of rows."""
    float_inputs: bool
    """Whether all of them are of floats."""

    @classmethod
    def of(cls, network: nn.Module, example: Mapping[str, Tensor]) -> Self:
        """Describe `network`, which takes inputs like `example`, of two rows by name."""
        return cls(
            network=f"{type(network).__module__}.{type(network).__qualname__}",
            inputs={name: (None, *each.shape[1:]) for name, each in example.items()},
            float_inputs=all(each.is_floating_point() for each in example.values()),
        )

    @property
    def takes_images(self) -> bool:
        """Whether its only input is `[N, 3, H, W]`, as images of a config are."""
        shapes = list(self.inputs.values())
        return len(shapes) == 1 and len(shapes[0]) == 4 and shapes[0][1] == 3

    @property
    def no_onnx(self) -> str | None:
        """Why it is not exported to ONNX; None if it can be."""
        if len(self.inputs) > 1:
            return f"it takes several inputs, {', '.join(self.inputs)}, and a file of this library one"
        if not self.float_inputs:
            return "its input is not of floats, as images are"
        return None


class Exported(Settings):
    """`model.json`: all that is needed to run the model beside it on an image."""

    format: Literal[1] = 1
    """Version of this description."""
    model: ModelSettings | None = None
    """The network, without its weights; None for one of the user's own."""
    own: OwnNetwork | None = None
    """The network of the user's own code."""
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of `model.safetensors`."""
    classes: tuple[str, ...] | None
    """Class names in logit order, if the training data has names."""
    transform: EvalTransform | None
    """The preprocessing of the images; None if the batches were the user's own."""

    @model_validator(mode="after")
    def _has_a_network(self) -> Self:
        if (self.model is None) == (self.own is None):
            raise ValueError("it names no network, or two")
        return self


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that is ready to run."""

    model: nn.Module | Teacher
    """A network in eval mode, or the runtime of a file; both take images `[N, 3, H, W]`."""
    classes: tuple[str, ...] | None
    """Class names in logit order, if known."""
    files: tuple[Path, ...]
    """The files it was opened from."""
    close: Callable[[], None]
    """Frees the runtime."""


def export_student(
    student: nn.Module,
    model: ModelSettings | OwnNetwork,
    folder: Path,
    *,
    classes: Sequence[str] | None,
    transform: EvalTransform | None,
    calibration_set: Callable[[], CalibrationSet],
    export: ExportSettings,
) -> None:
    """Write `model.safetensors` and `model.json`, and as `export` says `model.onnx` and `model.engine`, into `folder`.

    The tensors of a student without a head have the names that its library gives them: `timm.create_model(name,
    num_classes=0)` and the constructors of torchvision load the file strictly. Its ONNX file returns what `Backbone`
    does.

    If no engine is wanted, a student that cannot be exported to ONNX is a warning. One of the user's own that takes
    anything but one tensor of floats has no ONNX file, which a line in the log says.

    Args:
        student: the network, in float32 on the CPU and in eval mode.
        model: how it is built, or what it is if the user's own code builds it.
        folder: created if missing.
        classes: class names in logit order; a student without a head has none.
        transform: the evaluation transform; None if the batches were the user's own.
        calibration_set: returns images as the network gets them, to build the engine with.
        export: which files to write.

    Raises:
        ExportError: a weight is NaN or inf, and nothing is written.
        ExportError, EngineError: the engine cannot be built.
    """
    if (bad := first_nonfinite(student)) is not None:
        raise ExportError(
            f"the student's weights hold NaN or inf, first in {bad!r}, so it is not exported to {folder}; train again "
            "with a lower train.optimizer.lr, or in float32 or bfloat16, in another run_dir"
        )
    make_folders(folder)
    settings = model if isinstance(model, ModelSettings) else None
    if settings is not None and settings.is_headless:
        classes = None
    _write_weights(student, model, folder, None if classes is None else tuple(classes), transform)
    shape = _onnx_shape(model, transform) if export.onnx else None
    if shape is None:
        return
    try:
        with timed("export to ONNX") as report:
            export_onnx(student, folder / ONNX, image_shape=shape, classes=classes, report=report)
    except ExportError as error:
        if export.engine is not None:
            raise
        _logger.warning("the student was not exported to ONNX: %s", error)
        return
    if export.engine is not None:
        build = BuildSettings(onnx=folder / ONNX, **export.engine.model_dump())
        build_engine(build, save_engine=folder / ENGINE, calibration_set=calibration_set, report=_logger.info)


def _write_weights(
    student: nn.Module,
    model: ModelSettings | OwnNetwork,
    folder: Path,
    classes: tuple[str, ...] | None,
    transform: EvalTransform | None,
) -> None:
    """Write the weights and their description."""
    own = model if isinstance(model, OwnNetwork) else None
    settings = None
    if isinstance(model, ModelSettings):
        # Not `auto`, by which the network may be adapted to nothing.
        adapter = student.expected if isinstance(student, AdaptedNetwork) else None
        settings = model.model_copy(update=_WITHOUT_WEIGHTS | {"input_adapter": adapter})
    weights = {name: tensor.contiguous() for name, tensor in trunk_of(student).state_dict().items()}
    content: bytes = require("safetensors.torch", extra="train").save(weights)
    digest = hashlib.sha256(content).hexdigest()
    description = Exported(model=settings, own=own, weights_sha256=digest, classes=classes, transform=transform)
    write_atomic(folder / WEIGHTS, content)
    values = description.model_dump(mode="json")
    if own is None:
        values["model"] = hide_in_settings(values["model"])  # the folder is made to be given to others
    write_atomic(folder / DESCRIPTION, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _onnx_shape(model: ModelSettings | OwnNetwork, transform: EvalTransform | None) -> tuple[int, ...] | None:
    """The shape of an image for the ONNX file; None, which is logged, where there can be no such file."""
    if isinstance(model, OwnNetwork):
        if model.no_onnx is None:
            return tuple(size or 1 for size in next(iter(model.inputs.values()))[1:])
        _logger.info("the student is not exported to ONNX: %s", model.no_onnx)
    elif transform is not None:
        return transform.image_shape
    else:
        _logger.info("the student is not exported to ONNX: the size of its images is that of batches of your own")
    return None


def read_exported(path: Path) -> tuple[Path, Exported] | None:
    """The folder `exported` that `path` is, contains or is in, and its description; None for a lone file.

    Raises:
        ConfigError: there is no such model, or its `model.json` is damaged or of a different release.
    """
    folder = path.parent
    if path.is_dir():
        folder = path if (path / DESCRIPTION).is_file() else path / "exported"
        if not (folder / DESCRIPTION).is_file():
            stages = [file.parents[1] for file in sorted(path.glob(f"*/exported/{DESCRIPTION}"))]
            hint = f"; of its stages, these are: {first_few(list(map(str, stages)))}" if stages else ""
            raise ConfigError(f"{path} is not the folder of a finished run: it has no exported/{DESCRIPTION}{hint}")
    elif path.suffix not in _BACKENDS:
        raise ConfigError(no_model(path))
    description = folder / DESCRIPTION
    if not description.exists():
        return None
    try:
        # Not model_validate_json, each of whose errors holds a copy of what it is about.
        return folder, Exported.model_validate(json.loads(read_regular(description, max_bytes=_MAX_BYTES)))
    except OSError as error:
        raise ConfigError(f"{description} cannot be read: {error.strerror}; {_AGAIN}") from None
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        reason = f"{key}: {error.errors()[0]['msg']}"
    except (ValueError, RecursionError) as error:
        reason = f"the file: Invalid JSON ({error})"
    reason = printable(reason)[:_MAX_SHOWN]
    raise ConfigError(f"{description} does not describe a model that this release opens: {reason}; {_AGAIN}")


def open_model_file(
    path: Path,
    *,
    image_shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    classes: Sequence[str] | None = None,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
) -> OpenedModel:
    """Open the model at `path` for images of `image_shape` and `dtype` on `device`.

    Args:
        path: the folder of a finished run, whose weights are loaded, or an `.onnx` or `.engine` file.
        image_shape: `(3, H, W)`.
        device: where the images will be.
        dtype: float32 or float16.
        classes: class names in the order that the logits should have; defaults to the model's own order. A model
            without logits has no classes.
        plugins: modules that the network's factory may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.

    Raises:
        ConfigError: there is no model, it is damaged, or its network cannot be built.
        TeacherError: the file cannot be run, or its classes do not match.
    """
    exported = read_exported(path)
    if path.is_dir():
        assert exported is not None
        return _open_network(*exported, device, dtype, classes, plugins)
    settings = TeacherSettings.model_validate({_BACKENDS[path.suffix]: path})
    teacher = open_teacher(settings, image_shape=image_shape, device=device, dtype=dtype, trust_engines=trust_engines)
    try:
        teacher = match_classes(teacher, classes)
    except BaseException:
        teacher.close()
        raise
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
    if exported.model is None:
        raise ConfigError(no_network(folder, exported))
    refuse_hidden({"model": exported.model.model_dump(mode="json")}, str(folder / DESCRIPTION))
    try:
        with open_weights(weights) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {WEIGHTS}; {_AGAIN}") from None
    except OSError as error:
        raise ConfigError(f"{weights} cannot be read: {error.strerror}; {_AGAIN}") from None
    if found != exported.weights_sha256:
        raise ConfigError(
            f"{weights} does not match {DESCRIPTION} beside it (sha256 {found[:12]}…, expected "
            f"{exported.weights_sha256[:12]}…); restore the file, or {_AGAIN}"
        )
    # A description of somebody else may ask for a download.
    model = exported.model.model_copy(update=_WITHOUT_WEIGHTS | {"checkpoint": weights})
    made = exported.transform
    images = None if made is None else Normalization(made.mean, made.std)
    network = open_model(model, plugins=plugins, is_deployed=True, images=images)
    if (bad := first_nonfinite(network)) is not None:
        raise ConfigError(f"{weights} holds NaN or inf, first in {bad!r}; train the model again, in another run_dir")
    known = exported.classes
    if classes is not None and not exported.model.is_headless:
        if known is not None and known != tuple(classes):
            network = nn.Sequential(network, _PermuteLogits(_positions(folder, known, classes)))
        known = tuple(classes)
    return OpenedModel(network.to(device, dtype).eval(), known, (weights,), lambda: None)


def no_network(folder: Path, exported: Exported) -> str:
    """Why the model in `folder`, which the user's own code builds or feeds, is not opened, and what to do instead."""
    onnx = folder / ONNX
    if exported.own is None:
        return (
            f"the model in {folder} was trained on batches of your own, and how its images are made is not known; open "
            f"{folder / WEIGHTS} in Python"
        )
    own = exported.own
    name = own.network.rpartition(".")[2]
    return (
        f"the model in {folder} is {own.network}, which your own code builds; "
        + (
            f"name its ONNX file {onnx} with a config of images (-c), or "
            if own.takes_images and onnx.is_file()
            else ""
        )
        + f"build it in Python and load its weights: student = {name}(...); student.load_state_dict("
        f"safetensors.torch.load_file({str(folder / WEIGHTS)!r})); kd_pipeline.evaluate(student, loader) evaluates it"
    )


def no_model(path: Path) -> str:
    """Why `path`, which is no folder, is not opened, and what to do instead."""
    found = f"{path} is neither the folder of a run nor an .onnx or .engine file"
    if not path.exists():
        return f"{found}; nothing is at this path"
    if path.suffix not in CHECKPOINTS:
        return found
    network = f"teacher: {{model: {{timm: resnet50, checkpoint: {path}}}}}"
    return (
        f"{found}, but a checkpoint, which holds weights without the network. If a run wrote it, name the folder of "
        f"the run. Else name its network in a config, such as {network}, and run kd-pipeline eval -c CONFIG without a "
        f"model; or export both with kd-pipeline export --timm resnet50 --checkpoint {path}"
    )


class _PermuteLogits(nn.Module):
    """Reorders logits `[N, K]`, or `[N, K, h, w]` by their name."""

    positions_K: Tensor

    def __init__(self, positions: list[int]) -> None:
        super().__init__()
        self.register_buffer("positions_K", torch.tensor(positions), persistent=False)

    def forward(self, output: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        if isinstance(output, Tensor):
            return output.index_select(1, self.positions_K)
        named = dict(named_outputs(output, owner="the model"))
        return named | {LOGITS: named[LOGITS].index_select(1, self.positions_K)}


def _positions(folder: Path, classes: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """The position of each wanted class among the model's classes."""
    position_of = {name: position for position, name in enumerate(classes)}
    if unknown := [repr(name) for name in wanted if name not in position_of]:
        raise ConfigError(
            f"the model in {folder} has {len(classes)} classes, but not {first_few(unknown)}; evaluate it on data with "
            "its own classes"
        )
    return [position_of[name] for name in wanted]
